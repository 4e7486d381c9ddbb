"""Composition root on one machine: the `zimage` command. Thin; what happens, happens in the packages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.console import Console
from rich.table import Table

from gateway.commands import schedule, webhooks
from gateway.commands.engine import LocalEngine
from gateway.commands.run import run
from gateway.commands.serve import serve
from gateway.commands.terminal import FAILED, fail, read_settings
from gateway.settings import Settings, describe
from schemas.task import Acceleration, Variant

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    help="The fal.ai Z-Image API on your own machine.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
    epilog="Exit codes: 0 done; 1 begun and failed; 2 not begun, as something asked for or set cannot be; "
    "130 interrupted.",
)
weights_app = typer.Typer(help="Look at weights and download them.", no_args_is_help=True)
app.command()(run)
app.command(epilog=describe())(serve)
app.add_typer(weights_app, name="weights")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(schedule.app, name="schedule")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(version("zimage-endpoint"))
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="And exit.")
    ] = False,
) -> None:
    """The fal.ai Z-Image API on your own machine."""
    context.obj = open_engine


@contextmanager
def open_engine(settings: Settings, *wanted: Variant) -> Iterator[LocalEngine]:
    """The `OpenEngine` of the commands: weights in this process, tensor work on threads."""
    from inference.aio import AsyncEngine
    from inference.variants import Engines
    from inference.weights import WeightsError

    served = {
        name: spec for name, spec in settings.variants.items() if name in wanted or not wanted
    }
    device = _device(settings)
    try:
        engines = Engines(
            served,
            device=str(device),
            safety_threshold=settings.safety_threshold,
            loras=settings.lora_directory,
        )
    except WeightsError as error:
        fail(str(error))
    loaded = [f"{name} {spec} ({engines[name].weights.revision})" for name, spec in served.items()]
    engine = AsyncEngine(engines)
    try:
        yield LocalEngine(engine, f"{', '.join(loaded)} on {device}")
    finally:
        engine.close()
        engines.close()


def _device(settings: Settings) -> torch.device:
    from inference.plan import default_device, usable_device

    try:
        return usable_device(settings.device or default_device())
    except ValueError as error:
        fail(f"ZIMAGE_DEVICE: {error}")


@weights_app.command("info")
def weights_info(
    spec: Annotated[str | None, typer.Argument(help="Default: ZIMAGE_WEIGHTS.")] = None,
) -> None:
    """Where a set of weights is, its revision and its parts, what it takes of a GPU, and what
    acceleration means here."""

    from inference import memory
    from inference.plan import plan
    from inference.weights import COMPONENTS, WeightsError, locate

    settings = read_settings()
    try:
        weights = locate(spec or settings.weights)
    except WeightsError as error:
        fail(str(error))
    table = Table("component", "class", "MB", title=f"{weights.spec} · {weights.revision}")
    index = json.loads((weights.path / "model_index.json").read_text())
    for name in COMPONENTS:
        files = [file for file in (weights.path / name).rglob("*") if file.is_file()]
        megabytes = sum(file.stat().st_size for file in files) / 1e6
        table.add_row(name, index[name][1], f"{megabytes:,.1f}")
    Console().print(table)
    transformer, vae = weights.config("transformer"), weights.config("vae")
    table = Table("size", "weights", "denoising", "VAE decoding", "together", title="GiB of a GPU")
    for side in (512, 1024, 1536, 2048):
        denoise = memory.MARGIN * memory.denoise_bytes(transformer, side, side)
        decode = memory.MARGIN * memory.decode_bytes(vae, side, side)
        taken = (weights.bytes, denoise, decode, weights.bytes + max(denoise, decode))
        table.add_row(f"{side}²", *(f"{size / 2**30:.2f}" for size in taken))
    Console().print(table)
    print(
        "and about 1 for CUDA itself; "
        f"high takes {memory.float8_bytes(transformer) / 2**30:.2f} more, LoRAs what they change"
    )
    print(weights.path)
    print(f"expands prompts: {'yes' if weights.language_model else 'no'}")
    device = _device(settings)
    for level in get_args(Acceleration):
        print(f"{level} on {device}: {plan(level, device)}")


@weights_app.command("fetch")
def weights_fetch(
    spec: Annotated[str, typer.Argument(help="Hub id[@revision].")],
) -> None:
    """Download weights into the hub's cache, resuming what is there."""
    from inference.weights import WeightsError, fetch

    try:
        weights = fetch(spec)
    except WeightsError as error:
        fail(str(error))
    except Exception as error:  # the hub client's errors are many and speak for themselves
        fail(f"{spec} could not be downloaded: {error}", FAILED)
    print(f"{weights.path}\nUse it with: ZIMAGE_WEIGHTS={spec}")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
