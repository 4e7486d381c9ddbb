"""One request through the whole house, without a server: a private platform that lives as long."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.auth import ANONYMOUS
from gateway.files import URL_PATH
from gateway.ids import new_id
from gateway.jobs import Job
from gateway.platform import View
from gateway.platforms.local import LocalPlatform
from gateway.services import GenerateAsync
from gateway.settings import Settings

_WATCH_SECONDS = 0.05
LIFETIME = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Answer:
    """HTTP status, response body, and the files of a successful one in order."""

    status: int
    body: dict[str, Any]
    files: list[bytes]


async def run_once(
    settings: Settings,
    generate: GenerateAsync,
    endpoint: str,
    body: dict[str, Any],
    on_view: Callable[[View], None],
) -> Answer:
    """Submit, watch, collect. Nothing is left behind but LoRA files.

    A LoRA's path may be a file here.
    """
    with tempfile.TemporaryDirectory(prefix="zimage-") as home:
        private = settings.model_copy(update={"home": Path(home), "loras": settings.lora_directory})
        async with LocalPlatform(private, generate) as platform:
            for lora in body.get("loras", ()):
                if data := await asyncio.to_thread(_own, lora["path"]):
                    name = await platform.files.put(data, "bin", LIFETIME)
                    lora["path"] = f"http://localhost{URL_PATH}{name}"
            job = Job(new_id(), endpoint, ANONYMOUS, "file://", time.time())
            await platform.submit(job, json.dumps(body).encode())
            waiting = asyncio.create_task(platform.wait(job.request_id))
            while not (await asyncio.wait([waiting], timeout=_WATCH_SECONDS))[0]:
                if view := await platform.view(job.request_id):
                    on_view(view)
            outcome = waiting.result()
            answer = json.loads(outcome.body)
            names = [image["file_name"] for image in answer.get("images", [])]
            files = [await platform.files.get(name) for name in names]
            return Answer(outcome.status, answer, [file for file in files if file is not None])


def _own(path: str) -> bytes | None:
    """A file of this machine's, if that is what is meant."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return None
