"""The platform on Modal: one spawned CPU function call per job, the engine a GPU class.

Modal's queue, retries and seven days of results are the durable part; records say what its API does
not (state, owner, progress). A preempted or doubly delivered input does no harm: the first recorded
outcome wins, and a job that has one is not performed again.
"""

from __future__ import annotations

import asyncio
import functools
import io
import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import modal

from gateway.addresses import Network
from gateway.decoder import Decoder
from gateway.fetch import Fetcher
from gateway.files import NAME, Files, new_name
from gateway.jobs import Job, Outcome
from gateway.logs import log_entry
from gateway.perform import Services, perform
from gateway.platform import Platform, View
from gateway.platforms.modal_records import Finished, ModalRecords
from gateway.settings import Settings
from schemas.errors import Cancelled, ServiceError
from schemas.task import Failure, Progress, Result, Task

logger = logging.getLogger(__name__)

LOST_SECONDS = 30.0
"""Age of an unfinished request from which a look at its status asks Modal whether it still runs."""


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
        old = job.status != "COMPLETED" and time.time() - job.created > LOST_SECONDS
        if old and await self._ended(request_id, timeout=0) is not None:
            loaded = await self._records.load(request_id)
            assert loaded is not None
            job, progress = loaded
        # Modal tells no order within its queue: 0 means "not started".
        return View(job, 0 if job.status == "IN_QUEUE" else None, progress)

    async def outcome(self, request_id: str) -> Outcome | None:
        return await self._records.outcome(request_id)

    async def wait(self, request_id: str) -> Outcome:
        outcome = await self._ended(request_id, timeout=None)
        assert outcome is not None
        return outcome

    async def _ended(self, request_id: str, timeout: float | None) -> Outcome | None:
        """The outcome of the job's function call; None if it takes longer than `timeout` seconds.

        A call that ended without one (out of time, out of memory, retries used up) is recorded as
        lost here, because nobody else can.
        """
        call_id = await self._records.call_id(request_id)
        if call_id is None:
            raise LookupError(f"no call of request {request_id}")
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
        ended = Finished(Outcome.of_error(Cancelled()), time.time(), [log_entry("cancelled")])
        if not await self._records.finish(request_id, ended):
            return False
        if call_id := await self._records.call_id(request_id):
            await modal.FunctionCall.from_id(call_id).cancel.aio()
        return True

    async def ready(self) -> bool:
        return True


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
        generate, files, _fetcher(settings.fetch_allow), _decoder(), settings.acceleration_default
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
