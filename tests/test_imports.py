"""What must not be imported where, observed in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(' '.join(sys.modules))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    return set(output.stdout.split())


@pytest.mark.parametrize(
    ("statement", "without"),
    [
        ("import gateway.app, gateway.platforms.local", {"torch", "diffusers", "modal"}),
        ("import gateway.platforms.modal", {"torch", "diffusers"}),
        ("import inference.engine", {"fastapi", "modal", "httpx2"}),
        ("import schemas.endpoints, schemas.task", {"PIL", "numpy", "fastapi", "torch"}),
        ("import media.decode, media.encode, media.fit", {"fastapi", "torch"}),
        ("import local_app", {"torch", "diffusers", "fastapi"}),
    ],
)
def test_import_light(statement: str, without: set[str]) -> None:
    assert not modules_after(statement) & without
