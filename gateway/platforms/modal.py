"""The platform on Modal: one spawned CPU function call per job, the engine a GPU class.

Modal's queue, retries and seven days of results are the durable part; records say what its API does
not (state, owner, progress). A preempted or doubly delivered input does no harm: the first recorded
outcome wins, and a job that has one is not performed again.
"""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any

import modal

from gateway.fetch import Fetcher
from gateway.files import NAME, Files, new_name
from gateway.jobs import Job, Outcome
from gateway.logs import log_entry
from gateway.perform import MAX_DECODES, Services, perform
from gateway.platform import Platform, View
from gateway.platforms.modal_records import Finished, ModalRecords
from gateway.settings import Settings
from schemas.errors import Cancelled, ServiceError
from schemas.task import Failure, Progress, Result, Task

logger = logging.getLogger(__name__)

RemoteEngine = Callable[[str, Task], Awaitable[Result | Failure]]
"""The GPU class's method: (request id, task)."""


class EngineFailure(Exception):
    """The engine's process reported an error; its reason is for our log."""


class VolumeFiles(Files):
    """Files on a Volume, through its API and not a mount: readable everywhere as soon as written."""

    def __init__(self, volume: modal.Volume) -> None:
        self._volume = volume

    async def put(self, data: bytes, suffix: str) -> str:
        name = new_name(suffix)
        async with self._volume.batch_upload.aio() as batch:
            batch.put_file(io.BytesIO(data), f"/{name}")
        return name

    async def get(self, name: str) -> bytes | None:
        if not NAME.fullmatch(name):
            return None
        try:
            chunks = [chunk async for chunk in self._volume.read_file.aio(name)]
        except FileNotFoundError:
            return None
        return b"".join(chunks)

    async def sweep(self, seconds: float) -> int:
        """Delete files older than `seconds`; returns how many."""
        old = [
            entry.path
            for entry in await self._volume.listdir.aio("/")
            if entry.mtime < time.time() - seconds
        ]
        for path in old:
            await self._volume.remove_file.aio(path)
        return len(old)


class ModalPlatform(Platform):
    """`job` is the Modal function that runs `run_job`."""

    def __init__(self, job: Any, records: ModalRecords, files: Files) -> None:
        self._job, self._records, self.files = job, records, files

    async def __aenter__(self) -> ModalPlatform:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing runs here: jobs are Modal's."""

    async def submit(self, job: Job, body: bytes) -> None:
        await self._records.insert(job)
        try:
            call = await self._job.spawn.aio(job, body)
        except modal.exception.ResourceExhaustedError:
            raise ServiceError(
                429, "Too many requests are queued; try again later", "concurrent_requests_limit"
            ) from None
        await self._records.set_call(job.request_id, call.object_id)

    async def view(self, request_id: str) -> View | None:
        loaded = await self._records.load(request_id)
        if loaded is None:
            return None
        job, progress = loaded
        # Modal tells no order within its queue: 0 means "not started".
        return View(job, 0 if job.status == "IN_QUEUE" else None, progress)

    async def outcome(self, request_id: str) -> Outcome | None:
        finished = await self._records.finished(request_id)
        if finished is None:
            return None
        if finished.outcome.error_type == Cancelled().error_type:
            return Outcome.of_error(Cancelled())
        return await self.wait(request_id)

    async def wait(self, request_id: str) -> Outcome:
        call_id = await self._records.call_id(request_id)
        if call_id is None:
            raise LookupError(f"no request {request_id}")
        try:
            outcome: Outcome = await modal.FunctionCall.from_id(call_id).get.aio()
        except modal.exception.OutputExpiredError:
            return Outcome.of_error(ServiceError(404, "The result has expired", "expired"))
        except modal.exception.FunctionTimeoutError:
            return await self._lost(
                request_id, ServiceError(504, "The request took too long", "generation_timeout")
            )
        except modal.exception.Error:
            logger.exception("request %s was lost", request_id)
            return await self._lost(
                request_id, ServiceError(503, "The runner disconnected", "runner_disconnected")
            )
        return outcome

    async def cancel(self, request_id: str) -> bool:
        ended = Finished(Outcome.of_error(Cancelled()), time.time(), [log_entry("cancelled")])
        if not await self._records.finish(request_id, ended):
            return False
        if call_id := await self._records.call_id(request_id):
            await modal.FunctionCall.from_id(call_id).cancel.aio()
        return True

    async def ready(self) -> bool:
        return True

    async def _lost(self, request_id: str, error: ServiceError) -> Outcome:
        """An end that no job recorded, unless one did (a cancelled call ends here, too)."""
        outcome = Outcome.of_error(error)
        await self._records.finish(request_id, Finished(outcome, time.time(), []))
        finished = await self._records.finished(request_id)
        if finished and finished.outcome.error_type == Cancelled().error_type:
            return Outcome.of_error(Cancelled())
        return outcome


async def run_job(
    job: Job,
    body: bytes,
    *,
    records: ModalRecords,
    files: Files,
    engine: RemoteEngine,
    settings: Settings,
) -> Outcome:
    """The body of the CPU function: perform a job, record its end, return it as data.

    Cancelling it (FunctionCall.cancel) cancels the call to the engine, which stops between two steps.
    """
    if finished := await records.finished(job.request_id):
        return finished.outcome  # cancelled before it started, or delivered a second time
    await records.set_started(job.request_id, time.time())
    logs: list[dict[str, object]] = []

    async def generate(task: Task, on_progress: Callable[[Progress], None]) -> Result:
        result = await engine(job.request_id, task)
        if isinstance(result, Failure):
            raise EngineFailure(result.reason)
        return result

    fetcher = Fetcher(settings.fetch_allow)
    services = Services(
        generate, files, fetcher, settings.acceleration_default, asyncio.Semaphore(MAX_DECODES)
    )
    try:
        outcome = await perform(
            job, body, services, lambda progress: None, lambda text: logs.append(log_entry(text))
        )
    finally:
        await fetcher.close()
    await records.finish(job.request_id, Finished(outcome, time.time(), logs))
    return outcome
