"""Jobs in a `modal.Dict`: one entry per fact, each written once, so that retries change nothing.

    (id, "job")       the job as accepted, and how many requests were ahead of it
    (id, "call")      Modal's id of the function call that performs it
    (id, "engine")    Modal's id of the call of the GPU class that counts, and its task without the
                      picture: the first writer wins
    (id, "started")   time of the latest start on a GPU, and the number of starts
    (id, "progress")  the latest step, and the log of all steps
    (id, "outcome")   outcome without body, and logs: the first writer wins
    (id, "body-…")    the outcome's body, written before it under a name of its own
    (key id, "idempotency", key, n)  who holds an Idempotency-Key; n counts holders that were lost
    ("run", call id)  when a schedule's run was due
    ("restores", …)   how many GPU containers started from their snapshot, how many could not

Entries live until housekeeping deletes them, or seven days from their last use. Their classes have no
slots, so that they are pickled by name and a later version can read them. Imports nothing of the
gateway's but plain data, so that the GPU container needs none of its libraries.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import uuid
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

import modal

from gateway.jobs import Job, Outcome, key_reused
from schemas.task import Progress, Task

Logs = list[dict[str, object]]

_FACTS = ("job", "call", "engine", "started", "progress", "outcome")


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end of a job, as recorded; `outcome.body` has an entry of its own."""

    outcome: Outcome
    at: float
    logs: Logs
    body_name: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """A job in its present state, without the outcome's body. ahead: waiting when it came."""

    job: Job
    ahead: int
    progress: Progress | None = None


class ModalRecords:
    def __init__(self, entries: modal.Dict) -> None:
        self._entries = entries

    async def insert(self, job: Job, ahead: int = 0) -> None:
        await self._put(job.request_id, "job", (job, ahead))

    async def claim_key(self, job: Job, digest: str, lost: Callable[[str], Awaitable[bool]]) -> str:
        """The request id that holds the job's Idempotency-Key: its own, or an earlier one's.

        A holder that `lost` says was never accepted is passed over for good, by all alike. Raises
        InputError if the holder was another request.
        """
        for n in itertools.count():
            mine = (job.request_id, digest)
            if await self._entries.put.aio(_key_entry(job, n), mine, skip_if_exists=True):
                return job.request_id
            holder = await self._entries.get.aio(_key_entry(job, n))
            if holder is None:  # forgotten this moment
                continue
            request_id, earlier = holder
            if request_id != job.request_id and await lost(request_id):
                continue
            if earlier != digest:
                raise key_reused()
            return str(request_id)
        raise AssertionError

    async def delete(self, job: Job) -> None:
        """Forget a job, and its hold on its Idempotency-Key."""
        finished = await self.finished(job.request_id)
        names = (*_FACTS, finished.body_name) if finished else _FACTS
        await asyncio.gather(*(self._pop((job.request_id, name)) for name in names))
        if job.terms.idempotency_key is not None:
            for n in itertools.count():
                holder = await self._entries.get.aio(_key_entry(job, n))
                if holder is None or holder[0] == job.request_id:
                    await self._pop(_key_entry(job, n))
                    break

    async def set_call(self, request_id: str, call_id: str) -> None:
        await self._put(request_id, "call", call_id)

    async def claim_engine(self, request_id: str, call_id: str, task: Task) -> str:
        """The one call of the GPU class that counts: this one, or an earlier one's id."""
        entry = (request_id, "engine")
        mine = (call_id, dataclasses.replace(task, image=None, mask=None))
        if await self._entries.put.aio(entry, mine, skip_if_exists=True):
            return call_id
        return str((await self._entries.get.aio(entry))[0])

    async def engine_call(self, request_id: str) -> tuple[str, Task] | None:
        """The call of the GPU class that counts, and what it was asked, without the picture."""
        found: tuple[str, Task] | None = await self._get(request_id, "engine")
        return found

    async def due(self, call_id: str, at: datetime) -> datetime:
        """When a schedule's run was due: as its first attempt saw it."""
        entry = ("run", call_id)
        if await self._entries.put.aio(entry, at, skip_if_exists=True):
            return at
        first: datetime = await self._entries.get.aio(entry)
        return first

    async def call_id(self, request_id: str) -> str | None:
        value: str | None = await self._get(request_id, "call")
        return value

    async def start(self, request_id: str, now: float) -> int:
        """The job begins on a GPU; returns how often it has, this time included."""
        started = await self._get(request_id, "started")
        attempt = 1 if started is None else int(started[1]) + 1
        await self._put(request_id, "started", (now, attempt))
        return attempt

    async def set_progress(self, request_id: str, progress: Progress, logs: Logs) -> None:
        await self._put(request_id, "progress", (progress, logs))

    async def progress(self, request_id: str) -> tuple[Progress | None, Logs]:
        found: tuple[Progress, Logs] | None = await self._get(request_id, "progress")
        return found or (None, [])

    async def finish(self, request_id: str, finished: Finished) -> bool:
        """Record the end; False if another end was recorded before."""
        name = f"body-{uuid.uuid4().hex}"  # of two that race, each keeps its own
        await self._put(request_id, name, finished.outcome.body)
        bare = dataclasses.replace(finished.outcome, body=b"")
        entry = dataclasses.replace(finished, outcome=bare, body_name=name)
        if await self._entries.put.aio((request_id, "outcome"), entry, skip_if_exists=True):
            return True
        recorded = await self.finished(request_id)
        if recorded is not None and recorded.body_name == name:
            return True  # written before, and the answer to that was lost on its way
        await self._pop((request_id, name))
        return False

    async def finished(self, request_id: str) -> Finished | None:
        value: Finished | None = await self._get(request_id, "outcome")
        return value

    async def outcome(self, request_id: str) -> Outcome | None:
        """The recorded end with its body."""
        finished = await self.finished(request_id)
        if finished is None:
            return None
        body = await self._get(request_id, finished.body_name)
        return None if body is None else dataclasses.replace(finished.outcome, body=body)

    async def load(self, request_id: str) -> Loaded | None:
        accepted, started, (progress, logs), finished = await asyncio.gather(
            self._get(request_id, "job"),
            self._get(request_id, "started"),
            self.progress(request_id),
            self.finished(request_id),
        )
        if accepted is None:
            return None
        job, ahead = accepted
        begun, attempts = started or (None, 0)
        if finished is not None:
            job = dataclasses.replace(
                job,
                status="COMPLETED",
                started=begun,
                attempts=attempts,
                finished=finished.at,
                outcome=finished.outcome,
                logs=finished.logs,
            )
            return Loaded(job, ahead)
        if begun is not None:
            job = dataclasses.replace(
                job, status="IN_PROGRESS", started=begun, attempts=attempts, logs=logs
            )
            return Loaded(job, ahead, progress)
        return Loaded(job, ahead)

    async def count_restore(self, mode: str, served: bool) -> None:
        """A GPU container is ready. Two at once may count as one: a figure for people."""
        entry = ("restores", f"{mode}: {'served' if served else 'reloaded'}")
        await self._entries.put.aio(entry, await self._entries.get.aio(entry, 0) + 1)

    async def restores(self, mode: str) -> tuple[int, int]:
        """How many started well, and how many had to load anew."""
        counts = [
            int(await self._entries.get.aio(("restores", f"{mode}: {word}"), 0))
            for word in ("served", "reloaded")
        ]
        return counts[0], counts[1]

    async def _get(self, request_id: str, name: str) -> Any:
        return await self._entries.get.aio((request_id, name))

    async def _put(self, request_id: str, name: str, value: object) -> None:
        await self._entries.put.aio((request_id, name), value)

    async def _pop(self, entry: object) -> None:
        await self._entries.pop.aio(entry, None)


def _key_entry(job: Job, n: int) -> tuple[str, str, str | None, int]:
    return (job.key_id, "idempotency", job.terms.idempotency_key, n)
