"""JavaScript packages for the client tests, installed once per run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

FAL_CLIENT = "@fal-ai/client@1.10.1"


def install(folder: Path, *packages: str) -> Path:
    """A folder in which programs can import the packages. Skips, or in CI fails, without npm."""
    if not (shutil.which("node") and shutil.which("npm")):
        if os.environ.get("CI"):
            pytest.fail("node and npm are needed in CI")
        pytest.skip("node and npm are not installed")
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", *packages]
    subprocess.run(command, cwd=folder, check=True, timeout=110)
    return folder


def node(folder: Path, program: str, **environment: str) -> Any:
    """Run a module; returns the JSON it prints last."""
    path = folder / "program.mjs"
    path.write_text(program)
    done = subprocess.run(
        ["node", path.name],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])
