"""Shared parts: the demo engine, photographs, and a server on a real socket."""

from __future__ import annotations

import io
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import uvicorn
from PIL import Image

from gateway.app import create_app
from gateway.auth import Keys
from gateway.platforms.local import LocalPlatform
from gateway.settings import Settings
from inference.aio import AsyncEngine
from inference.engine import Engine
from schemas.task import Generate, Progress, Result, Task

ROOT = Path(__file__).parent.parent
CAT = ROOT / "examples" / "cat.jpg"
I2I = "/fal-ai/z-image/turbo/image-to-image"
T2I = "/fal-ai/z-image/turbo"
ENDS = {
    "failed": (500, "Internal Server Error"),
    "cancelled": (499, "Request was cancelled by the client"),
}
"""How a request may end without pictures, and what its caller is told."""


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine.load(
        "demo",
        device="cpu",
        dtype=torch.float32,  # the same on every machine
        loras=tmp_path_factory.mktemp("loras"),
    )
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A photograph, 451×300, RGB."""
    return Image.open(CAT).convert("RGB")


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


class Counting:
    """A real engine that counts what it was asked, can be held up before it begins, or broken."""

    def __init__(self, engine: Generate) -> None:
        self.engine = engine
        self.tasks: list[Task] = []
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False
        self.cancelled = 0

    def __call__(
        self,
        task: Task,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Result:
        self.tasks.append(task)
        if self.broken:
            raise RuntimeError("a broken engine")
        while not self.gate.wait(0.02):
            if cancelled():
                break
        try:
            return self.engine(task, on_progress, cancelled)
        except BaseException:
            self.cancelled += 1
            raise


class Server:
    """The gateway with a real engine on loopback, and a client for it."""

    def __init__(self, url: str, engine: Counting, home: Path, port: int) -> None:
        self.url, self.engine, self.home, self.port = url, engine, home, port
        self.http = httpx2.Client(base_url=url, timeout=60)

    def wait(self, status_url: str, **kwargs: Any) -> dict[str, Any]:
        """Poll to COMPLETED; fails after the test's own timeout."""
        while True:
            answer = self.http.get(status_url, **kwargs).json()
            if answer["status"] == "COMPLETED":
                return dict(answer)
            time.sleep(0.01)

    @contextmanager
    def ending(self, end: str, key: str) -> Iterator[None]:
        """What is asked meanwhile fails in the engine ("failed"), or is "cancelled" by its owner."""
        self.engine.broken = end == "failed"
        stop = threading.Event()

        def cancel() -> None:
            while not stop.wait(0.02):
                for request_id in self.unfinished():
                    url = f"/queue/fal-ai/z-image/requests/{request_id}/cancel"
                    self.http.put(url, headers={"Authorization": f"Key {key}"})

        thread = threading.Thread(target=cancel)
        if end == "cancelled":
            self.engine.gate.clear()
            thread.start()
        try:
            yield
        finally:
            stop.set()
            if end == "cancelled":
                thread.join()
            self.engine.broken = False
            self.engine.gate.set()

    def unfinished(self) -> list[str]:
        """Request ids, oldest first."""
        with closing(sqlite3.connect(self.home / "zimage.db", timeout=20)) as db:
            query = "SELECT request_id FROM jobs WHERE status != 'COMPLETED' ORDER BY sequence"
            return [request_id for (request_id,) in db.execute(query)]


@contextmanager
def serving(
    home: Path,
    engine: Generate,
    keys: str | None = None,
    ssl: dict[str, Any] | None = None,
    host: str = "127.0.0.1",
    **settings: Any,
) -> Iterator[Server]:
    """A server in this process, on a free port, until the block ends."""
    counting = Counting(engine)
    aio = AsyncEngine(counting)
    options = Settings(home=home, **{"fetch_allow": "127.0.0.0/8", **settings})
    app = create_app(
        options, LocalPlatform(options, aio), Keys.parse(keys) if keys is not None else None
    )
    with socket.create_server((host, 0)) as listener:
        port = listener.getsockname()[1]
        config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5, **(ssl or {}))
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                thread.join(0.01)
            scheme = "https" if ssl else "http"
            running = Server(f"{scheme}://localhost:{port}", counting, home, port)
            with running.http:
                yield running
        finally:
            counting.gate.set()
            server.should_exit = True
            thread.join()
            aio.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Iterator[Server]:
    loras = engine.models.loras._directory
    with serving(tmp_path_factory.mktemp("home"), engine, loras=loras) as server:
        yield server
