"""`zimage schedule`: what a file of schedules makes, and when; one run of it; or all of them, for ever."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gateway.commands.engine import platform_and_engine
from gateway.commands.terminal import FAILED, console, fail, read_settings
from gateway.schedules import Schedule, ScheduleError, keep, load, run, saving_below
from gateway.settings import Settings

app = typer.Typer(
    help="Pictures on a schedule. An entry's `output` is a folder beside the file that it is in.",
    no_args_is_help=True,
)

_File = Annotated[Path | None, typer.Option("--file", help="TOML. Default: ZIMAGE_SCHEDULES.")]
_Home = Annotated[Path | None, typer.Option("--home", help="Default: ZIMAGE_HOME.")]

_SERVE_RUNS_THEM = "; `zimage serve` with ZIMAGE_SCHEDULES runs schedules beside the API"


@app.command("list")
def list_schedules(file: _File = None) -> None:
    """Entries of the file: when they are due next, and how many requests they make then."""
    table = Table("name", "next", "requests", "endpoint", "output", box=None)
    table.columns[1].no_wrap = True
    now = datetime.now().astimezone()
    for each in _load(_path(read_settings(), file)):
        at = each.next(now)
        table.add_row(
            *(each.name, f"{at:%Y-%m-%d %H:%M %Z}", str(len(each.requests(at)))),
            *(each.endpoint, each.output or ""),
        )
    Console().print(table)


@app.command("run")
def run_schedule(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="An entry of the file.")],
    file: _File = None,
    home: _Home = None,
    at: Annotated[
        datetime | None, typer.Option(help="When it was due. Default: the last time it was.")
    ] = None,
) -> None:
    """Make what an entry was due to make. Again for the same time, it makes nothing twice."""
    settings = read_settings(home=home)
    path = _path(settings, file)
    found = {each.name: each for each in _load(path)}
    if name not in found:
        fail(f"no schedule {name!r}; there is {', '.join(found) or 'none'}")
    schedule = found[name]
    due = schedule.due((at or datetime.now()).astimezone())

    async def once() -> int:
        async with platform:
            ran = await run(platform, schedule, due, _origin(settings), saving_below(path.parent))
        for each in ran:
            pictures = each.pictures
            if schedule.output is not None:
                pictures = [str(path.parent / picture) for picture in pictures]
            print(json.dumps({"request_id": each.request_id, "error": each.error}), *pictures)
        if schedule.output is None:
            console.print(f"{name} has no output folder: `zimage serve` has these pictures")
        return sum(each.error is not None for each in ran)

    with platform_and_engine(settings, context.obj, _SERVE_RUNS_THEM) as (platform, _):
        try:
            failed = asyncio.run(once())
        except ScheduleError as error:
            fail(str(error))
    if failed:
        fail(f"{failed} requests failed", FAILED)


@app.command("serve")
def serve_schedules(context: typer.Context, file: _File = None, home: _Home = None) -> None:
    """Run every entry whenever it is due, without a server. (`zimage serve` does so beside the API.)"""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    settings = read_settings(home=home)
    path = _path(settings, file)
    schedules = _load(path)

    async def forever() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        async with platform:
            await keep(platform, schedules, _origin(settings), saving_below(path.parent))

    with (
        platform_and_engine(settings, context.obj, _SERVE_RUNS_THEM) as (platform, _),
        suppress(asyncio.CancelledError),
    ):  # stopped: what is in progress goes on at the next start
        asyncio.run(forever())


def _path(settings: Settings, file: Path | None) -> Path:
    path = file or settings.schedules
    if path is None:
        fail("which file? Say --file, or set ZIMAGE_SCHEDULES")
    return path


def _load(path: Path) -> list[Schedule]:
    try:
        return load(path)
    except ScheduleError as error:
        fail(str(error))


def _origin(settings: Settings) -> str:
    return settings.public_url or "http://127.0.0.1:8000"
