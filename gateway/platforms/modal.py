"""The platform on Modal: one spawned CPU function call per job, the engine a GPU class.

Modal's queue, retries and seven days of results are the durable part; records say what its API does
not (state, owner, progress). A preempted or doubly delivered input does no harm: the first recorded
outcome wins, a job that has one is not performed again, and a job whose CPU function was preempted
goes on with the GPU call that it had.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator
from types import TracebackType

import modal

from gateway.jobs import Job, Outcome, disconnected, request_digest
from gateway.logs import log_entry
from gateway.platform import Platform, View
from gateway.platforms.modal_parts import UNREACHED, Parts, lost
from gateway.platforms.modal_records import Finished, Loaded
from gateway.settings import Settings
from gateway.signing import SecretSigner
from gateway.tokens import Tokens
from schemas.errors import ApiError, Cancelled, QueueFull, ServiceError, StartTimeout

logger = logging.getLogger(__name__)

LOST_SECONDS = 30.0
"""Age of an unfinished request from which a look at its status asks Modal whether it still runs."""

WATCH_SECONDS = (0.1, 2.0)
"""Pause before a watched request is looked at again: at first, and at most; a tenth longer each time."""

CLAIM_SECONDS = 0.2
"""How often the earlier of two requests with one Idempotency-Key is looked for."""

BACKLOG_SECONDS = 1.0
"""For how long the length of the queue is believed."""


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
            functions = (self._functions.job, *self._functions.engines.values())
            stats = await asyncio.gather(*(each.get_current_stats.aio() for each in functions))
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


def _too_many() -> ServiceError:
    text = "Too many requests are queued; try again later"
    return ServiceError(429, text, "concurrent_requests_limit")
