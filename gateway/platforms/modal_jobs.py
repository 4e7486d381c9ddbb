"""The bodies of the app's CPU functions: a job, a webhook's delivery, a schedule's run."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import modal

from gateway.addresses import Network
from gateway.auth import Keys
from gateway.decoder import Decoder
from gateway.fetch import Fetcher
from gateway.jobs import Job, Outcome, disconnected
from gateway.logs import log_entry
from gateway.loras import LoraStore
from gateway.perform import perform
from gateway.platforms.modal import ModalPlatform
from gateway.platforms.modal_files import VolumeFiles
from gateway.platforms.modal_parts import UNREACHED, Parts, lost
from gateway.platforms.modal_records import Finished, Logs, ModalRecords
from gateway.schedules import Ran, Schedule, check_keys, run
from gateway.services import Services
from gateway.settings import Settings
from gateway.signing import SecretSigner
from gateway.webhooks import Webhooks
from schemas.errors import Cancelled, InputError, StartTimeout
from schemas.task import Failure, Progress, Result, Task

logger = logging.getLogger(__name__)

YIELD_SECONDS = 1.0
"""How often a request of low priority looks whether others wait for a GPU."""


class JobFailed(Exception):
    """What a job's function raises whatever went wrong, so that nobody takes it for a failure to ask."""


class EngineFailure(Exception):
    """The engine's process reported an error; its reason is for our log."""


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
    records = parts.records
    if call_id := modal.current_function_call_id():
        await records.set_call(job.request_id, call_id)  # whoever spawned it may be gone
    outcome = await records.outcome(job.request_id)
    if outcome is None:  # else cancelled before it started, or delivered a second time
        logs: Logs = []
        services = Services(
            functools.partial(_generate, job, records, parts.functions.engines),
            parts.files,
            fetcher := _fetcher(settings.fetch_allow),
            _decoder(),
            LoraStore(
                settings.lora_directory,
                fetcher,
                parts.files,
                saved=parts.loras.commit.aio,
                refresh=functools.partial(_reload, parts.loras),
            ),
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
    engines: Mapping[str, Any],
    task: Task,
    on_progress: Callable[[Progress], None],
) -> Result:
    """Call the GPU class and wait. It reports progress to the records, not here."""
    engine = engines[task.variant]
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
    if result.detail is not None:
        raise InputError.of_detail(result.detail)
    match result.kind:
        case "ended":
            raise Cancelled
        case "late":
            raise StartTimeout
        case "lost":
            raise disconnected(result.reason)
    raise EngineFailure(result.reason)


async def _reload(volume: modal.Volume) -> None:
    with contextlib.suppress(RuntimeError):  # a file is open: another job's, on its way in
        await volume.reload.aio()  # type: ignore[no-untyped-call]


@functools.cache
def _fetcher(exceptions: tuple[Network, ...]) -> Fetcher:
    """One for all jobs of a container."""
    return Fetcher(exceptions)


@functools.cache
def _decoder() -> Decoder:
    """One for all jobs of a container, which bounds what they decode at a time."""
    return Decoder()
