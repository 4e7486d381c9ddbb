"""Jobs in a `modal.Dict`: one entry per fact, each written once, so that retries change nothing.

    (id, "job")       the job as accepted
    (id, "call")      Modal's id of the function call that performs it
    (id, "started")   time of its latest start
    (id, "progress")  the only entry that is overwritten
    (id, "outcome")   outcome without body, and logs: the first writer wins
    (id, "body-…")    the outcome's body, written before it under a name of its own

Entries live seven days from their last use. Imports nothing of the gateway's but plain data, so that
the GPU container, which reports progress, needs none of its libraries.
"""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from typing import Any

import modal

from gateway.jobs import Job, Outcome, key_reused
from schemas.task import Progress


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """The end of a job, as recorded; `outcome.body` has an entry of its own."""

    outcome: Outcome
    at: float
    logs: list[dict[str, object]]
    body_name: str = ""


class ModalRecords:
    def __init__(self, entries: modal.Dict) -> None:
        self._entries = entries

    async def insert(self, job: Job) -> None:
        await self._put(job.request_id, "job", job)

    async def claim_key(self, job: Job, digest: str) -> str:
        """The request id that holds the job's Idempotency-Key: its own, or an earlier one's.

        Raises InputError if that was another request.
        """
        entry = (job.key_id, "idempotency", job.terms.idempotency_key)
        mine = (job.request_id, digest)
        if await self._entries.put.aio(entry, mine, skip_if_exists=True):
            return job.request_id
        request_id, earlier = await self._entries.get.aio(entry)
        if earlier != digest:
            raise key_reused()
        return str(request_id)

    async def forget(self, job: Job, with_key: bool = False) -> None:
        """Take back a job that was never started, and its hold on its Idempotency-Key."""
        await self._entries.pop.aio((job.request_id, "job"))
        if with_key and job.terms.idempotency_key is not None:
            await self._entries.pop.aio((job.key_id, "idempotency", job.terms.idempotency_key))

    async def set_call(self, request_id: str, call_id: str) -> None:
        await self._put(request_id, "call", call_id)

    async def call_id(self, request_id: str) -> str | None:
        value: str | None = await self._get(request_id, "call")
        return value

    async def set_started(self, request_id: str, now: float) -> None:
        await self._put(request_id, "started", now)

    async def set_progress(self, request_id: str, progress: Progress) -> None:
        await self._put(request_id, "progress", progress)

    async def finish(self, request_id: str, finished: Finished) -> bool:
        """Record the end; False if another end was recorded before."""
        name = f"body-{uuid.uuid4().hex}"  # of two that race, each keeps its own
        await self._put(request_id, name, finished.outcome.body)
        bare = dataclasses.replace(finished.outcome, body=b"")
        entry = dataclasses.replace(finished, outcome=bare, body_name=name)
        return bool(
            await self._entries.put.aio((request_id, "outcome"), entry, skip_if_exists=True)
        )

    async def finished(self, request_id: str) -> Finished | None:
        value: Finished | None = await self._get(request_id, "outcome")
        return value

    async def outcome(self, request_id: str) -> Outcome | None:
        """The recorded end with its body."""
        finished = await self.finished(request_id)
        if finished is None:
            return None
        body = await self._get(request_id, finished.body_name)
        return dataclasses.replace(finished.outcome, body=body)

    async def load(self, request_id: str) -> tuple[Job, Progress | None] | None:
        """The job in its present state, without the outcome's body."""
        job, started, progress, finished = await asyncio.gather(
            *(self._get(request_id, name) for name in ("job", "started", "progress", "outcome"))
        )
        if job is None:
            return None
        if finished is not None:
            return dataclasses.replace(
                job,
                status="COMPLETED",
                started=started,
                finished=finished.at,
                outcome=finished.outcome,
                logs=finished.logs,
            ), None
        if started is not None:
            return dataclasses.replace(job, status="IN_PROGRESS", started=started), progress
        return job, None

    async def _get(self, request_id: str, name: str) -> Any:
        return await self._entries.get.aio((request_id, name))

    async def _put(self, request_id: str, name: str, value: object) -> None:
        await self._entries.put.aio((request_id, name), value)


class ProgressReporter:
    """Writes the latest progress to the records without holding up the engine.

    At most one write is under way; steps that pass meanwhile are skipped.
    """

    def __init__(self, records: ModalRecords, request_id: str) -> None:
        self._records, self._request_id = records, request_id
        self._writing: asyncio.Task[None] | None = None

    def __call__(self, progress: Progress) -> None:
        if self._writing is None or self._writing.done():
            write = self._records.set_progress(self._request_id, progress)
            self._writing = asyncio.create_task(write)
            # A step that was not reported is no reason for anything.
            self._writing.add_done_callback(lambda task: task.cancelled() or task.exception())
