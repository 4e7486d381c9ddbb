"""Composition root on one machine: the `zimage` command. Thin; what happens, happens in the packages."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import mimetypes
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from gateway.settings import Settings, SettingsError, describe, read
from schemas.task import Acceleration, Format

if TYPE_CHECKING:
    from gateway.once import Answer
    from gateway.platform import View
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
    _check(endpoint, body)
    answer = _run_once(settings, endpoint, body)
    if answer.status != 200:
        _refused(answer.body)
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
        seed_of = answer.body["seed"] + number - 1
        console.print(
            f"[green]wrote[/] {escape(str(path))} · seed {seed_of}{note}", highlight=False
        )
    if print_json:
        print(json.dumps(answer.body, indent=2))
    console.print(_timings_table(answer.body))
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
        f"zimage on [bold]{scheme}://{host}:{port}[/] · weights {escape(settings.weights)} "
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


def _run_once(settings: Settings, endpoint: str, body: dict[str, Any]) -> Answer:
    """Load, run one request, show how far it is."""
    from gateway.once import run_once
    from inference.aio import AsyncEngine

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading weights", total=None)
        engine = _load(settings)
        bar.update(task, description="preparing")

        def show(view: View) -> None:
            if progress := view.progress:
                total = progress.steps * progress.images
                done = round(progress.fraction * total)
                bar.update(task, description="denoising", completed=done, total=total)

        try:
            return asyncio.run(run_once(settings, AsyncEngine(engine), endpoint, body, show))
        finally:
            engine.close()


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


def _check(endpoint: str, body: dict[str, Any]) -> None:
    """Refuse what can be refused before weights are loaded."""
    from gateway.perform import parse
    from schemas.endpoints import ENDPOINTS
    from schemas.errors import ApiError

    try:
        parse(ENDPOINTS[endpoint], json.dumps(body).encode())
    except ApiError as error:
        _refused(error.body())


def _refused(body: dict[str, Any]) -> NoReturn:
    detail = body["detail"]
    if isinstance(detail, str):
        console.print(f"[red]error:[/] {escape(detail)}", highlight=False)
    else:
        for item in detail:
            name = ".".join(map(str, item["loc"][1:])) or "request"
            console.print(
                f"[red]{escape(name)}:[/] {escape(item['msg'])} ({item['type']})", highlight=False
            )
    raise typer.Exit(1)


def _fail(message: str) -> NoReturn:
    console.print(f"[red]error:[/] {escape(message)}", highlight=False)
    raise typer.Exit(2)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
