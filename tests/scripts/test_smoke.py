"""scripts/smoke.py against a server on one machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from inference.engine import Engine
from schemas.endpoints import ENDPOINTS
from tests.conftest import ROOT, serving

KEY = "alice:a-secret-long-enough"


def smoke(url: str, key: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / "smoke.py", url, "--key", key]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_every_endpoint_is_asked_twice(tmp_path: Path, engine: Engine) -> None:
    with serving(tmp_path, engine, keys=KEY) as server:
        done = smoke(server.url, KEY)
        assert done.returncode == 0, done.stderr
        words = [line.split()[:2] for line in done.stdout.splitlines()[1:]]
        assert words == [[id, word] for id in ENDPOINTS for word in ("first", "warm")]
        assert len(server.engine.tasks) == 2 * len(ENDPOINTS)


def test_what_is_not_served_is_said(tmp_path: Path, engine: Engine) -> None:
    with serving(tmp_path, engine, keys=KEY, weights="some/where") as server:
        done = smoke(server.url, KEY)
    assert done.returncode == 0 and "does not serve fal-ai/z-image/base:" in done.stdout


@pytest.mark.parametrize(
    ("key", "broken", "message"),
    [("alice:another-secret-altogether", False, ": 401 "), (KEY, True, ": 500 ")],
)
def test_what_is_broken_is_said(
    key: str, broken: bool, message: str, tmp_path: Path, engine: Engine
) -> None:
    with serving(tmp_path, engine, keys=KEY) as server:
        server.engine.broken = broken
        done = smoke(server.url, key)
    assert done.returncode == 1 and message in done.stderr


def test_nobody_there() -> None:
    done = smoke("http://127.0.0.1:9", KEY)
    assert done.returncode == 1 and "ConnectError" in done.stderr
