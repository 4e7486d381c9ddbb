"""From a request's body to a Task: validate, fetch, decode. All of it before a GPU hears of it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from pydantic import ValidationError

from gateway.files import URL_PATH, TooLarge, own_name
from gateway.jobs import Job
from gateway.services import OnLog, Services
from media.decode import MAX_BYTES, file_too_large
from schemas.endpoints import ENDPOINTS, Endpoint
from schemas.errors import InputError, Loc, ValidationFailed
from schemas.inputs import Input
from schemas.sizes import (
    MAX_PIXELS,
    MULTIPLE,
    ImageSize,
    Size,
    generation_size,
    requested_size,
)
from schemas.task import Lora, Picture, Task, Tiling


def parse(endpoint: Endpoint, body: bytes) -> Input:
    """Validate a request body as far as it can be without its picture. Raises InputError."""
    try:
        params = endpoint.input.model_validate_json(body)
    except ValidationError as error:
        raise ValidationFailed(error) from None
    params.check()
    if params.image_size != "auto":
        requested_size(params.image_size)
    return params


async def read_task(
    params: Input, job: Job, services: Services, timings: dict[str, float], log: OnLog
) -> Task:
    """Fetch and decode what comes with the request. Everything is checked before a GPU hears of it."""
    fields = dict(params)
    image, mask, size = None, None, None

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        timings[name] += time.perf_counter() - began

    async def fetch(field: str) -> bytes:
        with stage("input_fetch"):
            return await _input_bytes(fields[field], ("body", field), job, services)

    async def decode(field: str, data: bytes, wanted: ImageSize | str) -> tuple[Picture, Size]:
        with stage("input_decode"):
            return await services.decoder(data, wanted, ("body", field))

    wanted_loras = fields.get("loras", ())
    loras: tuple[Lora, ...] = ()
    if wanted_loras:
        with stage("input_fetch"):
            async with services.downloading():
                digests = await asyncio.gather(
                    *(
                        services.loras(each.path, ("body", "loras", k, "path"))
                        for k, each in enumerate(wanted_loras)
                    )
                )
        for each in wanted_loras:
            log(f"LoRA {each.path[:100]} at {each.scale:g}")
        loras = tuple(
            Lora(digest, each.scale) for digest, each in zip(digests, wanted_loras, strict=True)
        )
    if fields.get("image_url") is not None:
        data = await fetch("image_url")
        image, size = await decode("image_url", data, params.image_size)
        if "tiling_mode" in fields and (image.width, image.height) != size:
            # Its edges are to match: so it has to fill what is generated, without a margin.
            image, _ = await decode("image_url", data, _generated(size))
        log(f"input picture ready, generating {size.width}×{size.height}")
    elif params.image_size == "auto":
        size = requested_size("square_hd")
    else:
        size = requested_size(params.image_size)
    if fields.get("mask_image_url") is not None:
        data = await fetch("mask_image_url")
        mask, _ = await decode("mask_image_url", data, _generated(size))
    task = make_task(params, image, mask, size, ENDPOINTS[job.endpoint], services)
    return replace(task, loras=loras)


def _generated(size: Size) -> ImageSize:
    """What is generated for a size, where a picture has to fill it. Raises InputError."""
    width, height = generation_size(*size)
    if width * height > MAX_PIXELS:
        raise InputError(
            ("body", "image_size"),
            f"width × height, each rounded up to a multiple of {MULTIPLE} ({width}×{height}), should be"
            f" less than or equal to {MAX_PIXELS} pixels (4 megapixels) for a picture that is tiled",
            "less_than_equal",
            ctx={"le": MAX_PIXELS},
        )
    return ImageSize(width=width, height=height)


async def _input_bytes(url: str, loc: Loc, job: Job, services: Services) -> bytes:
    if name := own_name(url):  # a picture of ours: no way through the network
        try:
            data = await services.files.get(name, MAX_BYTES)
        except TooLarge:
            raise file_too_large(loc) from None
        if data is not None:
            return data
    if url.startswith(job.origin + URL_PATH):
        raise InputError(loc, "File download error", "file_download_error", input=url)
    if url[:5].lower() == "data:":
        return await services.fetcher(url, loc)
    async with services.downloading():
        return await services.fetcher(url, loc)


def make_task(
    params: Input,
    image: Picture | None,
    mask: Picture | None,
    size: Size,
    endpoint: Endpoint,
    services: Services,
) -> Task:
    """Fields that an endpoint does not have get the values that mean "without"."""
    fields = dict(params)
    tiling = None
    if "tiling_mode" in fields:
        # A patch of the transformer is two latents wide, so windows are, too.
        tile_size, stride = fields["tile_size"] // 2 * 2, fields["tile_stride"] // 2 * 2
        tiling = Tiling(fields["tiling_mode"], tile_size, stride)
    return Task(
        prompt=params.prompt,
        width=size.width,
        height=size.height,
        steps=params.num_inference_steps,
        strength=fields["strength"] if image is not None else 1.0,
        # 32 bits: exact in every client's number type, JavaScript's too.
        seed=secrets.randbits(32) if params.seed is None else params.seed,
        num_images=params.num_images,
        image=image,
        output_format=params.output_format,
        safety=params.enable_safety_checker,
        acceleration=(
            params.acceleration
            if "acceleration" in params.model_fields_set
            else services.acceleration_default
        ),
        variant=endpoint.variant,
        guidance_scale=fields.get("guidance_scale", 0.0),
        negative_prompt=fields.get("negative_prompt", ""),
        tiling=tiling,
        mask=mask,
        expand_prompt=fields.get("enable_prompt_expansion", False),
    )
