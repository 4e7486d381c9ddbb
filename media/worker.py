"""A process that decodes and fits pictures for another one: `python -m media.worker`.

Decoders are given bytes that strangers wrote, and some few bytes of a picture can ask for minutes or
gigabytes. So they run here, with a limit on memory; the parent (`gateway.decoder`) keeps the clock and
kills. It says "ready", then takes one request at a time on standard input, a line of JSON and the
file's bytes:

    {"bytes": 38702, "image_size": "auto" | preset | {"width": w, "height": h}, "loc": [...]}

answered on standard output by {"picture": [w, h], "size": [w, h]} and w·h·3 bytes, or by
{"error": {...}}, an entry of `detail`.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any, BinaryIO

from PIL import AvifImagePlugin

from media.decode import decode
from media.fit import fit
from schemas.errors import InputError
from schemas.sizes import ImageSize, Size, requested_size

MEMORY = 400 * 1024 * 1024
"""Bytes of address space a worker may take beyond what it has after its imports. 16 megapixels of
WebP with alpha, profile and rotation, the hungriest of honest pictures, take 330 MB."""

LIFETIME = 60
"""Seconds on one picture; the parent's patience is shorter."""

# One thread for each core is the default, and each takes address space.
AvifImagePlugin.DEFAULT_MAX_THREADS = 2


def answer(data: bytes, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Decode one file and bring it to the requested size. Raises InputError."""
    source = decode(data, tuple(request["loc"]))
    wanted = request["image_size"]
    wanted = ImageSize(**wanted) if isinstance(wanted, dict) else wanted
    size = requested_size(wanted, Size(source.width, source.height))
    picture = fit(source, *size)
    return {"picture": [picture.width, picture.height], "size": list(size)}, picture.rgb


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    answers.write(b"ready\n")
    answers.flush()
    while line := requests.readline():
        request = json.loads(line)
        data = requests.read(request["bytes"])
        signal.alarm(LIFETIME)  # ends this process, should the parent be gone by then
        try:
            header, rgb = answer(data, request)
        except InputError as error:
            header, rgb = {"error": error.detail[0]}, b""
        answers.write(json.dumps(header).encode() + b"\n" + rgb)
        answers.flush()
        signal.alarm(0)


def limit_memory() -> None:
    with open("/proc/self/statm") as statm:  # noqa: PTH123
        taken = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY,) * 2)


if __name__ == "__main__":
    if sys.platform == "linux":
        limit_memory()
    try:
        serve(sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:  # the parent is gone; there is nobody to tell
        os._exit(1)
