"""Composition root on one machine: the `zimage` command. Thin; what happens, happens in the packages."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import mimetypes
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from gateway.settings import Settings, SettingsError, describe, read
from schemas.task import Acceleration, Format

if TYPE_CHECKING:
    from inference.engine import Engine

app = typer.Typer(
    help="The fal.ai Z-Image API on your own machine.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
)
weights_app = typer.Typer(help="Look at weights and download them.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")

console = Console(stderr=True)

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
        typer.Option(help="`auto`, a preset such as `landscape_4_3`, or WIDTHxHEIGHT."),
    ] = None,
    num_images: Annotated[int, typer.Option(help="1 to 4 pictures.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Drawn and printed if not given.")] = None,
    format: Annotated[
        Format | None, typer.Option(help="jpeg, png or webp; otherwise from OUT's suffix.")
    ] = None,
    acceleration: Annotated[Acceleration | None, typer.Option(help="none, regular, high")] = None,
    safety: Annotated[bool, typer.Option(help="Blacken unsafe pictures.")] = True,
    weights: Annotated[
        str | None, typer.Option(help="`demo`, a directory, or a hub id[@revision].")
    ] = None,
    print_json: Annotated[bool, typer.Option("--json", help="Print the response body.")] = False,
) -> None:
    """Make pictures from a picture and a prompt, once, without a server."""
    output_format = format or _SUFFIXES.get(out.suffix.lower())
    if output_format is None:
        _fail(f"--out {out}: give it a suffix of {', '.join(_SUFFIXES)}, or say --format")
    body: dict[str, Any] = {
        "prompt": prompt,
        "num_images": num_images,
        "output_format": output_format,
        "enable_safety_checker": safety,
        "strength": strength,
        "num_inference_steps": steps,
        "image_size": _size(size),
        "seed": seed,
        "acceleration": acceleration,
    }
    endpoint = TEXT_TO_IMAGE
    if image != "-":
        endpoint = IMAGE_TO_IMAGE
        body["image_url"] = _image_url(image)
    body = {name: value for name, value in body.items() if value is not None}
    settings = _settings(weights=weights)
    with tempfile.TemporaryDirectory(prefix="zimage-") as home:
        settings = settings.model_copy(update={"home": Path(home)})
        finished = _run_once(settings, endpoint, body)
    if finished.status != 200:
        if print_json:
            print(json.dumps(finished.body, indent=2))
        _print_error(finished.body)
        raise typer.Exit(1)
    out.parent.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(finished.pictures, start=1):
        path = out.with_stem(f"{out.stem}-{number}") if len(finished.pictures) > 1 else out
        path.write_bytes(data)
        finished.body["images"][number - 1] |= {
            "url": path.absolute().as_uri(),
            "file_name": path.name,
        }
        flagged = finished.body["has_nsfw_concepts"][number - 1]
        note = "  [yellow]flagged by the safety checker: black[/]" if flagged else ""
        seed_of = finished.body["seed"] + number - 1
        console.print(f"[green]wrote[/] {path} · seed {seed_of}{note}", highlight=False)
    if print_json:
        print(json.dumps(finished.body, indent=2))
    console.print(_timings_table(finished.body))
    if settings.weights == "demo":
        console.print(
            "These are small demo weights. Real ones: "
            "[bold]zimage weights fetch Tongyi-MAI/Z-Image-Turbo[/] (about 20 GB), "
            "then [bold]ZIMAGE_WEIGHTS=Tongyi-MAI/Z-Image-Turbo[/].",
            highlight=False,
        )


@app.command(epilog=describe())
def serve(
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to bind.")] = 8000,
    home: Annotated[Path | None, typer.Option(help="State directory (ZIMAGE_HOME).")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key, PEM.")] = None,
) -> None:
    """Serve the fal API from this machine until stopped; restart to continue where it was."""
    import uvicorn

    from gateway.app import create_app
    from gateway.auth import keys_for
    from gateway.platforms.local import HomeInUse, LocalPlatform
    from inference.aio import AsyncEngine

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    settings = _settings(home=home)
    try:
        keys = keys_for(settings, default="off" if _is_loopback(host) else "on")
    except ValueError as error:
        _fail(str(error))
    engine = _load(settings)
    try:
        platform = LocalPlatform(settings, AsyncEngine(engine))
    except HomeInUse as error:
        _fail(str(error))
    scheme = "https" if tls_cert else "http"
    console.print(
        f"zimage on [bold]{scheme}://{host}:{port}[/] · weights {settings.weights} "
        f"({engine.weights.revision}) on {engine.device} · "
        f"keys {'off' if keys is None else 'on'} · docs at /docs",
        highlight=False,
    )
    uvicorn.run(
        create_app(settings, platform, keys),
        host=host,
        port=port,
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=10,
    )


@weights_app.command("info")
def weights_info(
    spec: Annotated[str | None, typer.Argument(help="Default: ZIMAGE_WEIGHTS.")] = None,
) -> None:
    """Where a set of weights is, its revision and its parts."""
    from inference.weights import COMPONENTS, WeightsError, locate

    try:
        weights = locate(spec or _settings().weights)
    except WeightsError as error:
        _fail(str(error))
    table = Table("component", "class", "MB", title=f"{weights.spec} · {weights.revision}")
    index = json.loads((weights.path / "model_index.json").read_text())
    for name in COMPONENTS:
        files = [file for file in (weights.path / name).rglob("*") if file.is_file()]
        megabytes = sum(file.stat().st_size for file in files) / 1e6
        table.add_row(name, index[name][1], f"{megabytes:,.1f}")
    Console().print(table)
    print(weights.path)


@weights_app.command("fetch")
def weights_fetch(
    spec: Annotated[str, typer.Argument(help="Hub id[@revision].")],
) -> None:
    """Download weights into the hub's cache, resuming what is there."""
    from inference.weights import WeightsError, fetch

    try:
        weights = fetch(spec)
    except WeightsError as error:
        _fail(str(error))
    except Exception as error:  # the hub client's errors are many and speak for themselves
        _fail(f"{spec} could not be downloaded: {error}")
    print(f"{weights.path}\nUse it with: ZIMAGE_WEIGHTS={spec}")


@dataclass(frozen=True)
class _Finished:
    status: int
    body: dict[str, Any]
    pictures: list[bytes]


def _run_once(settings: Settings, endpoint: str, body: dict[str, Any]) -> _Finished:
    """Send one request through the job path of a private platform."""
    from gateway.perform import parse
    from schemas.endpoints import ENDPOINTS
    from schemas.errors import ApiError

    try:
        parse(ENDPOINTS[endpoint], json.dumps(body).encode())  # before weights are loaded in vain
    except ApiError as error:
        return _Finished(error.status, error.body(), [])
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading weights", total=None)
        engine = _load(settings)

        def show(description: str, done: int, total: int | None) -> None:
            bar.update(task, description=description, completed=done, total=total)

        try:
            return asyncio.run(_submit_and_wait(settings, engine, endpoint, body, show))
        finally:
            engine.close()


async def _submit_and_wait(
    settings: Settings,
    engine: Engine,
    endpoint: str,
    body: dict[str, Any],
    show: Callable[[str, int, int | None], None],
) -> _Finished:
    import time
    import uuid

    from gateway.auth import ANONYMOUS
    from gateway.jobs import Job
    from gateway.platforms.local import LocalPlatform
    from inference.aio import AsyncEngine

    async with LocalPlatform(settings, AsyncEngine(engine)) as platform:
        job = Job(str(uuid.uuid4()), endpoint, ANONYMOUS, "file://", time.time())
        await platform.submit(job, json.dumps(body).encode())
        waiting = asyncio.create_task(platform.wait(job.request_id))
        while not waiting.done():
            await asyncio.wait([waiting], timeout=0.05)
            view = await platform.view(job.request_id)
            if view and (progress := view.progress):
                total = progress.steps * progress.images
                show("denoising", round(progress.fraction * total), total)
            else:
                show("preparing", 0, None)
        outcome = await waiting
        answer = json.loads(outcome.body)
        pictures = []
        for image in answer.get("images", []):
            data = await platform.files.get(image["file_name"])
            assert data is not None
            pictures.append(data)
        return _Finished(outcome.status, answer, pictures)


def _load(settings: Settings) -> Engine:
    from inference.engine import Engine
    from inference.weights import WeightsError

    try:
        return Engine.load(
            settings.weights,
            device=settings.device,
            safety_threshold=settings.safety_threshold,
        )
    except WeightsError as error:
        _fail(str(error))


def _settings(**overrides: object) -> Settings:
    """Settings from the environment; command-line options win."""
    try:
        return read(Settings, **overrides)
    except SettingsError as error:
        _fail(str(error))


def _image_url(image: str) -> str:
    if "://" in image or image.startswith("data:"):
        return image
    path = Path(image)
    if not path.is_file():
        _fail(f"IMAGE {image!r} is neither a file nor a URL (use - for text-to-image)")
    content_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{content_type};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _size(size: str | None) -> object:
    if size is None:
        return None
    width, x, height = size.lower().partition("x")
    if x and width.isdigit() and height.isdigit():
        return {"width": int(width), "height": int(height)}
    return size


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _timings_table(body: dict[str, Any]) -> Table:
    table = Table("stage", "seconds", title="where the time went")
    for stage, seconds in body["timings"].items():
        table.add_row(stage, f"{seconds:.3f}")
    return table


def _print_error(body: dict[str, Any]) -> None:
    detail = body["detail"]
    if isinstance(detail, str):
        console.print(f"[red]error:[/] {detail}", highlight=False)
        return
    for item in detail:
        name = ".".join(map(str, item["loc"][1:])) or "request"
        console.print(f"[red]{name}:[/] {item['msg']} ({item['type']})", highlight=False)


def _fail(message: str) -> NoReturn:
    console.print(f"[red]error:[/] {message}", highlight=False)
    raise typer.Exit(2)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
