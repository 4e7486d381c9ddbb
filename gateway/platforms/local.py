"""The platform of one process: jobs in SQLite, files in a directory, the engine beside the event loop.

Survives kill -9: a job is on disk before it is accepted, and one that was running goes back to the
queue at the next start.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import suppress
from types import TracebackType

from gateway.decoder import Decoder
from gateway.fetch import Fetcher
from gateway.files import DirectoryFiles
from gateway.jobs import Job, Outcome
from gateway.loras import LoraStore
from gateway.platform import Platform, View
from gateway.platforms import home
from gateway.platforms.outbox import Outbox
from gateway.platforms.records import Records
from gateway.platforms.runs import Runs
from gateway.services import GenerateAsync, Services
from gateway.settings import Settings
from gateway.signing import DirectorySigner
from gateway.tokens import Tokens
from gateway.webhooks import Delivery, Webhooks
from schemas.errors import ApiError, Cancelled, StartTimeout

POSITION_SECONDS = 1.0
"""How often watchers of queued requests look at their position."""

CHECKPOINT_SECONDS = 0.25
SWEEP_SECONDS = 60.0
RETRY_SECONDS = 1.0

logger = logging.getLogger(__name__)


class LocalPlatform(Platform):
    """Takes the home for itself. Raises HomeInUse if another process has it."""

    _records: Records
    _runs: Runs

    def __init__(self, settings: Settings, generate: GenerateAsync) -> None:
        self._settings, self._generate = settings, generate
        self._lock = home.take(settings.home)
        self.files = DirectoryFiles(settings.home / "files")
        self.tokens = Tokens(home.secret(settings.home / "token-key"))
        self.signer = DirectorySigner(settings.home / "webhook-keys", time.time())
        self._fetcher = Fetcher(settings.fetch_allow)
        self._decoder = Decoder()
        self._stopping = False
        self._awaited: defaultdict[str, list[asyncio.Future[Outcome]]] = defaultdict(list)
        self._watchers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> LocalPlatform:
        self._records = Records(self._settings.home)
        services = Services(
            self._generate,
            self.files,
            self._fetcher,
            self._decoder,
            LoraStore(self._settings.lora_directory, self._fetcher, self.files),
            self._settings.acceleration_default,
            self._settings.retention,
        )
        self._runs = Runs(self._records, services, self._changed, self._ended)
        webhooks = Webhooks(self.signer, self._settings.fetch_allow)
        self._outbox = Outbox(self._records, webhooks)
        for job in self._records.resume(time.time()):
            logger.warning("request %s was interrupted, now %s", job.request_id, job.status)
        if waiting := len(self._records.backlog):
            logger.info("%d requests from before are waiting and begin now", waiting)
        for job in [*self._records.backlog]:
            self._expire_later(job)
        self._runs.begin()
        self._tasks = [
            asyncio.create_task(work)
            for work in (self._housekeeping(), self._checkpoints(), self._outbox.run())
        ]
        self._warming = asyncio.create_task(self._decoder.warm_up())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop between two steps. Jobs in progress go back to the queue and run at the next start."""
        self._stopping = True
        await self._runs.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._outbox.close()
        await self._fetcher.close()
        await asyncio.gather(self._warming, return_exceptions=True)
        await self._decoder.close()
        self._records.close()
        self._lock.close()

    async def submit(self, job: Job, body: bytes) -> Job:
        accepted = await self._records.insert(job, body, self._runs.begin)
        if accepted is job:
            self._expire_later(job)
        return accepted

    def _expire_later(self, job: Job) -> None:
        """End a job that has not started when its caller's patience is over."""
        if job.deadline is not None:
            delay = max(0.0, job.deadline - time.time())
            asyncio.get_running_loop().call_later(delay, self._expire, job.request_id)

    def _expire(self, request_id: str) -> None:
        try:
            self._drop(request_id, StartTimeout())
        except sqlite3.Error:
            logger.exception("request %s is late and cannot be dropped, trying again", request_id)
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self._expire, request_id)

    def _drop(self, request_id: str, error: ApiError) -> bool:
        """End a job that is still queued."""
        if self._stopping or not (job := self._records.drop_queued(request_id, error, time.time())):
            return False
        assert job.outcome is not None
        self._ended(job, job.outcome)
        return True

    async def view(self, request_id: str) -> View | None:
        if run := self._runs.get(request_id):
            return View(run.job, progress=run.progress)
        if job := self._records.backlog.get(request_id):
            return View(job, position=self._records.backlog.position(request_id))
        job = self._records.get(request_id)
        return View(job) if job else None

    async def watch(self, request_id: str) -> AsyncIterator[View]:
        changed = asyncio.Event()
        self._watchers[request_id].add(changed)
        try:
            while view := await self.view(request_id):
                yield view
                if view.job.status == "COMPLETED":
                    return
                with suppress(TimeoutError):
                    queued = view.job.status == "IN_QUEUE"
                    async with asyncio.timeout(POSITION_SECONDS if queued else None):
                        await changed.wait()
                changed.clear()
        finally:
            self._watchers[request_id].discard(changed)
            if not self._watchers[request_id]:
                del self._watchers[request_id]

    def _changed(self, request_id: str) -> None:
        for changed in self._watchers.get(request_id, ()):
            changed.set()

    async def outcome(self, request_id: str) -> Outcome | None:
        return await self._records.outcome(request_id)

    async def wait(self, request_id: str) -> Outcome:
        if self._runs.get(request_id) or self._records.backlog.get(request_id):
            end: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
            self._awaited[request_id].append(end)
            return await end
        outcome = await self._records.outcome(request_id)
        if outcome is None:
            raise LookupError(f"no request {request_id}")
        return outcome

    async def cancel(self, request_id: str) -> bool:
        return self._drop(request_id, Cancelled()) or self._runs.cancel(request_id)

    async def ready(self) -> bool:
        return bool(self._tasks) and not any(task.done() for task in self._tasks)

    def _ended(self, job: Job, outcome: Outcome) -> None:
        """Tell those who wait for a job's end, which is on record."""
        self._changed(job.request_id)
        if job.terms.webhook:
            self._outbox.send(Delivery(job.request_id, job.key_id, job.terms.webhook, attempts=0))
        for end in self._awaited.pop(job.request_id, ()):
            if not end.done():  # whoever waited may have gone
                end.set_result(outcome)

    async def _housekeeping(self) -> None:
        while True:
            try:
                self._records.sweep(self._settings.retention)
                await asyncio.to_thread(self.files.sweep)
            except (OSError, sqlite3.Error):
                logger.exception("housekeeping failed, trying again")
            await asyncio.sleep(SWEEP_SECONDS)

    async def _checkpoints(self) -> None:
        before = 0
        while True:
            if (changes := self._records.changes) != before:
                before = changes
                thread = asyncio.ensure_future(asyncio.to_thread(self._records.checkpoint))
                try:
                    await asyncio.shield(thread)
                except asyncio.CancelledError:
                    await asyncio.wait([thread])  # the home may go as soon as we have
                    raise
                except sqlite3.Error:
                    logger.exception("the log cannot be brought into the database, trying again")
            await asyncio.sleep(CHECKPOINT_SECONDS)
