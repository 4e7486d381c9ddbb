"""`zimage run`: one request of any endpoint, without a server."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from gateway.inputs import parse
from gateway.terminal import (
    check_lora,
    check_writable,
    console,
    fail,
    image_size,
    image_url,
    interruptible,
    path_and_scale,
    read_settings,
    refused,
    timings_table,
)
from schemas.endpoints import ENDPOINTS, Endpoint
from schemas.errors import ApiError
from schemas.task import Acceleration, Format

if TYPE_CHECKING:
    from gateway.local_engine import OpenEngine
    from gateway.once import Answer
    from gateway.platform import View
    from gateway.settings import Settings

IMAGE_TO_IMAGE, TEXT_TO_IMAGE = "fal-ai/z-image/turbo/image-to-image", "fal-ai/z-image/turbo"
_SUFFIXES: dict[str, Format] = {
    ".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"
}  # fmt: skip


def run(
    context: typer.Context,
    image: Annotated[str, typer.Argument(help="A file, a URL, or `-` for text-to-image.")],
    prompt: Annotated[str, typer.Argument(help="What the picture should become.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write; numbered if several.")],
    strength: Annotated[
        float | None, typer.Option(help="0 keeps the input, 1 ignores it. Default 0.6.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps, 1 to 8. Default 8.")] = None,
    size: Annotated[
        str | None,
        typer.Option(help="`auto` (the input's), a preset such as `square_hd`, or WIDTHxHEIGHT."),
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
        str | None, typer.Option(help="`demo`, a directory, or a hub id[@revision].")
    ] = None,
    print_json: Annotated[bool, typer.Option("--json", help="Print the response body.")] = False,
) -> None:
    """Make pictures from a picture and a prompt, once, without a server."""
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
    }
    endpoint_id = TEXT_TO_IMAGE
    if image != "-":
        endpoint_id = IMAGE_TO_IMAGE
        body["image_url"] = image_url(image)
    elif strength is not None or size == "auto":
        fail("--strength and --size auto need an input picture")
    if lora:
        endpoint_id += "/lora"
        for each in lora:
            check_lora(each)
    endpoint = ENDPOINTS[endpoint_id]
    body = {name: value for name, value in body.items() if value is not None}
    settings = read_settings(weights=weights)
    _check(endpoint, body)
    check_writable(out)
    answer, loaded = _run_once(settings, context.obj, endpoint, body)
    if answer.status != 200:
        if print_json:
            print(json.dumps(answer.body, indent=2))
        refused(answer.body)
    _write(answer, out)
    if print_json:
        print(json.dumps(answer.body, indent=2))
    console.print(timings_table(answer.body["timings"], loaded))
    if settings.weights == "demo":
        console.print(
            "Small demo weights. Real ones (about 20 GB, needs a GPU): "
            "zimage weights fetch Tongyi-MAI/Z-Image-Turbo, "
            "then ZIMAGE_WEIGHTS=Tongyi-MAI/Z-Image-Turbo",
            highlight=False,
            soft_wrap=True,
        )


def _check(endpoint: Endpoint, body: dict[str, Any]) -> None:
    """Refuse what can be refused before weights are loaded."""
    try:
        parse(endpoint, json.dumps(body).encode())
    except ApiError as error:
        refused(error.body())


def _run_once(
    settings: Settings, open_engine: OpenEngine, endpoint: Endpoint, body: dict[str, Any]
) -> tuple[Answer, float]:
    """Load, run one request, show how far it is. With the seconds that loading took."""
    from gateway.once import run_once

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
