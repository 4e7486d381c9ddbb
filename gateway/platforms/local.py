"""The platform of one process: jobs in SQLite, files in a directory, the engine beside the event loop.

Survives kill -9: a job is on disk before it is accepted, and one that was running goes back to the
queue at the next start. PREPARING requests fetch and decode while the engine is busy with another.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import sqlite3
import time
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
from gateway.perform import GenerateAsync, OnProgress, Services, perform
from gateway.platform import Platform, View
from gateway.platforms.records import Records
from gateway.settings import Settings
from schemas.errors import Cancelled, internal_error
from schemas.task import Progress, Result, Task

PREPARING = 4
"""Requests in progress at a time, fetching or waiting for the engine."""

ENGINE_SLOTS = 2
"""Requests at the engine: one at its tensors, one whose files are being encoded. Only they are
suspected when the process dies."""

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
        self._engine_slots = asyncio.Semaphore(ENGINE_SLOTS)
        self._stopping = False
        self._running: dict[str, _Run] = {}
        self._awaited: dict[str, asyncio.Future[Outcome]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> LocalPlatform:
        self._records = Records(self._settings.home)
        services = Services(
            self._generate,
            self.files,
            self._fetcher,
            self._decoder,
            self._settings.acceleration_default,
        )
        for job in self._records.requeue_interrupted(time.time()):
            logger.warning("request %s was interrupted, now %s", job.request_id, job.status)
        for _ in range(self._records.queued()):
            self._queued.release()
        self._tasks = [asyncio.create_task(self._work(services)) for _ in range(PREPARING)]
        self._tasks.append(asyncio.create_task(self._housekeeping()))
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
        await self._fetcher.close()
        await asyncio.gather(self._warming, return_exceptions=True)
        await self._decoder.close()
        self._records.close()
        self._lock.close()

    async def submit(self, job: Job, body: bytes) -> None:
        await self._records.insert(job, body)
        self._queued.release()

    async def view(self, request_id: str) -> View | None:
        job = self._records.get(request_id)
        if job is None:
            return None
        if job.status == "IN_QUEUE":
            return View(job, position=self._records.position(request_id))
        if run := self._running.get(request_id):
            return View(run.job, progress=run.progress)
        return View(job)

    async def outcome(self, request_id: str) -> Outcome | None:
        return await self._records.outcome(request_id)

    async def wait(self, request_id: str) -> Outcome:
        job = self._records.get(request_id)
        if job is not None and job.status != "COMPLETED":
            end = self._awaited.setdefault(request_id, asyncio.get_running_loop().create_future())
            return await asyncio.shield(end)
        outcome = await self._records.outcome(request_id)
        if outcome is None:
            raise LookupError(f"no request {request_id}")
        return outcome

    async def cancel(self, request_id: str) -> bool:
        if job := self._records.cancel_queued(request_id, time.time()):
            assert job.outcome is not None
            self._announce(request_id, job.outcome)
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
            try:
                if job := self._records.claim(time.time()):
                    await self._run(job, services)
            except Exception:
                logger.exception("jobs cannot be taken from the records, trying again")
                await asyncio.sleep(RETRY_SECONDS)
                self._queued.release()

    async def _run(self, job: Job, services: Services) -> None:
        """Bring a job to its end; or, when the platform stops meanwhile, back to the queue."""
        run, stopped = _Run(job), False
        services = replace(services, generate=partial(self._on_engine, run))
        run.task = asyncio.create_task(self._perform(run, services))
        self._running[job.request_id] = run
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
            self._records.count_attempt(run.job)
            run.attempted = True
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
        self._announce(job.request_id, outcome)

    def _announce(self, request_id: str, outcome: Outcome) -> None:
        if end := self._awaited.pop(request_id, None):
            end.set_result(outcome)

    async def _housekeeping(self) -> None:
        while True:
            try:
                self._records.sweep(self._settings.retention)
                await asyncio.to_thread(self.files.sweep, self._settings.retention)
            except (OSError, sqlite3.Error):
                logger.exception("housekeeping failed, trying again")
            await asyncio.sleep(SWEEP_SECONDS)


class _Run:
    """A job while it runs: what only this process knows about it."""

    task: asyncio.Task[Outcome]

    def __init__(self, job: Job) -> None:
        self.job = job
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
