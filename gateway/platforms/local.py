"""The platform of one process: jobs in SQLite, files in a directory, the engine beside the event loop.

Survives kill -9: a job is on disk before it is accepted, and one that was running goes back to the
queue at the next start. PREPARING requests fetch and decode while the engine is busy with another.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from gateway.fetch import Fetcher
from gateway.files import DirectoryFiles
from gateway.jobs import Job, Outcome
from gateway.logs import log_entry, progress_message
from gateway.perform import MAX_DECODES, GenerateAsync, Services, perform
from gateway.platform import Platform, View
from gateway.platforms.records import Records
from gateway.settings import Settings
from schemas.errors import Cancelled, internal_error
from schemas.task import Progress

PREPARING = 4
"""Requests in progress at a time, fetching or waiting for the engine."""

SWEEP_SECONDS = 60.0

logger = logging.getLogger(__name__)


class HomeInUse(Exception):
    """Another process works on the same home."""


class LocalPlatform(Platform):
    """Takes the home for itself. Raises HomeInUse if another process has it."""

    _records: Records

    def __init__(self, settings: Settings, generate: GenerateAsync) -> None:
        self._settings, self._generate = settings, generate
        settings.home.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(settings.home)
        self.files = DirectoryFiles(settings.home / "files")
        self._fetcher = Fetcher(settings.fetch_allow)
        self._queued = asyncio.Semaphore(0)
        self._running: dict[str, _Run] = {}
        self._awaited: dict[str, asyncio.Future[Outcome]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> LocalPlatform:
        self._records = Records(self._settings.home)
        services = Services(
            self._generate,
            self.files,
            self._fetcher,
            self._settings.acceleration_default,
            asyncio.Semaphore(MAX_DECODES),
        )
        for job in self._records.requeue_interrupted(time.time()):
            logger.warning("request %s was interrupted, now %s", job.request_id, job.status)
        for _ in range(self._records.queued()):
            self._queued.release()
        self._tasks = [asyncio.create_task(self._work(services)) for _ in range(PREPARING)]
        self._tasks.append(asyncio.create_task(self._housekeeping()))
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop between two steps. Jobs in progress stay so in the records and run at the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._fetcher.close()
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
        if run is None or run.finishing:
            return False
        run.cancelled_by_client = True
        run.task.cancel()
        return True

    async def ready(self) -> bool:
        return any(not task.done() for task in self._tasks)

    async def _work(self, services: Services) -> None:
        while True:
            await self._queued.acquire()
            job = self._records.claim(time.time())
            if job is None:  # cancelled while it waited
                continue
            run = _Run(job)
            self._running[job.request_id] = run
            run.task = asyncio.create_task(self._perform(run, services))
            try:
                await asyncio.shield(run.task)
            except asyncio.CancelledError:
                run.task.cancel()
                await asyncio.wait([run.task])
                raise
            except Exception:  # the disk, most likely; the job runs again at the next start
                logger.exception("request %s could not be recorded", job.request_id)
            finally:
                del self._running[job.request_id]

    async def _perform(self, run: _Run, services: Services) -> None:
        """Leaves the job finished, or, when the platform stops, in progress."""
        job = run.job
        try:
            body = await self._records.body(job.request_id)
            outcome = await perform(job, body, services, run.on_progress, run.log)
        except asyncio.CancelledError:
            if not run.cancelled_by_client:
                raise
            run.log("cancelled")
            outcome = Outcome.of_error(Cancelled())
        except OSError:
            logger.exception("request %s: its body cannot be read", job.request_id)
            outcome = Outcome.of_error(internal_error())
        run.finishing = True
        await self._records.finish(job, outcome, time.time())
        self._announce(job.request_id, outcome)

    def _announce(self, request_id: str, outcome: Outcome) -> None:
        if end := self._awaited.pop(request_id, None):
            end.set_result(outcome)

    async def _housekeeping(self) -> None:
        while True:
            self._records.sweep(self._settings.retention)
            await asyncio.to_thread(self.files.sweep, self._settings.retention)
            await asyncio.sleep(SWEEP_SECONDS)


class _Run:
    """A job while it runs: what only this process knows about it."""

    task: asyncio.Task[None]

    def __init__(self, job: Job) -> None:
        self.job = job
        self.progress: Progress | None = None
        self.cancelled_by_client = False
        self.finishing = False

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
