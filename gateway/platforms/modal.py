"""The platform on Modal: one spawned CPU function call per job, the engine a GPU class.

Modal's queue, retries and seven days of results are the durable part; records say what its API does
not (state, owner, progress). A preempted or doubly delivered input does no harm: the first recorded
outcome wins, and a job that has one is not performed again.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any

import modal

from gateway.addresses import Network
from gateway.decoder import Decoder
from gateway.fetch import Fetcher
from gateway.files import Files
from gateway.jobs import Job, Outcome, request_digest
from gateway.logs import log_entry
from gateway.perform import Services, perform
from gateway.platform import Platform, View
from gateway.platforms.modal_records import Finished, ModalRecords
from gateway.settings import Settings
from gateway.tokens import Tokens
from schemas.errors import ApiError, Cancelled, QueueFull, ServiceError, StartTimeout
from schemas.task import Failure, Progress, Result, Task

logger = logging.getLogger(__name__)

LOST_SECONDS = 30.0
"""Age of an unfinished request from which a look at its status asks Modal whether it still runs."""


WATCH_SECONDS = 0.5
"""How often a watched request is looked at."""

LOST = (
    modal.exception.RemoteError,
    modal.exception.InternalFailure,
    modal.exception.ExecutionError,
    modal.exception.OutputExpiredError,
    modal.exception.DeserializationError,
)
"""What Modal answers about a call that has ended badly. Errors of the connection are not among them."""


class EngineFailure(Exception):
    """The engine's process reported an error; its reason is for our log."""


class ModalPlatform(Platform):
    """`job` is the Modal function that runs `run_job`."""

    signer = None

    def __init__(self, job: Any, records: ModalRecords, files: Files, settings: Settings) -> None:
        self._job, self._records, self.files = job, records, files
        # Every container derives the same: tokens end with the keys they stand for.
        keys = settings.keys.get_secret_value().encode()
        self.tokens = Tokens(hashlib.sha256(b"zimage tokens " + keys).digest())

    async def __aenter__(self) -> ModalPlatform:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing runs here: jobs are Modal's."""

    async def submit(self, job: Job, body: bytes) -> Job:
        limit = job.terms.max_queue_length
        if limit is not None and (await self._job.get_current_stats.aio()).backlog >= limit:
            raise QueueFull(limit)
        await self._records.insert(job)
        if job.terms.idempotency_key is not None:
            request_id = await self._records.claim_key(job, request_digest(job, body))
            if request_id != job.request_id:
                await self._records.forget(job)
                loaded = await self._records.load(request_id)
                if loaded is None:  # refused by Modal a moment ago
                    raise _too_many()
                return loaded[0]
        try:
            call = await self._job.spawn.aio(job, body)
        except modal.exception.ResourceExhaustedError:
            await self._records.forget(job, with_key=True)
            raise _too_many() from None
        await self._records.set_call(job.request_id, call.object_id)
        return job

    async def view(self, request_id: str) -> View | None:
        loaded = await self._records.load(request_id)
        if loaded is None:
            return None
        job, progress = loaded
        if job.overdue(time.time()) and await self._end(request_id, StartTimeout()):
            loaded = await self._records.load(request_id)
            assert loaded is not None
            job, progress = loaded
        old = job.status != "COMPLETED" and time.time() - job.created > LOST_SECONDS
        if old and await self._ended(request_id, timeout=0) is not None:
            loaded = await self._records.load(request_id)
            assert loaded is not None
            job, progress = loaded
        # Modal tells no order within its queue: 0 means "not started".
        return View(job, 0 if job.status == "IN_QUEUE" else None, progress)

    async def watch(self, request_id: str) -> AsyncIterator[View]:
        while view := await self.view(request_id):
            yield view
            if view.job.status == "COMPLETED":
                return
            await asyncio.sleep(WATCH_SECONDS)

    async def outcome(self, request_id: str) -> Outcome | None:
        return await self._records.outcome(request_id)

    async def wait(self, request_id: str) -> Outcome:
        while (outcome := await self._ended(request_id, timeout=None)) is None:
            await asyncio.sleep(WATCH_SECONDS)  # it is being spawned
        return outcome

    async def _ended(self, request_id: str, timeout: float | None) -> Outcome | None:
        """The outcome of the job's function call; None if it takes longer than `timeout` seconds.

        A call that ended without one (out of time, out of memory, retries used up) is recorded as
        lost here, because nobody else can.
        """
        call_id = await self._records.call_id(request_id)
        if call_id is None:
            return None
        try:
            outcome: Outcome = await modal.FunctionCall.from_id(call_id).get.aio(timeout=timeout)
            return outcome
        except TimeoutError:  # the builtin: still running
            return None
        except modal.exception.FunctionTimeoutError:
            lost = ServiceError(504, "The request took too long", "generation_timeout")
        except LOST as error:
            logger.warning("request %s was lost: %r", request_id, error)
            lost = ServiceError(503, "The runner disconnected", "runner_disconnected")
        await self._records.finish(request_id, Finished(Outcome.of_error(lost), time.time(), []))
        return await self._records.outcome(request_id)

    async def cancel(self, request_id: str) -> bool:
        return await self._end(request_id, Cancelled())

    async def _end(self, request_id: str, error: ApiError) -> bool:
        """Record an error as a job's end and stop its call; False if it had ended before."""
        ended = Finished(Outcome.of_error(error), time.time(), [log_entry(str(error))])
        if not await self._records.finish(request_id, ended):
            return False
        if call_id := await self._records.call_id(request_id):
            await modal.FunctionCall.from_id(call_id).cancel.aio()
        return True

    async def ready(self) -> bool:
        return True


def _too_many() -> ServiceError:
    text = "Too many requests are queued; try again later"
    return ServiceError(429, text, "concurrent_requests_limit")


async def run_job(
    job: Job,
    body: bytes,
    *,
    records: ModalRecords,
    files: Files,
    engine: Any,
    settings: Settings,
) -> Outcome:
    """The body of the CPU function: perform a job, record its end, return it as data.

    `engine` is the GPU class's method (request id, task) → Result | Failure.

    Cancelling it (FunctionCall.cancel) cancels the call to the engine, which stops between two steps.
    """
    if outcome := await records.outcome(job.request_id):
        return outcome  # cancelled before it started, or delivered a second time
    if job.overdue(time.time()):
        late = Outcome.of_error(StartTimeout())
        await records.finish(job.request_id, Finished(late, time.time(), []))
        return late
    await records.set_started(job.request_id, time.time())
    logs: list[dict[str, object]] = []

    async def generate(task: Task, on_progress: Callable[[Progress], None]) -> Result:
        call = await engine.spawn.aio(job.request_id, task)
        try:
            result: Result | Failure = await call.get.aio()
        except asyncio.CancelledError:
            await asyncio.shield(call.cancel.aio())
            raise
        if isinstance(result, Failure):
            raise EngineFailure(result.reason)
        return result

    services = Services(
        generate,
        files,
        _fetcher(settings.fetch_allow),
        _decoder(),
        settings.acceleration_default,
        settings.retention,
    )
    outcome = await perform(
        job, body, services, lambda progress: None, lambda text: logs.append(log_entry(text))
    )
    await records.finish(job.request_id, Finished(outcome, time.time(), logs))
    return outcome


@functools.cache
def _fetcher(exceptions: tuple[Network, ...]) -> Fetcher:
    """One for all jobs of a container."""
    return Fetcher(exceptions)


@functools.cache
def _decoder() -> Decoder:
    """One for all jobs of a container, which bounds what they decode at a time."""
    return Decoder()
