"""Programs in Python, run as their users would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def python(program: str, **environment: str) -> Any:
    """Run a program; returns the JSON it prints last."""
    finished = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])
