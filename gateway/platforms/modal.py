"""The platform on Modal: one spawned CPU function call per job, the engine a GPU class.

Modal's queue, retries and seven days of results are the durable part; records say what its API does
not (state, owner, progress). A preempted or doubly delivered input does no harm: the first recorded
outcome wins, a job that has one is not performed again, and a job whose CPU function was preempted
goes on with the GPU call that it had.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import modal

from gateway.addresses import Network
from gateway.auth import Keys
from gateway.decoder import Decoder
from gateway.fetch import Fetcher
from gateway.jobs import Job, Outcome, disconnected, request_digest
from gateway.logs import log_entry
from gateway.perform import Services, perform
from gateway.platform import Platform, View
from gateway.platforms.modal_files import VolumeFiles
from gateway.platforms.modal_ledger import Ledger
from gateway.platforms.modal_records import Finished, Loaded, Logs, ModalRecords
from gateway.schedules import Ran, Schedule, check_keys, run
from gateway.settings import Settings
from gateway.signing import SecretSigner
from gateway.tokens import Tokens
from gateway.webhooks import Webhooks
from schemas.errors import ApiError, Cancelled, QueueFull, ServiceError, StartTimeout
from schemas.task import Failure, Progress, Result, Task

logger = logging.getLogger(__name__)

LOST_SECONDS = 30.0
"""Age of an unfinished request from which a look at its status asks Modal whether it still runs."""

WATCH_SECONDS = (0.1, 2.0)
"""Pause before a watched request is looked at again: at first, and at most; a tenth longer each time."""

YIELD_SECONDS = 1.0
"""How often a request of low priority looks whether others wait for a GPU."""

CLAIM_SECONDS = 0.2
"""How often the earlier of two requests with one Idempotency-Key is looked for."""

BACKLOG_SECONDS = 1.0
"""For how long the length of the queue is believed."""

UNREACHED = (
    modal.exception.ConnectionError,
    modal.exception.ServiceError,
    modal.exception.InternalError,
    modal.exception.ResourceExhaustedError,
    modal.exception.ClientClosed,
    modal.exception.AuthError,
)
"""Modal's servers could not be asked. Whatever else a look at a call raises is what the call raised, or
that it is gone; jobs raise nothing of these, see JobFailed."""


class JobFailed(Exception):
    """What a job's function raises whatever went wrong, so that nobody takes it for a failure to ask."""


class EngineFailure(Exception):
    """The engine's process reported an error; its reason is for our log."""


@dataclasses.dataclass(frozen=True, slots=True)
class Functions:
    """The app's functions: `job` runs `run_job`, `webhook` runs `deliver`, `engine` is the GPU class's
    method, which runs `modal_records.generate`."""

    job: Any
    engine: Any
    webhook: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """What the app has deployed: functions; Dicts of requests and of what is to be done about them;
    Volumes of pictures, of usage, and of what schedules make."""

    functions: Functions
    entries: modal.Dict
    tasks: modal.Dict
    pictures: modal.Volume
    usage: modal.Volume
    scheduled: modal.Volume

    @property
    def records(self) -> ModalRecords:
        return ModalRecords(self.entries)

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.tasks)

    @property
    def files(self) -> VolumeFiles:
        return VolumeFiles(self.pictures)


class ModalPlatform(Platform):
    def __init__(self, parts: Parts, settings: Settings) -> None:
        self._functions, self._records, self._ledger = parts.functions, parts.records, parts.ledger
        self.files, self._settings = parts.files, settings
        self.signer = SecretSigner.parse(settings.webhook_key.get_secret_value())
        # Every container derives the same: tokens end with the keys they stand for.
        keys = settings.keys.get_secret_value().encode()
        self.tokens = Tokens(hashlib.sha256(b"zimage tokens " + keys).digest())
        self._backlog_seen = (0.0, 0)

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
        ahead = await self._backlog()
        limit = job.terms.max_queue_length
        if limit is not None and ahead >= limit:
            raise QueueFull(limit)
        if job.terms.idempotency_key is not None:
            digest = request_digest(job, body)
            holder = await self._records.claim_key(job, digest, self._never_accepted)
            if holder != job.request_id and (earlier := await self._kept(holder)):
                return earlier.job
        await self._records.insert(job, ahead)
        await self._ledger.open(job)
        try:
            call = await self._functions.job.spawn.aio(job, body)
        except modal.exception.ResourceExhaustedError:
            await self._ledger.forget(job.request_id)
            await self._records.delete(job)
            raise _too_many() from None
        await self._records.set_call(job.request_id, call.object_id)
        return job

    async def _never_accepted(self, request_id: str) -> bool:
        """Whether a request that is claimed to be on its way never arrives; waits until that is clear."""
        for _ in range(int(LOST_SECONDS / CLAIM_SECONDS)):
            if await self._records.call_id(request_id) is not None:
                return await self._kept(request_id) is None
            await asyncio.sleep(CLAIM_SECONDS)
        return True

    async def _backlog(self) -> int:
        """How many inputs wait for a CPU or a GPU; a second old at most."""
        seen, backlog = self._backlog_seen
        if time.monotonic() - seen > BACKLOG_SECONDS:
            both = (self._functions.job, self._functions.engine)
            stats = await asyncio.gather(*(each.get_current_stats.aio() for each in both))
            backlog = sum(each.backlog for each in stats)
            self._backlog_seen = (time.monotonic(), backlog)
        return backlog

    async def view(self, request_id: str) -> View | None:
        loaded = await self._kept(request_id)
        if loaded is None:
            return None
        job, now = loaded.job, time.time()
        if job.overdue(now) and await self._end(request_id, StartTimeout()):
            loaded = await self._records.load(request_id)
        elif job.status != "COMPLETED" and now - job.created > LOST_SECONDS:
            if await self._records.call_id(request_id) is None:  # killed while it was accepted
                await self._end(request_id, disconnected())
            if await self._ended(request_id, timeout=0) is not None:
                loaded = await self._records.load(request_id)
        if loaded is None:
            return None
        position = None
        if loaded.job.status == "IN_QUEUE":
            # Modal tells no order within its queue; nobody came before who was not there then.
            position = min(loaded.ahead, await self._backlog())
        return View(loaded.job, position, loaded.progress)

    async def _kept(self, request_id: str) -> Loaded | None:
        """What is known of a request, until its time is over."""
        loaded = await self._records.load(request_id)
        if loaded is None:
            return None
        end = loaded.job.forget_at(self._settings.retention)
        return loaded if end is None or time.time() < end else None

    async def watch(self, request_id: str) -> AsyncIterator[View]:
        pause, longest = WATCH_SECONDS
        while view := await self.view(request_id):
            yield view
            if view.job.status == "COMPLETED":
                return
            await asyncio.sleep(pause)
            pause = min(1.1 * pause, longest)

    async def outcome(self, request_id: str) -> Outcome | None:
        return await self._records.outcome(request_id) if await self._kept(request_id) else None

    async def wait(self, request_id: str) -> Outcome:
        loaded = await self._records.load(request_id)
        patience = loaded.job.terms.start_timeout if loaded else None
        if patience is not None:
            if outcome := await self._ended(request_id, patience):
                return outcome
            await self.view(request_id)  # which ends what has not begun by now
        while (outcome := await self._ended(request_id, timeout=None)) is None:
            await asyncio.sleep(WATCH_SECONDS[0])  # it is being spawned
        return outcome

    async def _ended(self, request_id: str, timeout: float | None) -> Outcome | None:
        """The outcome of the job's function call; None if it takes longer than `timeout` seconds.

        A call that ended without one (out of time, out of memory, retries used up) is recorded as
        lost here, because nobody else can.
        """
        call_id = await self._records.call_id(request_id)
        if call_id is None:
            return await self._records.outcome(request_id)
        try:
            outcome: Outcome = await modal.FunctionCall.from_id(call_id).get.aio(timeout=timeout)
            return outcome
        except TimeoutError:  # the builtin: still running
            return None
        except UNREACHED:
            raise
        except (Exception, modal.exception.InputCancellation) as error:
            logger.warning("request %s was lost: %r", request_id, error)
            await self._end(request_id, lost(error))
        return await self._records.outcome(request_id)

    async def cancel(self, request_id: str) -> bool:
        return await self._end(request_id, Cancelled())

    async def _end(self, request_id: str, error: ApiError) -> bool:
        """Record an error as a job's end and stop its calls; False if it had ended before."""
        ended = Finished(Outcome.of_error(error), time.time(), [log_entry(str(error))])
        if not await self._records.finish(request_id, ended):
            return False
        engine_call = await self._records.engine_call(request_id)
        for call_id in (await self._records.call_id(request_id), engine_call and engine_call[0]):
            if call_id is not None:
                await modal.FunctionCall.from_id(call_id).cancel.aio()
        await self._ledger.announce(request_id, self._functions.webhook)
        return True

    async def ready(self) -> bool:
        return True


def lost(error: BaseException) -> ServiceError:
    """What a caller learns of a call that Modal has given up."""
    if isinstance(error, modal.exception.FunctionTimeoutError):
        return ServiceError(504, "The request took too long", "generation_timeout")
    return disconnected()


def _too_many() -> ServiceError:
    text = "Too many requests are queued; try again later"
    return ServiceError(429, text, "concurrent_requests_limit")


async def run_job(job: Job, body: bytes, parts: Parts, settings: Settings) -> Outcome:
    """The body of the CPU function: perform a job, record its end, return it as data.

    Raises JobFailed where Modal is to repeat it.
    """
    try:
        return await _run_job(job, body, parts, settings)
    except Exception as error:
        logger.exception("request %s is to be performed again", job.request_id)
        raise JobFailed(repr(error)) from None


async def _run_job(job: Job, body: bytes, parts: Parts, settings: Settings) -> Outcome:
    records, engine = parts.records, parts.functions.engine
    if call_id := modal.current_function_call_id():
        await records.set_call(job.request_id, call_id)  # whoever spawned it may be gone
    outcome = await records.outcome(job.request_id)
    if outcome is None:  # else cancelled before it started, or delivered a second time
        logs: Logs = []
        services = Services(
            functools.partial(_generate, job, records, engine),
            parts.files,
            _fetcher(settings.fetch_allow),
            _decoder(),
            settings.acceleration_default,
            settings.retention,
            resume=functools.partial(_resume, job, records),
            transient=(modal.exception.Error,),
        )
        outcome = await perform(
            job, body, services, lambda progress: None, lambda text: logs.append(log_entry(text))
        )
        _, steps = await records.progress(job.request_id)
        logs = sorted(logs + steps, key=lambda entry: str(entry["timestamp"]))
        if not await records.finish(job.request_id, Finished(outcome, time.time(), logs)):
            outcome = await records.outcome(job.request_id) or outcome
    await parts.ledger.announce(job.request_id, parts.functions.webhook)
    return outcome


async def deliver(request_id: str, parts: Parts, settings: Settings) -> str:
    """The body of the webhook function: one attempt, whose answer is returned or, if Modal is to
    repeat it, raised."""
    signer = SecretSigner.parse(settings.webhook_key.get_secret_value())
    webhooks = Webhooks(signer, settings.fetch_allow) if signer else None
    try:
        return await parts.ledger.deliver(request_id, parts.records, webhooks)
    finally:
        if webhooks is not None:
            await webhooks.close()


async def run_schedule(
    schedule: Schedule, parts: Parts, settings: Settings, origin: str
) -> list[Ran]:
    """The body of a schedule's cron: the run that was due last when it was first called. Repeated, it
    makes nothing twice."""
    at = schedule.due(datetime.now(UTC))
    if call_id := modal.current_function_call_id():
        at = await parts.records.due(call_id, at)
    check_keys([schedule], Keys.parse(settings.keys.get_secret_value()))
    platform = ModalPlatform(parts, settings)
    return await run(platform, schedule, at, origin, VolumeFiles(parts.scheduled).save)


async def _generate(
    job: Job,
    records: ModalRecords,
    engine: Any,
    task: Task,
    on_progress: Callable[[Progress], None],
) -> Result:
    """Call the GPU class and wait. It reports progress to the records, not here."""
    while job.terms.low_priority and (await engine.get_current_stats.aio()).backlog:
        await asyncio.sleep(YIELD_SECONDS)
    while True:
        try:
            call = await engine.spawn.aio(job, task)
            break
        except modal.exception.ResourceExhaustedError:
            await asyncio.sleep(YIELD_SECONDS)  # this job is accepted: it waits
    call_id = await records.claim_engine(job.request_id, call.object_id, task)
    if call_id != call.object_id:
        await call.cancel.aio()
    return await _result(call_id)


async def _resume(job: Job, records: ModalRecords) -> tuple[Task, Result] | None:
    """The GPU's part of a job whose CPU function was preempted: its call goes on without it."""
    found = await records.engine_call(job.request_id)
    return None if found is None else (found[1], await _result(found[0]))


async def _result(call_id: str) -> Result:
    """What a call of the GPU class answers. Cancelling this leaves the call alone: whoever cancels a
    request cancels both, and a preempted job must not take its GPU call with it."""
    try:
        result: Result | Failure = await modal.FunctionCall.from_id(call_id).get.aio()
    except UNREACHED:
        raise
    except (Exception, modal.exception.InputCancellation) as error:
        raise lost(error) from error
    if isinstance(result, Result):
        return result
    match result.kind:
        case "ended":
            raise Cancelled
        case "late":
            raise StartTimeout
        case "lost":
            raise disconnected(result.reason)
    raise EngineFailure(result.reason)


@functools.cache
def _fetcher(exceptions: tuple[Network, ...]) -> Fetcher:
    """One for all jobs of a container."""
    return Fetcher(exceptions)


@functools.cache
def _decoder() -> Decoder:
    """One for all jobs of a container, which bounds what they decode at a time."""
    return Decoder()
