"""schemathesis finds nothing to say against our OpenAPI document and the service behind it.

Two of its checks do not fit an API that fetches what its input names, and that is as lenient as
fal's: a URL that its schema allows need not lead to a picture, and "0.6" is accepted for 0.6.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.gateway.processes import free_port
from tests.gateway.test_load import serve

KEY = "test:a-secret-of-sixteen"
EXCLUDED = "positive_data_acceptance,negative_data_rejection"


@pytest.mark.timeout(200)
def test_all_checks(tmp_path: Path) -> None:
    port = free_port()
    with serve(tmp_path / "home", port, ZIMAGE_AUTH="on", ZIMAGE_KEYS=KEY):
        command = [
            str(Path(sys.executable).parent / "st"),
            *("run", f"http://127.0.0.1:{port}/openapi.json"),
            *("--checks", "all", "--exclude-checks", EXCLUDED),
            *("--max-examples", "15", "--seed", "1", "--no-color"),
            # Queued before are a hundred downloads from hosts that a network without DNS looks for.
            *("--request-timeout", "60", "--max-response-time", "60"),
            *("-H", f"Authorization: Key {KEY}"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=170)
    assert done.returncode == 0, done.stdout[-6000:]
