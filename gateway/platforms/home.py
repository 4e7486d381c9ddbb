"""The directory of one process: locked while it runs, with its secrets."""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path
from typing import IO


class HomeInUse(Exception):
    """Another process works on the same home."""


def take(home: Path) -> IO[str]:
    """Make it if need be, and lock it as long as the file is open; the system lets go when the process
    dies. Raises HomeInUse, or OSError."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = (home / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise HomeInUse(
            f"{home} is in use by another zimage process; give this one its own ZIMAGE_HOME"
        ) from None
    return file


def secret(path: Path) -> bytes:
    """32 random bytes, made once. The home is locked: nobody else makes them."""
    if not (path.is_file() and path.stat().st_size == 32):
        partial = path.with_suffix(".part")
        with open(partial, "wb", opener=_private) as file:
            file.write(secrets.token_bytes(32))
        partial.rename(path)
    return path.read_bytes()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
