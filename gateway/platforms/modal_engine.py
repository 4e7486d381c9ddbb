"""The GPU class's side of a job: whether to run it, and how far it is.

Imports nothing of the gateway's but plain data, so that the GPU container needs none of its libraries.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from gateway.jobs import Job
from gateway.logs import log_entry, progress_message
from gateway.platforms.modal_records import Logs, ModalRecords
from schemas.errors import InputError
from schemas.task import Failure, Progress, Result, Task

logger = logging.getLogger(__name__)


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
    if attempt > job.terms.max_attempts:
        return Failure(f"The runner disconnected {attempt - 1} times", "lost")
    report = ProgressReporter(records, job.request_id)
    try:
        result = await engine(task, report)
        await report.close()
        return result
    except InputError as error:
        return Failure(str(error), "refused", error.detail[0])
    except Exception as error:
        logger.exception("request %s failed", job.request_id)
        if await healthy():
            return Failure(f"{type(error).__name__}: {error}")
        raise EngineBroken(repr(error)) from None
