"""LoRA files: from wherever a request names them into one directory, where the engine finds them.

    URL, upload, hub repository, name in the directory  →  <SHA-256>.safetensors

A file's header is checked as soon as it is here (`schemas.lora`), so one that is not for Z-Image costs no
GPU second. What a URL held is believed for TRUSTED seconds; what was used longest ago makes room when
the directory is full. Files that the operator put there by name stay. HF_ENDPOINT is the hub, and
HF_TOKEN what it is shown, so that private repositories can be read.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import mmap
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote
from weakref import WeakValueDictionary

from gateway.fetch import Fetcher
from gateway.files import Files, own_name
from schemas.errors import InputError, Loc
from schemas.lora import LoraError, adapters
from schemas.safetensors import read_header

logger = logging.getLogger(__name__)

MAX_BYTES = 2 * 2**30
"""Of one file. Rank 128 on all layers of Z-Image has 0.8 GB."""

DIRECTORY_BYTES = 40 * 2**30
FETCH_SECONDS = 180.0
TRUSTED = 3600.0
SPARED = 3600.0
"""Seconds since its last use for which a file stays in a full directory: its request may wait still."""

_NAMED = re.compile(r"\w[\w .-]{0,199}")
_REPOSITORY = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(/(?P<file>\w[\w ./-]*\.safetensors))?")
_DIGEST = re.compile("[0-9a-f]{64}")
_PREFERRED = "pytorch_lora_weights.safetensors"


async def _nothing() -> None:
    pass


class LoraStore:
    """`await store(path, loc)` → digest.

    saved: called when a file has come, to make it durable; refresh: when one is missed, that may have
    been put into the directory elsewhere.
    """

    def __init__(
        self,
        directory: Path,
        fetcher: Fetcher,
        files: Files,
        saved: Callable[[], Awaitable[None]] = _nothing,
        refresh: Callable[[], Awaitable[None]] = _nothing,
    ) -> None:
        self._directory, self._sources = directory, directory / "sources"
        self._fetcher, self._files, self._saved = fetcher, files, saved
        self._refresh = refresh
        self._one_at_a_time: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self._token = _hub_token()

    async def __call__(self, path: str, loc: Loc) -> str:
        """The file's SHA-256. Raises InputError: file_download_error, file_too_large, value_error."""
        self._sources.mkdir(parents=True, exist_ok=True)
        if path.startswith(("http://", "https://")):
            return await self._known_or(own_name(path) or path, lambda: self._from_url(path, loc))
        if _NAMED.fullmatch(path):
            named = self._directory / f"{path.removesuffix('.safetensors')}.safetensors"
            if not named.is_file():
                await self._refresh()
            if named.is_file() and not _DIGEST.fullmatch(named.stem):
                key = f"{named.name} {named.stat().st_mtime_ns}"
                return await self._known_or(key, lambda: self._receive(_read(named), loc))
        if match := _REPOSITORY.fullmatch(path):
            return await self._known_or(path, lambda: self._from_hub(match, loc))
        raise InputError(
            loc,
            "There is no LoRA of this name here, and it is no URL and no owner/repository",
            "value_error",
            input=path,
        )

    async def _known_or(self, key: str, get: Callable[[], Awaitable[str]]) -> str:
        source = self._sources / hashlib.sha256(key.encode()).hexdigest()
        async with self._one_at_a_time.setdefault(key, asyncio.Lock()):
            with suppress(FileNotFoundError):
                if time.time() - source.stat().st_mtime < TRUSTED:
                    digest = source.read_text()
                    os.utime(self._path(digest))  # used; and still there
                    return digest
            digest = await get()
            await self._saved()  # before the note: whoever reads it sends a GPU there
            source.write_text(digest)
            return digest

    async def _from_url(self, url: str, loc: Loc) -> str:
        if name := own_name(url):  # a file of ours: no way through the network
            chunks = await self._files.stream(name)
            if chunks is not None:
                return await self._receive(chunks, loc)
        return await self._download(url, loc)

    async def _from_hub(self, match: re.Match[str], loc: Loc) -> str:
        file = match["file"]
        if file is None:
            listing = await self._fetcher(f"{self._hub}/api/models/{match['id']}", loc, self._token)
            found = [
                name
                for name in re.findall(
                    r'"rfilename": ?"([^"\\]+)"', listing.decode(errors="replace")
                )
                if name.endswith(".safetensors")
            ]
            if _PREFERRED in found:
                found = [_PREFERRED]
            if len(found) != 1:
                raise InputError(
                    loc,
                    f"{match['id']} has {len(found)} .safetensors files: say which, "
                    "owner/repository/file.safetensors",
                    "value_error",
                    input=match.string,
                )
            file = found[0]
        url = f"{self._hub}/{match['id']}/resolve/main/{quote(file)}"
        return await self._download(url, loc, match.string, self._token)

    async def _download(
        self, url: str, loc: Loc, named: str | None = None, token: str | None = None
    ) -> str:
        with _Incoming(self._directory, loc) as incoming:
            await self._fetcher.download(
                url, incoming.write, loc, seconds=FETCH_SECONDS, named=named or url, token=token
            )
            return await asyncio.to_thread(self._keep, incoming)

    async def _receive(self, chunks: AsyncIterator[bytes], loc: Loc) -> str:
        with _Incoming(self._directory, loc) as incoming:
            async for chunk in chunks:
                incoming.write(chunk)
            return await asyncio.to_thread(self._keep, incoming)

    def _keep(self, incoming: _Incoming) -> str:
        incoming.check()
        digest = incoming.digest.hexdigest()
        incoming.path.rename(self._path(digest))
        self._make_room()
        return digest

    def _make_room(self) -> None:
        """Delete what a killed process left half-way, and what was used longest ago."""
        found, now = [], time.time()
        for file in self._directory.iterdir():
            with suppress(FileNotFoundError):  # another thread was quicker
                stat = file.stat()
                if file.suffix == ".part" and now - stat.st_mtime > 2 * FETCH_SECONDS:
                    file.unlink()
                elif _DIGEST.fullmatch(file.stem):
                    found.append((stat.st_mtime, stat.st_size, file))
        total = sum(size for _, size, _ in found)
        for used, size, file in sorted(found):
            if total <= DIRECTORY_BYTES or now - used < SPARED:
                return
            file.unlink(missing_ok=True)
            total -= size

    def _path(self, digest: str) -> Path:
        return self._directory / f"{digest}.safetensors"


class _Incoming:
    """A file on its way in. It is gone when the block ends, unless it was renamed."""

    def __init__(self, directory: Path, loc: Loc) -> None:
        self.path = directory / f"{secrets.token_hex(8)}.part"
        self.digest = hashlib.sha256()
        self._loc, self._size = loc, 0

    def __enter__(self) -> _Incoming:
        self._file = self.path.open("wb")
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)

    def write(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._size > MAX_BYTES:
            message = f"File size exceeds the maximum of {MAX_BYTES} bytes"
            raise InputError(self._loc, message, "file_too_large", ctx={"max_size": MAX_BYTES})
        self.digest.update(chunk)
        self._file.write(chunk)

    def check(self) -> None:
        """Raises InputError for a file that is no LoRA for Z-Image, as far as its header tells."""
        self._file.close()
        try:
            if not self._size:
                raise LoraError("not a safetensors file: it is empty")
            with (
                self.path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
                memoryview(content) as view,
            ):
                adapters(*read_header(view))
        except LoraError as error:
            raise InputError(
                self._loc, f"This LoRA cannot be used: {error}", "value_error"
            ) from None


async def _read(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while chunk := await asyncio.to_thread(file.read, 1 << 20):
            yield chunk


def _hub_token() -> str | None:
    """One that cannot be a header would be told in the error about it, and logged."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and not re.fullmatch("[!-~]+", token):
        logger.error("HF_TOKEN has characters that no token has: it is not used")
        return None
    return token or None
