"""The command line's side of a request: arguments → fields, answers and errors → terminal.

Exit codes of all commands: 0 done; FAILED, it was begun; REFUSED, it was not, as something that was asked
for or set cannot be; 130 interrupted.
"""

from __future__ import annotations

import asyncio
import base64
import json
import mimetypes
import os
import signal
import tempfile
from collections.abc import Coroutine
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway.settings import Deployment, Settings, SettingsError, read
from schemas.sizes import PRESETS

T = TypeVar("T")

FAILED, REFUSED = 1, 2

console = Console(stderr=True)

_OPTIONS = {
    "prompt": "PROMPT",
    "image_url": "IMAGE",
    "mask_image_url": "--mask",
    "image_size": "--size",
    "num_inference_steps": "--steps",
    "enable_prompt_expansion": "--expand",
    "enable_safety_checker": "--safety",
    "output_format": "--format",
    "loras": "--lora",
    "tiling_mode": "--tiling",
}
"""A request's fields, where the command line has another name for them."""


def option(field: str) -> str:
    """What the command line calls a field of a request, or a part of one, such as loras.0.path."""
    name = field.partition(".")[0]
    return _OPTIONS.get(name) or f"--{name.replace('_', '-')}"


def read_settings(**options: object) -> Settings:
    """Settings from the environment; options of the command win. Warns of names that nobody reads."""
    known = {
        f"ZIMAGE_{name.upper()}" for each in (Settings, Deployment) for name in each.model_fields
    }
    for name in os.environ.keys() - known:
        if name.startswith("ZIMAGE_"):
            meant = get_close_matches(name, known, n=1)
            hint = f"; is {meant[0]} meant?" if meant else ""
            console.print(f"[yellow]warning:[/] there is no setting {escape(name)}{hint}")
    try:
        return read(Settings, **options)
    except SettingsError as error:
        fail(str(error))


def picture_url(given: str, argument: str, otherwise: str = "") -> str:
    """A URL as it is, a file as a data URI."""
    if "://" in given or given.startswith("data:"):
        return given
    path = Path(given)
    if not path.is_file():
        fail(f"{argument} {given!r} is neither a file nor a URL{otherwise}")
    content_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{content_type};base64,{base64.b64encode(path.read_bytes()).decode()}"


def path_and_scale(lora: str) -> dict[str, object]:
    """PATH[:SCALE]; a path may have colons of its own."""
    path, _, scale = lora.rpartition(":")
    try:
        return {"path": path, "scale": float(scale)} if path else {"path": lora}
    except ValueError:
        if path.endswith(".safetensors"):
            fail(f"--lora {lora}: the scale {scale!r} is not a number")
        return {"path": lora}


def check_lora(lora: str) -> None:
    """What looks like a file has to be one; a repository has one slash, and no suffix."""
    path = str(path_and_scale(lora)["path"])
    local = path.startswith((".", "/", "~")) or path.endswith(".safetensors")
    if local and "://" not in path and path.count("/") != 2 and not Path(path).is_file():
        fail(f"--lora {lora}: there is no such file")


def image_size(size: str | None) -> object:
    if size is None or size == "auto" or size in PRESETS:
        return size
    width, _, height = size.lower().partition("x")
    if not (width.isdigit() and height.isdigit()):
        fail(f"--size {size}: give auto, WIDTHxHEIGHT such as 451x300, or {', '.join(PRESETS)}")
    return {"width": int(width), "height": int(height)}


def check_writable(out: Path) -> None:
    """Before minutes are spent on pictures that could not be kept. Makes nothing."""
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fail(f"--out {out} cannot be written: {error.strerror}")


async def interruptible(work: Coroutine[Any, Any, T]) -> T:
    """The first interrupt stops between two steps, the second at once."""
    task = asyncio.create_task(work)

    def stop() -> None:
        if task.cancelling():
            os._exit(130)
        console.print("stopping after this step; once more to stop at once")
        task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop)
    return await task


def timings_table(timings: dict[str, float], loaded: float) -> Table:
    table = Table("stage", "seconds", title="where the time went")
    table.add_row("start, load weights", f"{loaded:.3f}")
    outside = ("inference", "input_fetch", "input_decode", "output_store")
    for stage in sorted(timings, key=lambda stage: stage not in outside[1:3]):
        table.add_row(stage if stage in outside else f"  {stage}", f"{timings[stage]:.3f}")
    return table


def refused(body: dict[str, Any], code: int, print_json: bool) -> NoReturn:
    """Say what a response that is an error says."""
    if print_json:
        print(json.dumps(body, indent=2))
    detail = body["detail"]
    if isinstance(detail, str):
        console.print(f"[red]error:[/] {escape(detail)}", highlight=False)
    else:
        for item in detail:
            field = ".".join(map(str, item["loc"][1:]))
            name = option(field) if field else "request"
            console.print(
                f"[red]{escape(name)}:[/] {escape(item['msg'])} ({item['type']})", highlight=False
            )
    raise typer.Exit(code)


def fail(message: str, code: int = REFUSED) -> NoReturn:
    console.print(f"[red]error:[/] {escape(message)}", highlight=False)
    raise typer.Exit(code)
