"""Servers in processes of their own, to be killed."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2

from tests.conftest import ROOT


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str | Path], log: Path, port: int, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that is ready, until the block ends; its output goes to `log`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ZIMAGE_")}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env={**kept, **environment}, stdout=output, stderr=output, cwd=ROOT
        )
    try:
        while True:
            assert process.poll() is None, log.read_text()
            try:
                if httpx2.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                    break
            except httpx2.TransportError:
                time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
