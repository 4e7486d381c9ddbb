"""Records of requests in a real `modal.Dict`, through Modal's own client."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable

import modal
import pytest
from modal_proto import api_pb2 as api

from gateway.jobs import Job, Outcome, Terms
from gateway.platforms.modal_engine import EngineBroken, ProgressReporter, generate
from gateway.platforms.modal_ledger import Entry, Pending
from gateway.platforms.modal_records import (
    Finished,
    Loaded,
    ModalRecords,
)
from gateway.webhooks import Delivery
from schemas.errors import Cancelled, InputError
from schemas.task import Failure, Progress, Result, Task
from tests.modal.control_plane import control_plane

JOB = Job("r1", "fal-ai/z-image/turbo", "alice", "https://host", created=1.0)
DONE = Finished(Outcome(200, b'{"images": []}', units=0.5, inference_time=0.4), 9.0, [])
STEP = Progress(step=3, steps=8, image=1, images=2)


def with_records(scenario: Callable[[ModalRecords], Awaitable[None]]) -> None:
    async def run(url: str) -> None:
        client = modal.Client(url, api.CLIENT_TYPE_CLIENT, ("ak-test", "as-test"))
        async with client:
            entries = modal.Dict.from_name("records", create_if_missing=True, client=client)
            await scenario(ModalRecords(entries))

    with control_plane() as (_, url):
        asyncio.run(run(url))


def test_a_job_is_what_its_entries_say() -> None:
    async def scenario(records: ModalRecords) -> None:
        assert await records.load("r1") is None
        assert await records.call_id("r1") is None
        await records.insert(JOB)
        await records.set_call("r1", "fc-1")
        assert await records.load("r1") == Loaded(JOB, 0)
        assert await records.call_id("r1") == "fc-1"

        assert await records.start("r1", 2.0) == 1
        await records.set_progress("r1", STEP, [])
        loaded = await records.load("r1")
        assert loaded is not None
        job, progress = loaded.job, loaded.progress
        assert (job.status, job.started, progress) == ("IN_PROGRESS", 2.0, STEP)
        assert await records.outcome("r1") is None

        assert await records.finish("r1", DONE)
        loaded = await records.load("r1")
        assert loaded is not None
        job, progress = loaded.job, loaded.progress
        assert (job.status, job.started, job.finished, progress) == ("COMPLETED", 2.0, 9.0, None)
        assert job.outcome is not None and (job.outcome.units, job.outcome.body) == (0.5, b"")
        assert await records.outcome("r1") == DONE.outcome

    with_records(scenario)


def test_the_first_end_of_a_job_is_its_end() -> None:
    async def scenario(records: ModalRecords) -> None:
        cancelled = Finished(Outcome.of_error(Cancelled()), 3.0, [])
        for first, second in ((cancelled, DONE), (DONE, cancelled)):
            request_id = str(first.outcome.status)
            await records.insert(JOB)
            assert await records.finish(request_id, first)
            assert not await records.finish(request_id, second)
            assert await records.outcome(request_id) == first.outcome

    with_records(scenario)


def test_an_end_whose_acknowledgement_was_lost_keeps_its_body() -> None:
    """The client repeats a write whose answer did not arrive; then it is told "there was one before"."""

    async def scenario(records: ModalRecords) -> None:
        await records.insert(JOB)
        put = records._entries.put.aio

        async def put_twice(key: object, value: object, skip_if_exists: bool = False) -> bool:
            if skip_if_exists:
                await put(key, value, skip_if_exists=True)
            return bool(await put(key, value, skip_if_exists=skip_if_exists))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(records._entries.put, "aio", put_twice)
            assert await records.finish("r1", DONE)
        assert await records.outcome("r1") == DONE.outcome

    with_records(scenario)


def test_a_key_is_held_by_one_of_many() -> None:
    async def scenario(records: ModalRecords) -> None:
        gone: set[str] = set()

        async def lost(request_id: str) -> bool:
            return request_id in gone

        def job(name: str) -> Job:
            return dataclasses.replace(JOB, request_id=name, terms=Terms(idempotency_key="k"))

        async def claim(name: str) -> str:
            return await records.claim_key(job(name), "digest", lost)

        first = await claim("a")
        assert first == "a" == await claim("b") == await claim("a")
        with pytest.raises(InputError):
            await records.claim_key(job("b"), "other", lost)
        gone.add("a")  # it was never accepted
        holders = await asyncio.gather(*(claim(name) for name in "cdefgh"))
        assert len(set(holders)) == 1
        (holder,) = set(holders)
        await records.delete(job(holder))
        assert await claim("z") == "z"

    with_records(scenario)


def test_the_gpu_class_spends_nothing_on_a_job_that_is_not_its() -> None:
    task = Task("x", 64, 64, 1, 1.0, 0, 1)
    result = Result((), 0, "x", 1, {"inference": 0.1})
    asked: list[Task] = []

    async def engine(task: Task, on_progress: Callable[[Progress], None]) -> Result:
        asked.append(task)
        if task.prompt == "broken":
            raise RuntimeError("CUDA error")
        return result

    async def well() -> bool:
        return True

    async def ill() -> bool:
        return False

    async def scenario(records: ModalRecords) -> None:
        async def run(job: Job, call_id: str, task: Task = task) -> Result | Failure:
            return await generate(job, task, call_id, records, engine, well)

        assert await run(JOB, "fc-1") == result
        assert await run(JOB, "fc-2") == Failure("the job has another call", "ended")
        late = dataclasses.replace(JOB, request_id="r2", terms=Terms(start_timeout=1.0))
        assert (await run(late, "fc-3")).kind == "late"  # type: ignore[union-attr]
        once = dataclasses.replace(JOB, request_id="r3", terms=Terms(retry=False))
        assert await run(once, "fc-4") == result
        assert await run(once, "fc-4") == Failure("The runner disconnected 1 times", "lost")
        await records.finish("r4", DONE)
        over = dataclasses.replace(JOB, request_id="r4")
        assert (await run(over, "fc-5")).kind == "ended"  # type: ignore[union-attr]
        assert len(asked) == 2

        broken = dataclasses.replace(task, prompt="broken")
        failing = dataclasses.replace(JOB, request_id="r5")
        assert await run(failing, "fc-6", broken) == Failure("RuntimeError: CUDA error")
        with pytest.raises(EngineBroken):  # so that another container gets it
            await generate(failing, broken, "fc-6", records, engine, ill)

    with_records(scenario)


def test_what_is_written_today_can_be_read_by_a_later_version() -> None:
    """By name, with defaults for what is missing."""
    for value in (
        JOB,
        DONE,
        DONE.outcome,
        Terms(),
        Entry("r1"),
        Pending(Delivery("r", "u", "x", 0)),
    ):
        state = value.__reduce_ex__(4)[2]
        assert isinstance(state, dict), type(value)


def test_progress_is_reported_without_holding_up_the_engine() -> None:
    async def scenario(records: ModalRecords) -> None:
        await records.insert(JOB)
        await records.start("r1", 2.0)
        report = ProgressReporter(records, "r1")
        for step in range(1, 9):
            report(Progress(step, 8, 1, 1))  # returns at once; one write is under way at a time
        await report.close()
        loaded = await records.load("r1")
        assert loaded is not None and loaded.progress == Progress(8, 8, 1, 1)
        assert [entry["message"] for entry in loaded.job.logs][-1] == "image 1/1: step 8/8"
        assert len(loaded.job.logs) == 8

    with_records(scenario)
