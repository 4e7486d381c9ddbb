"""The order of the backlog, against the same done slowly."""

from __future__ import annotations

import random

import pytest

from gateway.jobs import Job, Terms
from gateway.platforms.backlog import Backlog


def job(name: str, low: bool = False) -> Job:
    return Job(name, "fal-ai/z-image/turbo", "key", "http://host", 1.0, Terms(low_priority=low))


@pytest.mark.parametrize("seed", range(20))
def test_comes_out_by_priority_then_in_the_order_it_came(seed: int) -> None:
    generator, backlog = random.Random(seed), Backlog()
    expected: list[tuple[bool, int]] = []
    for sequence in range(200):
        low = generator.random() < 0.3
        backlog.add(job(str(sequence), low), sequence)
        expected = sorted([*expected, (low, sequence)])
        if generator.random() < 0.3:
            taken = backlog.next()
            assert taken is not None and taken.request_id == str(expected.pop(0)[1])
        if expected and generator.random() < 0.3:
            gone = expected.pop(generator.randrange(len(expected)))
            removed = backlog.remove(str(gone[1]))
            assert removed is not None and removed.request_id == str(gone[1])
            assert backlog.remove(str(gone[1])) is None and backlog.get(str(gone[1])) is None
        assert [each.request_id for each in backlog] == [str(each[1]) for each in expected]
        assert [backlog.position(each.request_id) for each in backlog] == [*range(len(backlog))]
    while expected:
        taken = backlog.next()
        assert taken is not None and taken.request_id == str(expected.pop(0)[1])
    assert backlog.next() is None and not backlog


def test_an_interrupted_job_has_its_old_place() -> None:
    backlog = Backlog()
    for sequence in (2, 3, 1):
        backlog.add(job(str(sequence)), sequence)
    assert [each.request_id for each in backlog] == ["1", "2", "3"]
