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
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

import modal

from gateway.jobs import MAX_ATTEMPTS, Job, Outcome, key_reused
from gateway.logs import log_entry, progress_message
from schemas.task import Failure, Progress, Result, Task

logger = logging.getLogger(__name__)

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
        mine = (call_id, dataclasses.replace(task, image=None))
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


class ProgressReporter:
    """Writes progress to the records without holding up the engine.

    At most one write is under way; the next one tells of all steps that have passed meanwhile.
    """

    def __init__(self, records: ModalRecords, request_id: str) -> None:
        self._records, self._request_id = records, request_id
        self._latest: Progress | None = None
        self._logs: Logs = []
        self._writing: asyncio.Task[None] | None = None

    def __call__(self, progress: Progress) -> None:
        self._latest = progress
        self._logs.append(log_entry(progress_message(progress)))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())

    async def _write(self) -> None:
        try:
            while (told := self._latest) is not None:
                await self._records.set_progress(self._request_id, told, list(self._logs))
                if self._latest is told:
                    break
        except Exception as error:  # a step that was not reported is no reason for anything
            logger.warning("progress of %s could not be written: %r", self._request_id, error)
        finally:
            self._writing = None

    async def close(self) -> None:
        """Wait until the last step is written."""
        if self._writing is not None:
            await self._writing


class EngineBroken(Exception):
    """The GPU does not work any more: tells Modal to run the task in another container."""


async def generate(
    job: Job,
    task: Task,
    call_id: str,
    records: ModalRecords,
    engine: Callable[[Task, Callable[[Progress], None]], Awaitable[Result]],
    healthy: Callable[[], Awaitable[bool]],
) -> Result | Failure:
    """What the GPU class does with a job in the call `call_id`. Answers errors as data: its caller has
    no torch.

    A job that ended meanwhile, has another call, or came too late, costs no GPU time; one that has
    taken its container down as often as it may is not tried again. After an error the engine is
    asked whether it is `healthy`; raises EngineBroken if it is not.
    """
    now = time.time()
    if await records.finished(job.request_id):
        return Failure("the job has ended", "ended")
    if await records.claim_engine(job.request_id, call_id, task) != call_id:
        return Failure("the job has another call", "ended")
    attempt = await records.start(job.request_id, now)
    if attempt == 1 and job.overdue(now):
        return Failure("the caller does not wait any longer", "late")
    if attempt > (MAX_ATTEMPTS if job.terms.retry else 1):
        return Failure(f"The runner disconnected {attempt - 1} times", "lost")
    report = ProgressReporter(records, job.request_id)
    try:
        result = await engine(task, report)
        await report.close()
        return result
    except Exception as error:
        logger.exception("request %s failed", job.request_id)
        if await healthy():
            return Failure(f"{type(error).__name__}: {error}")
        raise EngineBroken(repr(error)) from None
