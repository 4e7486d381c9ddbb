"""Every transition of a job's life, allowed and not."""

from dataclasses import replace

import pytest

from gateway.jobs import MAX_ATTEMPTS, IllegalTransition, Job, Outcome, Terms
from schemas.errors import Cancelled, InputError, ServiceError

DONE = Outcome(200, b"{}", units=1.0)


def job() -> Job:
    return Job("id", "fal-ai/z-image/turbo", "key", "http://host", created=1.0)


def test_the_normal_life() -> None:
    it = job()
    assert it.status == "IN_QUEUE"
    it.start(2.0)
    assert (it.status, it.started, it.attempts) == ("IN_PROGRESS", 2.0, 0)
    it.attempt()
    assert it.attempts == 1
    it.finish(DONE, 3.0)
    assert (it.status, it.finished, it.outcome) == ("COMPLETED", 3.0, DONE)


def test_an_interrupted_job_runs_again() -> None:
    it = job()
    it.start(2.0)
    it.logs.append({"message": "half way"})
    it.interrupt(3.0)
    assert (it.status, it.started) == ("IN_QUEUE", None)
    it.start(4.0)
    assert it.logs == []


def test_a_job_handed_back_has_made_no_attempt() -> None:
    it = job()
    for _ in range(2 * MAX_ATTEMPTS):
        it.start(2.0)
        it.attempt()
        it.hand_back(attempted=True)
    assert (it.status, it.started, it.attempts) == ("IN_QUEUE", None, 0)


def test_a_job_that_keeps_killing_its_worker_fails() -> None:
    it = job()
    for attempt in range(MAX_ATTEMPTS):
        it.start(float(attempt))
        it.attempt()
        it.interrupt(float(attempt))
    assert it.status == "COMPLETED" and it.outcome is not None
    assert (it.outcome.status, it.outcome.error_type) == (503, "runner_disconnected")


def test_cancelled_in_the_queue() -> None:
    it = job()
    it.drop(Cancelled(), 2.0)
    assert it.status == "COMPLETED" and it.outcome is not None
    assert (it.outcome.status, it.outcome.error_type) == (499, "client_cancelled")
    assert it.outcome.units == 0


@pytest.mark.parametrize("first", [[], ["start"], ["start", "finish"]])
def test_everything_else_is_illegal(first: list[str]) -> None:
    steps = {
        "start": lambda it: it.start(2.0),
        "finish": lambda it: it.finish(DONE, 3.0),
        "attempt": lambda it: it.attempt(),
        "interrupt": lambda it: it.interrupt(3.0),
        "hand_back": lambda it: it.hand_back(attempted=False),
        "cancel": lambda it: it.drop(Cancelled(), 3.0),
    }
    allowed = {(): {"start", "cancel"}, ("start",): {"finish", "attempt", "interrupt", "hand_back"}}
    for name, step in steps.items():
        it = job()
        for earlier in first:
            steps[earlier](it)
        if name in allowed.get(tuple(first), set()):
            step(it)
        else:
            with pytest.raises(IllegalTransition):
                step(it)


def test_the_outcome_of_an_error_carries_its_type() -> None:
    refused = Outcome.of_error(InputError(("body", "image_url"), "no", "image_load_error"))
    assert (refused.status, refused.error_type, refused.units) == (422, "image_load_error", 0)
    failed = Outcome.of_error(ServiceError(500, "oh", "internal_error"))
    assert (failed.status, failed.error_type, failed.error) == (500, "internal_error", "oh")


def test_a_job_that_must_not_be_retried_fails_the_first_time() -> None:
    it = replace(job(), terms=Terms(retry=False))
    it.start(2.0)
    it.interrupt(3.0)  # it never reached the engine
    it.start(4.0)
    it.attempt()
    it.interrupt(5.0)
    assert it.status == "COMPLETED" and it.outcome is not None
    assert it.outcome.error_type == "runner_disconnected"


def test_a_job_is_overdue_until_it_starts() -> None:
    it = replace(job(), terms=Terms(start_timeout=5.0))
    assert [it.overdue(now) for now in (1.0, 5.9, 6.0)] == [False, False, True]
    it.start(5.0)
    assert not it.overdue(100.0)
    it.started = 50.0  # once more, on another machine
    assert not it.overdue(100.0)
    assert not job().overdue(1e9)
