"""The jobs that wait, those of low priority behind all others, each kind in the order it came.

In memory: whatever waits is on record, and is read again when the process starts.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import NamedTuple

from gateway.jobs import Job


class Turn(NamedTuple):
    low_priority: bool
    sequence: int


class Backlog:
    def __init__(self) -> None:
        self._order: list[tuple[Turn, str]] = []
        self._waiting: dict[str, tuple[Turn, Job]] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Job]:
        for _, request_id in self._order:
            yield self._waiting[request_id][1]

    def add(self, job: Job, sequence: int) -> None:
        """sequence: rises with each job that comes."""
        turn = Turn(job.terms.low_priority, sequence)
        insort(self._order, (turn, job.request_id))
        self._waiting[job.request_id] = turn, job

    def next(self) -> Job | None:
        """Take the job whose turn it is."""
        if not self._order:
            return None
        _, request_id = self._order.pop(0)  # tens of thousands of pointers move in microseconds
        return self._waiting.pop(request_id)[1]

    def get(self, request_id: str) -> Job | None:
        waiting = self._waiting.get(request_id)
        return waiting and waiting[1]

    def position(self, request_id: str) -> int:
        """How many are ahead. Raises KeyError."""
        turn, _ = self._waiting[request_id]
        return bisect_left(self._order, (turn, request_id))

    def remove(self, request_id: str) -> Job | None:
        """Take a job out of its turn; None if it does not wait."""
        if request_id not in self._waiting:
            return None
        del self._order[self.position(request_id)]
        return self._waiting.pop(request_id)[1]
