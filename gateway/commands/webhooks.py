"""`zimage webhooks`: what was sent, what will be, and the key that signs it."""

from __future__ import annotations

import json
import sqlite3
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gateway.commands.terminal import FAILED, fail, read_settings

app = typer.Typer(help="Webhooks: attempts and signing keys.", no_args_is_help=True)

_Home = Annotated[Path | None, typer.Option("--home", help="Default: ZIMAGE_HOME.")]


def _home(given: Path | None) -> Path:
    home = given or read_settings().home
    if not home.is_dir():
        fail(f"{home} does not exist; `zimage serve` makes it")
    return home


@app.command("list")
def list_webhooks(
    home: _Home = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object for each.")] = False,
) -> None:
    """Webhooks on record, newest first: attempts, what the receiver last answered, what is next."""
    from gateway.platforms.tables import read_webhooks

    try:
        rows = read_webhooks(_home(home))
    except FileNotFoundError as error:
        fail(str(error))
    except sqlite3.OperationalError as error:
        fail(str(error), FAILED)
    if as_json:
        print(json.dumps([{**row, "state": state(row)} for row in rows], indent=1))
        return
    table = Table("request", "URL", "attempts", "last answer", "state", box=None)
    for column in table.columns[:2]:
        column.overflow = "fold"
    for row in rows:
        table.add_row(
            *(row["request_id"], row["url"], str(row["attempts"])),
            *(row["answer"] or "", state(row)),
        )
    Console().print(table)


def state(row: dict[str, Any]) -> str:
    if row["delivered"] is not None:
        return f"delivered {_time(row['delivered'])}"
    return "given up" if row["due"] is None else f"next attempt {_time(row['due'])}"


@app.command("rotate-key")
def rotate_key(home: _Home = None) -> None:
    """Publish a new signing key. It signs from tomorrow, when no receiver's cache lacks it."""
    from gateway.signing import DirectorySigner

    starts = DirectorySigner(_home(home) / "webhook-keys", time.time()).rotate(time.time())
    print(f"The new key is published now and signs from {_time(starts)}.")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
