"""Jobs on their way in this process: claimed when there is room, brought to their end, recorded.

PREPARING at a time fetch, decode or wait for the engine, where ENGINE_SLOTS are. A job that downloads
lends its place to another, up to RUNNING in all, so that a slow server holds up its own request only.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

from gateway.jobs import Job, Outcome
from gateway.logs import log_entry, progress_message
from gateway.perform import perform
from gateway.platforms.records import Records
from gateway.services import OnProgress, Services
from schemas.errors import Cancelled, StartTimeout, internal_error
from schemas.task import Progress, Result, Task

PREPARING = 4

RUNNING = 32

ENGINE_SLOTS = 2
"""One job at its tensors, one whose files are being encoded. Only they are suspected when the process
dies."""

RETRY_SECONDS = 1.0

logger = logging.getLogger(__name__)


class Runs:
    """`changed` is called with the id of a job whose view has changed; `ended` with a job whose outcome
    is on record, and that is no run any more."""

    def __init__(
        self,
        records: Records,
        services: Services,
        changed: Callable[[str], None],
        ended: Callable[[Job, Outcome], None],
    ) -> None:
        self._records, self._services = records, services
        self._changed, self._ended = changed, ended
        self._runs: dict[str, Run] = {}
        self._places = Places(PREPARING, self.begin)
        self._engine = asyncio.Semaphore(ENGINE_SLOTS)
        self._stopping = False

    def get(self, request_id: str) -> Run | None:
        return self._runs.get(request_id)

    def begin(self) -> None:
        """Claim as many jobs as there is room for."""
        while (
            self._records.backlog
            and len(self._runs) < RUNNING
            and not self._stopping
            and self._places.take_now()
        ):
            job = self._records.claim(time.time())
            assert job is not None, "the backlog was not empty"
            run = Run(job, partial(self._changed, job.request_id))
            self._runs[job.request_id] = run
            run.task = asyncio.create_task(self._run(run))

    def cancel(self, request_id: str) -> bool:
        """Stop a job for its caller. False if there is nothing to stop any more."""
        run = self._runs.get(request_id)
        if run is None or run.recording:
            return False
        if not run.cancelled:  # a second request must not disturb the first one's work
            run.cancelled = True
            run.interrupt()
        return True

    async def stop(self) -> None:
        """Between two steps. Jobs go back to the queue, but for those that have been cancelled or whose
        outcome is being recorded: they end."""
        self._stopping = True
        runs = [*self._runs.values()]
        for run in runs:
            if not (run.cancelled or run.recording):
                run.interrupt()
        await asyncio.gather(*(run.task for run in runs), return_exceptions=True)

    async def _run(self, run: Run) -> None:
        job, place = run.job, _Place(self._places)
        try:
            outcome = await self._outcome(run, place)
            run.recording = True
            place.give()  # the next one prepares while this one is recorded
            if outcome and await self._finish(job, outcome):
                del self._runs[job.request_id]
                self._ended(job, outcome)
        except LookupError:
            logger.warning("request %s was refused while it ran", job.request_id)
        finally:
            self._runs.pop(job.request_id, None)
            place.give()
            self.begin()

    async def _outcome(self, run: Run, place: _Place) -> Outcome | None:
        """None for a job that goes back to the queue."""
        services = replace(
            self._services, generate=partial(self._generate, run), downloading=place.lent
        )
        try:
            run.begin()
            body = await self._records.body(run.job.request_id)
            return await perform(run.job, body, services, run.on_progress, run.log)
        except asyncio.CancelledError:
            if run.cancelled:
                return Outcome.of_error(Cancelled())
            task = asyncio.current_task()
            if run.interrupted or (task and task.cancelling()):
                self._records.hand_back(run.job, run.attempted)
                return None
            logger.exception("request %s was cancelled by nobody", run.job.request_id)
            return Outcome.of_error(internal_error())
        except StartTimeout as error:
            return Outcome.of_error(error)
        except Exception:  # `perform` raises nothing, so it is the disk, or a bug of ours
            logger.exception("request %s failed", run.job.request_id)
            return Outcome.of_error(internal_error())

    async def _generate(self, run: Run, task: Task, on_progress: OnProgress) -> Result:
        async with self._engine:
            while not run.attempted:
                try:
                    await self._records.attempt(run.job)
                except sqlite3.Error:  # perhaps another's, with whom it shared a transaction
                    logger.exception("%s cannot begin, trying again", run.job.request_id)
                    await asyncio.sleep(RETRY_SECONDS)
            return await self._services.generate(task, on_progress)

    async def _finish(self, job: Job, outcome: Outcome) -> bool:
        """Record an end. A full disk is waited for, since the pictures have been made; unless the
        process stops: then the job runs again."""
        while True:
            try:
                await self._records.finish(job, outcome, time.time())
                break
            except LookupError:
                raise
            except Exception:
                logger.exception("request %s cannot be recorded, trying again", job.request_id)
                if self._stopping:
                    return False
                await asyncio.sleep(RETRY_SECONDS)
        seconds = time.time() - job.created
        logger.info("%s %s %d in %.2f s", job.request_id, job.endpoint, outcome.status, seconds)
        return True


class Run:
    """A job while it runs: what only this process knows about it."""

    task: asyncio.Task[None]

    def __init__(self, job: Job, changed: Callable[[], None]) -> None:
        self.job, self._changed = job, changed
        self.progress: Progress | None = None
        self.cancelled = False
        self.recording = False
        self.interrupted = False
        self._begun = False
        self._attempts_before = job.attempts

    @property
    def attempted(self) -> bool:
        """Whether the engine has it, or will have it as soon as that is on record."""
        return self.job.attempts > self._attempts_before

    def begin(self) -> None:
        """Raises StartTimeout if that is too late; and CancelledError if it has been interrupted by now: a
        task that is cancelled before its first step would never hear of it."""
        self._begun = True
        if self.interrupted:
            raise asyncio.CancelledError
        started, deadline = self.job.started, self.job.deadline
        if started is not None and deadline is not None and started >= deadline:
            raise StartTimeout
        self._changed()

    def interrupt(self) -> None:
        self.interrupted = True
        if self._begun:
            self.task.cancel()

    def on_progress(self, progress: Progress) -> None:
        self.progress = progress
        self.log(progress_message(progress))

    def log(self, message: str) -> None:
        self.job.logs.append(log_entry(message))
        self._changed()


class Places:
    """A semaphore that can be taken without waiting. `freed` is called when nobody waits for a place."""

    def __init__(self, number: int, freed: Callable[[], None]) -> None:
        self._free, self._freed = number, freed
        self._waiting: deque[asyncio.Future[None]] = deque()

    def take_now(self) -> bool:
        if not self._free:
            return False
        self._free -= 1
        return True

    async def take(self) -> None:
        if self.take_now():
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.give()
            raise

    def give(self) -> None:
        while self._waiting:
            if not (place := self._waiting.popleft()).done():
                place.set_result(None)
                return
        self._free += 1
        self._freed()


class _Place:
    """A run's place, taken for it, which it lends while it downloads."""

    def __init__(self, places: Places) -> None:
        self._places, self._held = places, True

    def give(self) -> None:
        if self._held:
            self._held = False
            self._places.give()

    @asynccontextmanager
    async def lent(self) -> AsyncIterator[None]:
        self.give()
        yield
        await self._places.take()  # unless the download failed: then it is over
        self._held = True
