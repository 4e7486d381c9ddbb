"""Hostile pictures, decoded in processes of their own (`media.worker`), with a deadline.

At most `workers` decode at a time, each for at most SECONDS; one that is late, that dies or whose
caller is cancelled is killed and replaced. What they can take of memory is their own affair.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from typing import Any

from schemas.errors import InputError, Loc
from schemas.sizes import ImageSize, Size
from schemas.task import Picture

SECONDS = 5.0
WORKERS = 2
_MAX_HEADER = 64 * 1024
_START_SECONDS = 60.0
_NEEDED = ("LD_LIBRARY_PATH", "PYTHONHOME")

_DIED = (
    TimeoutError,
    asyncio.IncompleteReadError,
    asyncio.LimitOverrunError,
    ConnectionError,
    RuntimeError,  # uvloop's word for a closed pipe
    ValueError,
)
"""What talking to a process raises that is late, gone or out of its mind."""

logger = logging.getLogger(__name__)


class Decoder:
    """`await decoder(data, image_size)` → the picture at its generation size, and the exact size."""

    def __init__(self, workers: int = WORKERS, seconds: float = SECONDS) -> None:
        self._slots = asyncio.Semaphore(workers)
        self._idle: list[asyncio.subprocess.Process] = []
        self._seconds = seconds

    async def __call__(
        self, data: bytes, image_size: ImageSize | str, loc: Loc = ("body", "image_url")
    ) -> tuple[Picture, Size]:
        """Raises InputError, of the types of `media.decode.decode`."""
        async with self._slots:
            process = self._take_idle() or await _start()
            try:
                async with asyncio.timeout(self._seconds):
                    header, rgb = await _ask(process, data, image_size, loc)
            except _DIED:
                await _kill(process)
                raise InputError(loc, "Image load error", "image_load_error") from None
            except BaseException:
                await _kill(process)
                raise
            self._idle.append(process)
        if "error" in header:
            raise InputError.of_detail(header["error"])
        width, height = header["picture"]
        return Picture(width, height, rgb), Size(*header["size"])

    async def warm_up(self) -> None:
        """Start a process, so that the first picture does not wait for it. Logs if that fails."""
        async with self._slots:
            try:
                self._idle.append(await _start())
            except Exception:
                logger.exception("pictures cannot be decoded")

    def _take_idle(self) -> asyncio.subprocess.Process | None:
        """A process that waits for work; those that were killed meanwhile are forgotten."""
        while self._idle:
            process = self._idle.pop()
            if process.returncode is None:
                return process
        return None

    async def close(self) -> None:
        while self._idle:
            await _kill(self._idle.pop())


async def _start() -> asyncio.subprocess.Process:
    """A process that has said it is ready. Raises RuntimeError when it does not come up."""
    process = await asyncio.create_subprocess_exec(
        # -P: without it, Python would import from the directory the server was started in.
        *(sys.executable, "-P", "-m", "media.worker"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_MAX_HEADER,
        start_new_session=True,  # an interrupt from the terminal is for the parent
        env={
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "MALLOC_ARENA_MAX": "1",  # arenas of decoder threads count as address space
            "OPENBLAS_NUM_THREADS": "1",
            **{name: os.environ[name] for name in _NEEDED if name in os.environ},
        },
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_START_SECONDS):
            await process.stdout.readuntil(b"\n")
    except _DIED:
        await _kill(process)
        raise RuntimeError("the process that decodes pictures does not start") from None
    except BaseException:
        await _kill(process)
        raise
    return process


async def _ask(
    process: asyncio.subprocess.Process, data: bytes, image_size: ImageSize | str, loc: Loc
) -> tuple[dict[str, Any], bytes]:
    assert process.stdin is not None and process.stdout is not None
    wanted = image_size.model_dump() if isinstance(image_size, ImageSize) else image_size
    request = {"bytes": len(data), "image_size": wanted, "loc": loc}
    process.stdin.write(json.dumps(request).encode() + b"\n" + data)
    await process.stdin.drain()
    header: dict[str, Any] = json.loads(await process.stdout.readuntil(b"\n"))
    if "error" in header:
        return header, b""
    width, height = header["picture"]
    return header, await process.stdout.readexactly(width * height * 3)


async def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    # Communicating, not only waiting, closes the pipes as well.
    await asyncio.shield(process.communicate())
