"""Files on a Modal Volume, through its API and not a mount: readable everywhere as soon as written."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import tempfile
import time
from collections.abc import AsyncIterator
from typing import BinaryIO

import modal
from modal.types import FileEntry, FileEntryType

from gateway.files import NAME, PART_SECONDS, Files, TooLarge, expired, new_name


class VolumeFiles(Files):
    def __init__(self, volume: modal.Volume) -> None:
        self._volume = volume

    async def put(self, data: bytes, suffix: str, lifetime: float) -> str:
        name = new_name(suffix, lifetime)
        await self._upload(io.BytesIO(data), name)
        return name

    async def save(self, path: str, data: bytes) -> None:
        """Store under a path of the caller's choice, for ever."""
        await self._upload(io.BytesIO(data), path)

    async def stream(self, name: str) -> AsyncIterator[bytes] | None:
        if expired(name, time.time()):
            return None
        chunks = self._volume.read_file.aio(name)
        try:
            first = await anext(chunks, b"")
        except FileNotFoundError:
            return None
        return _chain(first, chunks)

    async def write(self, name: str, chunks: AsyncIterator[bytes], limit: int) -> int:
        with tempfile.TemporaryFile() as file:
            size = await _spool(chunks, file, limit)
            await self._upload(file, name)
        return size

    async def write_part(
        self, name: str, number: int, chunks: AsyncIterator[bytes], limit: int
    ) -> int:
        path = f"parts/{name}.{number}"
        others = [
            entry async for entry in self._entries() if entry.path.startswith(f"parts/{name}.")
        ]
        limit -= sum(entry.size for entry in others if entry.path != path)
        return await self.write(path, chunks, limit)

    async def join(self, name: str, numbers: list[int], limit: int) -> None:
        if await self.stream(name) is not None:  # completed before; the answer was lost
            return
        parts = [f"parts/{name}.{number}" for number in numbers]
        with tempfile.TemporaryFile() as file:
            for part in parts:
                limit -= await _spool(self._volume.read_file.aio(part), file, limit)
            await self._upload(file, name)
        for part in parts:
            await self._volume.remove_file.aio(part)

    async def _entries(self) -> AsyncIterator[FileEntry]:
        """All files, with paths that begin like names."""
        for entry in await self._volume.listdir.aio("/", recursive=True):
            if entry.type == FileEntryType.FILE:
                yield dataclasses.replace(entry, path=entry.path.strip("/"))

    async def _upload(self, file: BinaryIO, name: str) -> None:
        file.seek(0)
        async with self._volume.batch_upload.aio(force=True) as batch:
            batch.put_file(file, f"/{name}")

    async def sweep(self) -> int:
        """Delete what has expired, and what was never completed; returns how many files."""
        now = time.time()
        due = [
            entry.path
            async for entry in self._entries()
            if (
                entry.mtime < now - PART_SECONDS
                if entry.path.startswith("parts/")
                else NAME.fullmatch(entry.path) and expired(entry.path, now)
            )
        ]
        for path in due:
            await self._volume.remove_file.aio(path)
        return len(due)


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk


async def _spool(chunks: AsyncIterator[bytes], file: BinaryIO, limit: int) -> int:
    """Append chunks to a file; returns their bytes. Raises TooLarge."""
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise TooLarge
        await asyncio.to_thread(file.write, chunk)
    return size
