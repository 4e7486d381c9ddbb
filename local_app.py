"""Composition root on one machine: the `zimage` command. Thin; what happens, happens in the packages."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from gateway import schedule_commands, webhook_commands
from gateway.settings import Settings, SettingsError, describe, read
from gateway.terminal import (
    check_certificate,
    check_lora,
    check_writable,
    console,
    fail,
    image_size,
    image_url,
    interruptible,
    path_and_scale,
    refused,
    timings_table,
)
from schemas.endpoints import ENDPOINTS
from schemas.task import Acceleration, Format, Result, Task, Variant
from schemas.task import Progress as Step

if TYPE_CHECKING:
    from gateway.once import Answer
    from gateway.platform import Platform, View
    from inference.variants import Engines

app = typer.Typer(
    help="The fal.ai Z-Image API on your own machine.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
)


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
    context.obj = _platform


weights_app = typer.Typer(help="Look at weights and download them.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")
app.add_typer(webhook_commands.app, name="webhooks")
app.add_typer(schedule_commands.app, name="schedule")


IMAGE_TO_IMAGE, TEXT_TO_IMAGE = "fal-ai/z-image/turbo/image-to-image", "fal-ai/z-image/turbo"
_SUFFIXES: dict[str, Format] = {
    ".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"
}  # fmt: skip


@app.command()
def run(
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
    endpoint = TEXT_TO_IMAGE
    if image != "-":
        endpoint = IMAGE_TO_IMAGE
        body["image_url"] = image_url(image)
    elif strength is not None or size == "auto":
        fail("--strength and --size auto need an input picture")
    if lora:
        endpoint += "/lora"
        for each in lora:
            check_lora(each)
    body = {name: value for name, value in body.items() if value is not None}
    settings = _settings(weights=weights)
    _check(endpoint, body)
    check_writable(out)
    answer, loaded = _run_once(settings, endpoint, body)
    if answer.status != 200:
        if print_json:
            print(json.dumps(answer.body, indent=2))
        refused(answer.body)
    for number, data in enumerate(answer.files, start=1):
        path = out.with_stem(f"{out.stem}-{number}") if len(answer.files) > 1 else out
        path.write_bytes(data)
        answer.body["images"][number - 1] |= {
            "url": path.absolute().as_uri(),
            "file_name": path.name,
        }
        flagged = answer.body["has_nsfw_concepts"][number - 1]
        note = "  [yellow]flagged by the safety checker: black[/]" if flagged else ""
        seed_of = answer.body["seed"] + number - 1
        console.print(
            f"[green]wrote[/] {escape(str(path))} · seed {seed_of}{note}", highlight=False
        )
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


@app.command(epilog=describe())
def serve(
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to bind.")] = 8000,
    home: Annotated[Path | None, typer.Option(help="State directory (ZIMAGE_HOME).")] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Certificate chain, PEM.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Private key, PEM.")
    ] = None,
) -> None:
    """Serve the fal API from this machine until stopped; restart to continue where it was."""
    import uvicorn

    from gateway.app import create_app
    from gateway.auth import keys_for
    from gateway.platforms.local import HomeInUse, LocalPlatform
    from gateway.schedules import ScheduleError, check_keys, keep, load, saving_below
    from inference.aio import AsyncEngine

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    settings = _settings(home=home)
    try:
        keys = keys_for(settings, default="off" if _is_loopback(host) else "on")
    except ValueError as error:
        fail(str(error))

    check_certificate(tls_cert, tls_key)
    try:
        schedules = load(settings.schedules) if settings.schedules else []
        check_keys(schedules, keys)
    except ScheduleError as error:
        fail(str(error))

    async def generate(task: Task, on_progress: Callable[[Step], None]) -> Result:
        return await engine_async(task, on_progress)

    try:
        platform = LocalPlatform(settings, generate)
    except HomeInUse as error:
        fail(str(error))
    except OSError as error:
        fail(f"ZIMAGE_HOME {settings.home} cannot be used: {error.strerror}")
    try:
        listener = _bind(host, port)
    except OSError as error:
        fail(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port")
    engines = _load(settings)  # minutes, for real weights: whatever can fail sooner comes before
    engine_async = AsyncEngine(engines)
    shown = f"[{host}]" if ":" in host else host
    url = f"{'https' if tls_cert else 'http'}://{shown}:{listener.getsockname()[1]}"
    console.print(
        f"zimage on {url} · documentation {url}/docs\n"
        f"weights {_shown(engines, settings)} · "
        f"keys {'off' if keys is None else 'on'} · home {settings.home}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    config = uvicorn.Config(
        create_app(
            settings,
            platform,
            keys,
            keep(platform, schedules, settings.public_url or url, saving_below(Path.cwd())),
        ),
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=10,
    )
    uvicorn.Server(config).run(sockets=[listener])


@weights_app.command("info")
def weights_info(
    spec: Annotated[str | None, typer.Argument(help="Default: ZIMAGE_WEIGHTS.")] = None,
) -> None:
    """Where a set of weights is, its revision and its parts, what it takes of a GPU, and what
    acceleration means here."""
    import torch

    from inference import memory
    from inference.plan import default_device, plan
    from inference.weights import COMPONENTS, WeightsError, locate

    settings = _settings()
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
    device = torch.device(settings.device or default_device())
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
        fail(f"{spec} could not be downloaded: {error}")
    print(f"{weights.path}\nUse it with: ZIMAGE_WEIGHTS={spec}")


def _run_once(settings: Settings, endpoint: str, body: dict[str, Any]) -> tuple[Answer, float]:
    """Load, run one request, show how far it is. With the seconds that loading took."""
    from gateway.once import run_once
    from inference.aio import AsyncEngine

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
        engine = _load(settings, ENDPOINTS[endpoint].variant)
        loaded = time.perf_counter() - started
        bar.update(task, description="preparing")

        def show(view: View) -> None:
            if progress := view.progress:
                total = progress.steps * progress.images
                done = round(progress.fraction * total)
                bar.update(task, description="denoising", completed=done, total=total)

        try:
            once = run_once(settings, AsyncEngine(engine), endpoint, body, show)
            return asyncio.run(interruptible(once)), loaded
        except asyncio.CancelledError:
            raise typer.Exit(130) from None
        finally:
            engine.close()


@asynccontextmanager
async def _platform(settings: Settings) -> AsyncIterator[Platform]:
    """A platform with an engine, for commands that make pictures without a server."""
    from gateway.platforms.local import LocalPlatform
    from inference.aio import AsyncEngine

    async def generate(task: Task, on_progress: Callable[[Step], None]) -> Result:
        return await engine_async(task, on_progress)

    platform = LocalPlatform(settings, generate)  # before minutes are spent on weights
    engine_async = AsyncEngine(engine := _load(settings))
    try:
        async with platform:
            yield platform
    finally:
        engine_async.close()
        engine.close()


def _load(settings: Settings, *wanted: Variant) -> Engines:
    """Engines of the wanted variants, or of all that are served."""
    from inference.variants import Engines
    from inference.weights import WeightsError

    try:
        return Engines(
            {
                name: spec
                for name, spec in settings.variants.items()
                if name in wanted or not wanted
            },
            device=settings.device,
            safety_threshold=settings.safety_threshold,
            loras=settings.lora_directory,
        )
    except WeightsError as error:
        fail(str(error))


def _shown(engines: Engines, settings: Settings) -> str:
    parts = [
        f"{variant} {spec} ({engines[variant].weights.revision})"
        for variant, spec in settings.variants.items()
    ]
    return f"{', '.join(parts)} on {engines['turbo'].device}"


def _settings(**overrides: object) -> Settings:
    """Settings from the environment; command-line options win."""
    try:
        return read(Settings, **overrides)
    except SettingsError as error:
        fail(str(error))


def _bind(host: str, port: int) -> socket.socket:
    """Take the port, without listening yet: until the weights are there, connections are refused."""
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    return bound


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check(endpoint: str, body: dict[str, Any]) -> None:
    """Refuse what can be refused before weights are loaded."""
    from gateway.inputs import parse
    from schemas.errors import ApiError

    try:
        parse(ENDPOINTS[endpoint], json.dumps(body).encode())
    except ApiError as error:
        refused(error.body())


def main() -> None:
    app()


if __name__ == "__main__":
    main()
