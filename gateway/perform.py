"""One request from its body to its outcome: the natural way through the house.

    validate → fetch → decode → exact size → Task → engine → files → response body

Used by every platform. Knows neither queues nor threads: how the engine is reached and how a job is
recorded is passed in. Each stage's seconds go into the response's `timings`.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time

from gateway.files import SMALL, URL_PATH
from gateway.inputs import parse, read_task
from gateway.jobs import Job, Outcome
from gateway.services import OnLog, OnProgress, Services
from media.encode import CONTENT_TYPES
from schemas.endpoints import ENDPOINTS, EXPANSION_PRICE
from schemas.errors import ApiError, internal_error
from schemas.outputs import ImageFile, ImagesOutput
from schemas.sizes import megapixels
from schemas.task import Task

logger = logging.getLogger(__name__)


async def perform(
    job: Job, body: bytes, services: Services, on_progress: OnProgress, log: OnLog
) -> Outcome:
    """Run a job to its outcome. Errors are outcomes; raises asyncio.CancelledError and what
    `services.transient` names."""
    try:
        return await _perform(job, body, services, on_progress, log)
    except ApiError as error:
        log(str(error))
        return Outcome.of_error(error)
    except services.transient:
        raise
    except Exception:
        logger.exception("request %s failed", job.request_id)
        log("Internal Server Error")
        return Outcome.of_error(internal_error())


async def _perform(
    job: Job, body: bytes, services: Services, on_progress: OnProgress, log: OnLog
) -> Outcome:
    endpoint = ENDPOINTS[job.endpoint]
    params = parse(endpoint, body)
    timings = {"input_fetch": 0.0, "input_decode": 0.0}

    made = await services.resume() if services.resume else None
    if made is None:
        task = await read_task(params, job, services, timings, log)
        made = task, await services.generate(task, on_progress)
    task, result = made

    began = time.perf_counter()
    images = [
        await _store(image.data, task, job, services, inline=params.sync_mode)
        for image in result.images
    ]
    timings["output_store"] = time.perf_counter() - began

    output = ImagesOutput(
        images=images,
        timings={name: round(value, 6) for name, value in {**result.timings, **timings}.items()},
        seed=result.seed,
        has_nsfw_concepts=[image.flagged for image in result.images],
        prompt=result.prompt,
    )
    return Outcome(
        200,
        output.model_dump_json().encode(),
        units=task.num_images * megapixels(task.width, task.height)
        + task.expand_prompt * EXPANSION_PRICE / endpoint.price,
        inference_time=result.timings["inference"],
        kept=not params.sync_mode,
        plan=f"{task.acceleration}: {result.plan}" if result.plan else None,
    )


async def _store(
    data: bytes, task: Task, job: Job, services: Services, *, inline: bool
) -> ImageFile:
    content_type = CONTENT_TYPES[task.output_format]
    if inline:
        encode = base64.b64encode
        encoded = encode(data) if len(data) <= SMALL else await asyncio.to_thread(encode, data)
        url, name = f"data:{content_type};base64,{encoded.decode()}", f"image.{task.output_format}"
    else:
        lifetime = job.terms.file_lifetime
        name = await services.files.put(
            data, task.output_format, services.retention if lifetime is None else lifetime
        )
        url = f"{job.origin}{URL_PATH}{name}"
    return ImageFile(
        url=url,
        content_type=content_type,
        file_name=name,
        file_size=len(data),
        width=task.width,
        height=task.height,
    )
