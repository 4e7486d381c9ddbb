"""Files: outputs and uploads, stored under unguessable names, served at /files/…, gone when due.

A name is 192 random bits, the second at which the file expires, and a suffix that says its type:
whoever has the URL may read the file until then, as with fal's own.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import shutil
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

CONTENT_TYPES = {
    "jpeg": "image/jpeg",
    "png": "image/png",
    "webp": "image/webp",
    "gif": "image/gif",
    "avif": "image/avif",
    "bin": "application/octet-stream",
}
"""Suffix → type. Nothing that a browser would run."""

NAME = re.compile(rf"[A-Za-z0-9_-]{{32}}\.(\d{{10}})\.({'|'.join(CONTENT_TYPES)})")
URL_PATH = "/files/"
FOREVER = 100 * 365.25 * 24 * 3600
"""Seconds that a file lives whose owner said never to delete it."""

CHUNK = 1 << 20

SMALL = 64 * 1024
"""Bytes up to which writing is quicker than asking a thread to."""

PART_SECONDS = 24 * 3600.0
"""Age at which parts of an upload that was never completed are deleted."""


class TooLarge(Exception):
    """More bytes came than may be stored."""


class Files(Protocol):
    """Where files live: a directory, a Volume, a bucket."""

    async def put(self, data: bytes, suffix: str, lifetime: float) -> str:
        """Store for `lifetime` seconds and return the new name. Readable as soon as this returns."""
        ...

    async def stream(self, name: str) -> AsyncIterator[bytes] | None:
        """The content in pieces, or None for a name that is unknown, expired or malformed."""
        ...

    async def get(self, name: str, limit: int = sys.maxsize) -> bytes | None:
        """The content at once, at most `limit` bytes; None as above. Raises TooLarge."""
        chunks = await self.stream(name)
        if chunks is None:
            return None
        data = bytearray()
        async for chunk in chunks:
            data += chunk
            if len(data) > limit:
                raise TooLarge
        return bytes(data)

    async def write(self, name: str, chunks: AsyncIterator[bytes], limit: int) -> int:
        """Store an upload under a `new_name`; returns its bytes. Raises TooLarge."""
        ...

    async def write_part(
        self, name: str, number: int, chunks: AsyncIterator[bytes], limit: int
    ) -> int:
        """Store one part of an upload, beside others that are under way. Raises TooLarge."""
        ...

    async def join(self, name: str, numbers: list[int], limit: int) -> None:
        """Make a file of its parts, in this order. Raises FileNotFoundError, TooLarge."""
        ...


def new_name(suffix: str, lifetime: float) -> str:
    return f"{secrets.token_urlsafe(24)}.{int(time.time() + lifetime):010d}.{suffix}"


def expired(name: str, now: float) -> bool:
    """Whether a file is due, or its name none of ours."""
    match = NAME.fullmatch(name)
    return match is None or int(match[1]) <= now


def own_name(url: str) -> str | None:
    """The name in a URL that looks like one of ours, whatever its host: a name is enough to read by."""
    _, found, name = url.partition(URL_PATH)
    return name if found and NAME.fullmatch(name) else None


class DirectoryFiles(Files):
    """Files in one flat directory. Writes appear whole or not at all."""

    def __init__(self, directory: Path) -> None:
        self._parts = directory / "parts"
        self._parts.mkdir(parents=True, exist_ok=True)
        self._directory = directory

    async def put(self, data: bytes, suffix: str, lifetime: float) -> str:
        name = new_name(suffix, lifetime)
        if len(data) <= SMALL:
            write_whole(self._directory / name, data)
        else:
            await asyncio.to_thread(write_whole, self._directory / name, data)
        return name

    async def stream(self, name: str) -> AsyncIterator[bytes] | None:
        if expired(name, time.time()):
            return None
        try:
            return _read(await asyncio.to_thread((self._directory / name).open, "rb"))
        except FileNotFoundError:
            return None

    async def write(self, name: str, chunks: AsyncIterator[bytes], limit: int) -> int:
        return await _receive(self._directory / name, chunks, limit)

    async def write_part(
        self, name: str, number: int, chunks: AsyncIterator[bytes], limit: int
    ) -> int:
        others = [
            path for path in self._parts.glob(f"{name}.*") if path != self._part(name, number)
        ]
        limit -= sum(path.stat().st_size for path in others)
        return await _receive(self._part(name, number), chunks, limit)

    async def join(self, name: str, numbers: list[int], limit: int) -> None:
        parts = [self._part(name, number) for number in numbers]
        await asyncio.to_thread(_join, self._directory / name, parts, limit)

    def _part(self, name: str, number: int) -> Path:
        return self._parts / f"{name}.{number}"

    def sweep(self) -> int:
        """Delete what has expired, and what was never completed; returns how many files."""
        now, deleted = time.time(), 0
        for path in (*self._directory.iterdir(), *self._parts.iterdir()):
            with suppress(FileNotFoundError):  # a .part that has just got its name
                whole = path.parent == self._directory and path.suffix != ".part"
                due = expired(path.name, now) if whole else _old(path, now)
                if path.is_file() and due:
                    path.unlink()
                    deleted += 1
        return deleted


async def _read(file: IO[bytes]) -> AsyncIterator[bytes]:
    with file:
        while chunk := await asyncio.to_thread(file.read, CHUNK):
            yield chunk


def _old(path: Path, now: float) -> bool:
    return path.stat().st_mtime < now - PART_SECONDS


def write_whole(path: Path, data: bytes) -> None:
    """Write beside and rename, so that a reader never sees half a file."""
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_bytes(data)
        partial.rename(path)
    except OSError:
        partial.unlink(missing_ok=True)  # a full disk wants its room back
        raise


async def _receive(path: Path, chunks: AsyncIterator[bytes], limit: int) -> int:
    partial, size = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part"), 0
    file: IO[bytes] = await asyncio.to_thread(partial.open, "wb")
    try:
        with file:
            async for chunk in chunks:
                size += len(chunk)
                if size > limit:
                    raise TooLarge
                await asyncio.to_thread(file.write, chunk)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    return size


def _join(path: Path, parts: Iterable[Path], limit: int) -> None:
    if path.exists():  # completed before; the answer was lost
        return
    parts = list(parts)
    if sum(part.stat().st_size for part in parts) > limit:
        raise TooLarge
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with partial.open("wb") as whole:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    for part in parts:
        part.unlink(missing_ok=True)
