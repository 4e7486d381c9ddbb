"""One request from its body to its outcome: the natural way through the house.

    validate → fetch → decode → exact size → Task → engine → files → response body

Used by every platform. Knows neither queues nor threads: how the engine is reached and how a job is
recorded is passed in. Each stage's seconds go into the response's `timings`.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pydantic import ValidationError

from gateway.decoder import Decoder
from gateway.fetch import Fetcher
from gateway.files import SMALL, URL_PATH, Files, TooLarge, own_name
from gateway.jobs import Job, Outcome
from media.decode import MAX_BYTES, file_too_large
from media.encode import CONTENT_TYPES
from schemas.endpoints import ENDPOINTS, Endpoint, Input
from schemas.errors import ApiError, InputError, ValidationFailed, internal_error
from schemas.inputs import ImageToImageInput
from schemas.outputs import ImageFile, ImagesOutput
from schemas.sizes import Size, megapixels, requested_size
from schemas.task import Acceleration, Picture, Progress, Result, Task

logger = logging.getLogger(__name__)

OnProgress = Callable[[Progress], None]
OnLog = Callable[[str], None]


GenerateAsync = Callable[[Task, OnProgress], Awaitable[Result]]
"""Runs a Task somewhere; cancelling it stops the engine between two steps."""


@dataclass(slots=True)
class Services:
    """What a request needs on its way."""

    generate: GenerateAsync
    files: Files
    fetcher: Fetcher
    decoder: Decoder
    acceleration_default: Acceleration
    retention: float
    resume: Callable[[], Awaitable[tuple[Task, Result] | None]] | None = None
    """What the engine made of the job when it was performed before, and of which task."""
    transient: tuple[type[Exception], ...] = ()
    """Errors of the surroundings: raised, for the job to be performed again."""


def parse(endpoint: Endpoint, body: bytes) -> Input:
    """Validate a request body as far as it can be without its picture. Raises InputError."""
    try:
        params = endpoint.input.model_validate_json(body)
    except ValidationError as error:
        raise ValidationFailed(error) from None
    params.check_supported()
    if params.image_size != "auto":
        requested_size(params.image_size)
    return params


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
    params = parse(ENDPOINTS[job.endpoint], body)
    timings = {"input_fetch": 0.0, "input_decode": 0.0}
    clock = time.perf_counter

    made = await services.resume() if services.resume else None
    if made is None:
        began = clock()
        data = await _input_bytes(params, job, services)
        timings["input_fetch"] = clock() - began

        began = clock()
        picture, size = None, None
        if data is not None:
            picture, size = await services.decoder(data, params.image_size)
            log(f"input picture ready, generating {size.width}×{size.height}")
        timings["input_decode"] = clock() - began

        task = make_task(params, picture, size or requested_size(params.image_size), services)
        made = task, await services.generate(task, on_progress)
    task, result = made

    began = clock()
    images = [
        await _store(image.data, task, job, services, inline=params.sync_mode)
        for image in result.images
    ]
    timings["output_store"] = clock() - began

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
        units=task.num_images * megapixels(task.width, task.height),
        inference_time=result.timings["inference"],
        kept=not params.sync_mode,
    )


async def _input_bytes(params: Input, job: Job, services: Services) -> bytes | None:
    if not isinstance(params, ImageToImageInput):
        return None
    if name := own_name(params.image_url):  # a picture of ours: no way through the network
        try:
            data = await services.files.get(name, MAX_BYTES)
        except TooLarge:
            raise file_too_large(("body", "image_url")) from None
        if data is not None:
            return data
    if params.image_url.startswith(job.origin + URL_PATH):
        raise InputError(
            ("body", "image_url"),
            "File download error",
            "file_download_error",
            input=params.image_url,
        )
    return await services.fetcher(params.image_url)


def make_task(params: Input, picture: Picture | None, size: Size, services: Services) -> Task:
    given = params.model_fields_set
    return Task(
        prompt=params.prompt,
        width=size.width,
        height=size.height,
        steps=params.num_inference_steps,
        strength=params.strength if isinstance(params, ImageToImageInput) else 1.0,
        # 32 bits: exact in every client's number type, JavaScript's too.
        seed=secrets.randbits(32) if params.seed is None else params.seed,
        num_images=params.num_images,
        image=picture,
        output_format=params.output_format,
        safety=params.enable_safety_checker,
        acceleration=(
            params.acceleration if "acceleration" in given else services.acceleration_default
        ),
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
