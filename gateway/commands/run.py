"""`zimage run`: one request of any endpoint, without a server."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from gateway.commands.terminal import (
    FAILED,
    REFUSED,
    check_lora,
    check_writable,
    console,
    fail,
    image_size,
    interruptible,
    option,
    path_and_scale,
    picture_url,
    read_settings,
    refused,
    timings_table,
)
from gateway.fetch import from_data_uri
from gateway.inputs import parse
from media.decode import decode
from schemas.endpoints import ENDPOINTS, Endpoint
from schemas.errors import ApiError
from schemas.task import Acceleration, Format, TilingMode, Variant

if TYPE_CHECKING:
    from gateway.commands.engine import OpenEngine
    from gateway.commands.once import Answer
    from gateway.platform import View
    from gateway.settings import Settings

_SUFFIXES: dict[str, Format] = {
    ".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"
}  # fmt: skip
_REAL_WEIGHTS: dict[Variant, tuple[str, str]] = {
    "turbo": ("ZIMAGE_WEIGHTS", "Tongyi-MAI/Z-Image-Turbo"),
    "base": ("ZIMAGE_BASE_WEIGHTS", "Tongyi-MAI/Z-Image"),
}
"""The setting, and what it is set to."""

_tiling = partial(typer.Option, rich_help_panel="Seamless tiling")
_base = partial(typer.Option, rich_help_panel="The base model")


def run(
    context: typer.Context,
    image: Annotated[str, typer.Argument(help="A file, a URL, or `-` for text-to-image.")],
    prompt: Annotated[str, typer.Argument(help="What the picture should become.")],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help="Where to write; numbered if several. Makes its folders."),
    ],
    strength: Annotated[
        float | None, typer.Option(help="0 keeps the input, 1 ignores it. Default 0.6.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Denoising steps, 1 to 8; with --base 1 to 50. Default 8, or 28."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="`auto` (the input's), a preset such as `square_hd`, or WIDTHxHEIGHT. Default auto, "
            "from text landscape_4_3, with --tiling square_hd."
        ),
    ] = None,
    num_images: Annotated[int, typer.Option(help="1 to 4 pictures.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Drawn and printed if not given.")] = None,
    format: Annotated[
        Format | None, typer.Option(help="jpeg, png or webp; otherwise from OUT's suffix.")
    ] = None,
    acceleration: Annotated[Acceleration | None, typer.Option(help="none, regular, high")] = None,
    expand: Annotated[bool, typer.Option(help="Have the prompt written out first.")] = False,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="PATH:SCALE, up to three times; a file, a URL or owner/repository."),
    ] = None,
    safety: Annotated[bool, typer.Option(help="Blacken unsafe pictures.")] = True,
    weights: Annotated[
        str | None,
        typer.Option(
            help="`demo`, a directory, or a hub id[@revision]. Default ZIMAGE_WEIGHTS, with --base "
            "ZIMAGE_BASE_WEIGHTS."
        ),
    ] = None,
    print_json: Annotated[bool, typer.Option("--json", help="Print the response body.")] = False,
    tiling: Annotated[
        TilingMode | None, _tiling(help="Make opposite edges match: both, horizontal, vertical.")
    ] = None,
    tile_size: Annotated[
        int | None, _tiling(help="Of larger pictures' tiles, in latents (8 pixels). Default 128.")
    ] = None,
    tile_stride: Annotated[
        int | None, _tiling(help="From tile to tile, in latents. Default 64.")
    ] = None,
    mask: Annotated[
        str | None, _tiling(help="A file or a URL: where it is white, IMAGE is made anew.")
    ] = None,
    base: Annotated[
        bool, _base(help="The undistilled model, from text: slower, follows the prompt closer.")
    ] = False,
    guidance_scale: Annotated[
        float | None, _base(help="How closely to follow the prompt, 1 to 20. Default 4.")
    ] = None,
    negative_prompt: Annotated[str | None, _base(help="What the picture should not be.")] = None,
) -> None:
    """Make pictures from a picture and a prompt, once, without a server."""
    if out.is_dir():
        fail(f"--out {out} is a directory")
    output_format = format or _SUFFIXES.get(out.suffix.lower())
    if output_format is None:
        fail(f"--out {out}: give it a suffix of {', '.join(_SUFFIXES)}, or say --format")
    body: dict[str, Any] = {
        "prompt": prompt,
        "num_images": num_images,
        "output_format": output_format,
        "enable_safety_checker": safety,
        "strength": strength,
        "num_inference_steps": steps,
        "image_size": image_size(size),
        "seed": seed,
        "acceleration": acceleration,
        "enable_prompt_expansion": expand or None,
        "loras": [path_and_scale(each) for each in lora] if lora else None,
        "tiling_mode": tiling,
        "tile_size": tile_size,
        "tile_stride": tile_stride,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
    }
    if image != "-":
        body["image_url"] = picture_url(image, "IMAGE", " (use - for text-to-image)")
    elif not base and (strength is not None or size == "auto"):
        fail("--strength and --size auto need an input picture")
    if mask is not None:
        body["mask_image_url"] = picture_url(mask, "--mask")
    for each in lora or ():
        check_lora(each)
    body = {name: value for name, value in body.items() if value is not None}
    endpoint = _endpoint(body, base)
    try:
        _check(endpoint, body)
    except ApiError as error:
        refused(error.body(), REFUSED, print_json)
    settings = read_settings(**{"base_weights" if base else "weights": weights})
    if endpoint.variant not in settings.variants:
        setting, example = _REAL_WEIGHTS[endpoint.variant]
        fail(f"--base needs weights of its own: set {setting}, or say --weights (as {example})")
    check_writable(out)
    answer, loaded = _run_once(settings, context.obj, endpoint, body)
    if answer.status != 200:
        refused(answer.body, FAILED, print_json)
    _write(answer, out)
    if print_json:
        print(json.dumps(answer.body, indent=2))
    console.print(timings_table(answer.body["timings"], loaded))
    if settings.variants[endpoint.variant] == "demo":
        setting, weights = _REAL_WEIGHTS[endpoint.variant]
        console.print(
            "Small demo weights, which know 256x256 only (--size 256x256). Real ones (about 20 GB, for a "
            "GPU): "
            f"zimage weights fetch {weights}, then {setting}={weights}",
            highlight=False,
            soft_wrap=True,
        )


def _endpoint(body: dict[str, Any], base: bool) -> Endpoint:
    """The one that is meant, by what is asked of it."""
    if base:
        path = "base"
    elif "tiling_mode" in body:
        path = "turbo/tiling"
    else:
        path = "turbo/image-to-image" if "image_url" in body else "turbo"
    return ENDPOINTS[f"fal-ai/z-image/{path}{'/lora' if 'loras' in body else ''}"]


def _check(endpoint: Endpoint, body: dict[str, Any]) -> None:
    """Refuse what can be refused before weights are loaded. Raises ApiError.

    A server ignores fields that its endpoint does not have, as fal does; somebody who typed one meant it.
    """
    for field in body:
        if field not in endpoint.input.model_fields:
            having = [
                each.id
                for each in ENDPOINTS.values()
                if field in each.input.model_fields and not each.id.endswith("/lora")
            ]
            fail(f"{option(field)} is not for {endpoint.id}, but for {', '.join(having)}")
    parse(endpoint, json.dumps(body).encode())
    for field in ("image_url", "mask_image_url"):
        if str(body.get(field, "")).startswith("data:"):
            loc = ("body", field)
            decode(from_data_uri(body[field], loc), loc)


def _run_once(
    settings: Settings, open_engine: OpenEngine, endpoint: Endpoint, body: dict[str, Any]
) -> tuple[Answer, float]:
    """Load, run one request, show how far it is. With the seconds that loading took."""
    from gateway.commands.once import run_once

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
    )
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=console)])
    logging.getLogger("gateway.fetch").setLevel(logging.INFO)  # why a download failed
    started = time.perf_counter()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading weights", total=None)

        def show(view: View) -> None:
            if progress := view.progress:
                total = progress.steps * progress.images
                done = round(progress.fraction * total)
                bar.update(task, description="denoising", completed=done, total=total)

        with open_engine(settings, endpoint.variant) as engine:
            loaded = time.perf_counter() - started
            bar.update(task, description="preparing")
            once = run_once(settings, engine.generate, endpoint.id, body, show)
            try:
                return asyncio.run(interruptible(once)), loaded
            except asyncio.CancelledError:
                raise typer.Exit(130) from None


def _write(answer: Answer, out: Path) -> None:
    """The pictures where they were wanted, and in the answer where they are."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(answer.files, start=1):
        path = out.with_stem(f"{out.stem}-{number}") if len(answer.files) > 1 else out
        path.write_bytes(data)
        answer.body["images"][number - 1] |= {
            "url": path.absolute().as_uri(),
            "file_name": path.name,
        }
        flagged = answer.body["has_nsfw_concepts"][number - 1]
        note = "  [yellow]flagged by the safety checker: black[/]" if flagged else ""
        seed = answer.body["seed"] + number - 1
        console.print(f"[green]wrote[/] {escape(str(path))} · seed {seed}{note}", highlight=False)
