"""Output files: stored under unguessable names, served at /files/…, deleted when due.

A name is 192 random bits and a suffix; whoever has the URL may read the file, as with fal's own.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

NAME = re.compile(r"[A-Za-z0-9_-]{32}\.(jpeg|png|webp)")
URL_PATH = "/files/"


class Files(Protocol):
    """Where outputs live: a directory, a Volume, a bucket."""

    async def put(self, data: bytes, suffix: str) -> str:
        """Store and return the new name. Readable under it as soon as this returns."""
        ...

    async def get(self, name: str) -> bytes | None:
        """The content, or None for a name that is unknown, deleted or malformed."""
        ...


def new_name(suffix: str) -> str:
    return f"{secrets.token_urlsafe(24)}.{suffix}"


class DirectoryFiles:
    """Files in one flat directory. Writes appear whole or not at all."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory

    async def put(self, data: bytes, suffix: str) -> str:
        name = new_name(suffix)
        await asyncio.to_thread(write_whole, self._directory / name, data)
        return name

    async def get(self, name: str) -> bytes | None:
        if not NAME.fullmatch(name):
            return None
        try:
            return await asyncio.to_thread((self._directory / name).read_bytes)
        except FileNotFoundError:
            return None

    def sweep(self, seconds: float) -> int:
        """Delete what is older than `seconds`, half-written files included; returns how many."""
        deadline, deleted = time.time() - seconds, 0
        for path in self._directory.iterdir():
            with suppress(FileNotFoundError):  # a .part that has just got its name
                if path.stat().st_mtime < deadline:
                    path.unlink()
                    deleted += 1
        return deleted


def write_whole(path: Path, data: bytes) -> None:
    """Write beside and rename, so that a reader never sees half a file."""
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(data)
    partial.rename(path)
