"""The platform of one process: jobs in SQLite, files in a directory, the engine beside the event loop.

Survives kill -9: a job is on disk before it is accepted, and one that was running goes back to the
queue at the next start. PREPARING requests decode while the engine is busy with another, and others download.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import secrets
import sqlite3
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO

from gateway.decoder import Decoder
from gateway.fetch import Fetcher
from gateway.files import DirectoryFiles
from gateway.jobs import Job, Outcome
from gateway.logs import log_entry, progress_message
from gateway.loras import LoraStore
from gateway.perform import perform
from gateway.platform import Platform, View
from gateway.platforms.outbox import Outbox
from gateway.platforms.records import Records
from gateway.services import GenerateAsync, OnProgress, Services
from gateway.settings import Settings
from gateway.signing import DirectorySigner
from gateway.tokens import Tokens
from gateway.webhooks import Delivery, Webhooks
from schemas.errors import ApiError, Cancelled, StartTimeout, internal_error
from schemas.task import Progress, Result, Task

PREPARING = 4
"""Requests in progress at a time, decoding or waiting for the engine; those beside that download."""

WORKERS = 32
"""Requests in progress at a time, all told: slow servers hold up the requests that name them only."""

ENGINE_SLOTS = 2
"""Requests at the engine: one at its tensors, one whose files are being encoded. Only they are
suspected when the process dies."""

POSITION_SECONDS = 1.0
"""How often watchers of queued requests look at their position."""

CHECKPOINT_SECONDS = 0.25
SWEEP_SECONDS = 60.0
RETRY_SECONDS = 1.0

logger = logging.getLogger(__name__)


class HomeInUse(Exception):
    """Another process works on the same home."""


class LocalPlatform(Platform):
    """Takes the home for itself. Raises HomeInUse if another process has it."""

    _records: Records

    def __init__(self, settings: Settings, generate: GenerateAsync) -> None:
        self._settings, self._generate = settings, generate
        settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _lock(settings.home)
        self.files = DirectoryFiles(settings.home / "files")
        self._fetcher = Fetcher(settings.fetch_allow)
        self._decoder = Decoder()
        self._queued = asyncio.Semaphore(0)
        self._slots = asyncio.Semaphore(PREPARING)
        self._engine_slots = asyncio.Semaphore(ENGINE_SLOTS)
        self._stopping = False
        self._running: dict[str, _Run] = {}
        self._awaited: dict[str, asyncio.Future[Outcome]] = {}
        self.tokens = Tokens(_secret(settings.home / "token-key"))
        self.signer = DirectorySigner(settings.home / "webhook-keys", time.time())
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
        webhooks = Webhooks(self.signer, self._settings.fetch_allow)
        self._outbox = Outbox(self._records, webhooks)
        for job in self._records.requeue_interrupted(time.time()):
            logger.warning("request %s was interrupted, now %s", job.request_id, job.status)
        waiting = self._records.queued()
        if waiting:
            logger.info("%d requests from before are waiting and begin now", waiting)
        for _ in range(waiting):
            self._queued.release()
        for job in self._records.with_deadline():
            self._expire_later(job)
        self._tasks = [asyncio.create_task(self._work(services)) for _ in range(WORKERS)]
        self._tasks.append(asyncio.create_task(self._housekeeping()))
        self._tasks.append(asyncio.create_task(self._checkpoints()))
        self._tasks.append(asyncio.create_task(self._outbox.run()))
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
        self._awaited[job.request_id] = asyncio.get_running_loop().create_future()
        try:
            accepted = await self._records.insert(job, body, self._queued.release)
        except BaseException:
            self._awaited.pop(job.request_id, None)
            raise
        if accepted is job:
            self._expire_later(job)
        else:
            del self._awaited[job.request_id]
        return accepted

    def _expire_later(self, job: Job) -> None:
        """End a job that has not started when its caller's patience is over."""
        if (timeout := job.terms.start_timeout) is not None:
            delay = job.created + timeout - time.time()
            if delay <= 0:
                self._drop(job.request_id, StartTimeout())
            else:
                loop = asyncio.get_running_loop()
                loop.call_later(delay, self._drop, job.request_id, StartTimeout())

    def _drop(self, request_id: str, error: ApiError) -> bool:
        """End a job that is still queued."""
        if self._stopping or not (job := self._records.drop_queued(request_id, error, time.time())):
            return False
        assert job.outcome is not None
        self._ended(job, job.outcome)
        return True

    async def view(self, request_id: str) -> View | None:
        job = self._records.get(request_id)
        if job is None:
            return None
        if job.status == "IN_QUEUE":
            return View(job, position=self._records.position(request_id))
        if run := self._running.get(request_id):
            return View(run.job, progress=run.progress)
        return View(job)

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
                    await asyncio.wait_for(changed.wait(), POSITION_SECONDS if queued else None)
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
        if end := self._awaited.get(request_id):
            return await asyncio.shield(end)
        job = self._records.get(request_id)
        if job is not None and job.status != "COMPLETED":
            end = self._awaited[request_id] = asyncio.get_running_loop().create_future()
            return await asyncio.shield(end)
        outcome = await self._records.outcome(request_id)
        if outcome is None:
            raise LookupError(f"no request {request_id}")
        return outcome

    async def cancel(self, request_id: str) -> bool:
        if self._drop(request_id, Cancelled()):
            return True
        run = self._running.get(request_id)
        if run is None or run.task.done():
            return False
        if not run.task.cancelling():  # a second request must not disturb the first one's work
            run.task.cancel()
        return True

    async def ready(self) -> bool:
        return bool(self._tasks) and not any(task.done() for task in self._tasks)

    async def _work(self, services: Services) -> None:
        while not self._stopping:
            await self._queued.acquire()
            slot = _Slot(self._slots)
            try:
                await slot.take()
                if job := self._records.claim(time.time()):
                    if job.outcome is not None:
                        await self._records.committed()
                        self._ended(job, job.outcome)
                    elif job.request_id not in self._running:
                        # Its claim is on record with its attempt. A kill before that, or a write
                        # that failed and took it along, has it claimed again.
                        await self._run(job, replace(services, downloading=slot.lent))
            except Exception:
                logger.exception("jobs cannot be taken from the records, trying again")
                slot.give()
                await asyncio.sleep(RETRY_SECONDS)
                self._queued.release()
            finally:
                slot.give()

    async def _run(self, job: Job, services: Services) -> None:
        """Bring a job to its end; or, when the platform stops meanwhile, back to the queue."""
        run, stopped = _Run(job, partial(self._changed, job.request_id)), False
        services = replace(services, generate=partial(self._on_engine, run))
        run.task = asyncio.create_task(self._perform(run, services))
        self._running[job.request_id] = run
        run.changed()
        try:
            await asyncio.wait([run.task])
        except asyncio.CancelledError:
            by_client = run.task.cancelling() > 0
            if not by_client:
                run.task.cancel()
            await asyncio.wait([run.task])
            if run.task.cancelled() and not by_client:
                self._records.hand_back(job, run.attempted)
                raise
            stopped = True
        finally:
            del self._running[job.request_id]
        finishing = asyncio.create_task(self._finish(job, run.outcome()))
        try:
            await asyncio.shield(finishing)
        except asyncio.CancelledError:
            await asyncio.wait([finishing])
            raise
        if stopped:
            raise asyncio.CancelledError

    async def _perform(self, run: _Run, services: Services) -> Outcome:
        body = await self._records.body(run.job.request_id)
        return await perform(run.job, body, services, run.on_progress, run.log)

    async def _on_engine(self, run: _Run, task: Task, on_progress: OnProgress) -> Result:
        async with self._engine_slots:
            while not run.attempted:
                try:
                    await self._records.attempt(run.job)
                    run.attempted = True
                except sqlite3.Error:  # perhaps another's, with whom it shared a transaction
                    logger.exception("%s cannot begin, trying again", run.job.request_id)
                    await asyncio.sleep(RETRY_SECONDS)
            return await self._generate(task, on_progress)

    async def _finish(self, job: Job, outcome: Outcome) -> None:
        """Record an end. A full disk is waited for: the pictures have been made."""
        while True:
            try:
                await self._records.finish(job, outcome, time.time())
                break
            except (OSError, sqlite3.Error):
                logger.exception("request %s cannot be recorded, trying again", job.request_id)
                if self._stopping:
                    return
                await asyncio.sleep(RETRY_SECONDS)
        seconds = time.time() - job.created
        logger.info("%s %s %d in %.2f s", job.request_id, job.endpoint, outcome.status, seconds)
        self._ended(job, outcome)

    def _ended(self, job: Job, outcome: Outcome) -> None:
        """Tell those who wait for a job's end, which is on record."""
        self._changed(job.request_id)
        if job.terms.webhook:
            self._outbox.send(Delivery(job.request_id, job.key_id, job.terms.webhook, attempts=0))
        if end := self._awaited.pop(job.request_id, None):
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


class _Slot:
    """A request's place among those that are prepared, which it lends while it downloads."""

    def __init__(self, slots: asyncio.Semaphore) -> None:
        self._slots, self._held = slots, False

    async def take(self) -> None:
        await self._slots.acquire()
        self._held = True

    def give(self) -> None:
        if self._held:
            self._held = False
            self._slots.release()

    @asynccontextmanager
    async def lent(self) -> AsyncIterator[None]:
        self.give()
        yield
        await self.take()  # unless the download failed: then it is over


class _Run:
    """A job while it runs: what only this process knows about it."""

    task: asyncio.Task[Outcome]

    def __init__(self, job: Job, changed: Callable[[], None]) -> None:
        self.job, self.changed = job, changed
        self.progress: Progress | None = None
        self.attempted = False

    def outcome(self) -> Outcome:
        """Of the ended task. `perform` raises nothing, so what did is the disk, or a bug of ours."""
        if self.task.cancelled():
            return Outcome.of_error(Cancelled())
        if error := self.task.exception():
            logger.error("request %s failed", self.job.request_id, exc_info=error)
            return Outcome.of_error(internal_error())
        return self.task.result()

    def on_progress(self, progress: Progress) -> None:
        self.progress = progress
        self.log(progress_message(progress))

    def log(self, message: str) -> None:
        self.job.logs.append(log_entry(message))
        self.changed()


def _secret(path: Path) -> bytes:
    """32 random bytes, made once. The home is locked: nobody else makes them."""
    if not (path.is_file() and path.stat().st_size == 32):
        partial = path.with_suffix(".part")
        with open(partial, "wb", opener=_private) as file:
            file.write(secrets.token_bytes(32))
        partial.rename(path)
    return path.read_bytes()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _lock(home: Path) -> IO[str]:
    """Held as long as the file is open; the system lets go when the process dies."""
    file = (home / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise HomeInUse(
            f"{home} is in use by another zimage process; give this one its own ZIMAGE_HOME"
        ) from None
    return file
