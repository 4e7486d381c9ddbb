"""Every block of the README that is a program runs, against a server of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from safetensors.torch import save_file

from gateway.settings import Deployment, Settings
from inference.engine import Engine
from tests.clients.npm import FAL_CLIENT, install
from tests.conftest import ROOT, Server, serving
from tests.inference.lora_files import pairs, weights, written

README = (ROOT / "README.md").read_text()
HOST = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Iterator[Server]:
    loras = engine.models.loras._directory
    with serving(tmp_path_factory.mktemp("home"), engine, loras=loras) as server:
        yield server


def run(
    command: list[str], cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Path:
    """The repository's examples, and a LoRA file of one's own."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "examples").symlink_to(ROOT / "examples")
    save_file(
        written("diffusers", pairs(weights(engine.models.transformer))),
        folder / "style.safetensors",
    )
    return folder


@pytest.mark.parametrize("block", blocks("bash"), ids=lambda block: block.split()[2][:60])
def test_curl(block: str, plain: Server, folder: Path) -> None:
    answer = json.loads(run(["bash", "-c", block.replace(HOST, plain.url)], folder).stdout)
    if "status_url" in answer:
        plain.wait(answer["status_url"])
        answer = plain.http.get(answer["response_url"]).json()
    assert plain.http.get(answer["images"][0]["url"]).status_code == 200


def test_python(tmp_path: Path, engine: Engine) -> None:
    (block,) = (each for each in blocks("python") if "import fal_client" in each)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate = authority.issue_cert("localhost").private_key_and_cert_chain_pem
    certificate.write_to_path(tmp_path / "server.pem")
    key = "id:secret-long-enough"
    ssl = {"ssl_certfile": tmp_path / "server.pem"}
    with serving(tmp_path / "home", engine, keys=key, ssl=ssl) as server:
        done = run(
            [sys.executable, "-c", block],
            FAL_RUN_HOST=f"localhost:{server.port}",
            FAL_QUEUE_RUN_HOST=f"localhost:{server.port}/queue",
            FAL_KEY=key,
            SSL_CERT_FILE=str(tmp_path / "ca.pem"),
        )
    assert f"https://localhost:{server.port}/files/" in done.stdout


def test_javascript(tmp_path: Path, plain: Server) -> None:
    (block,) = blocks("js")
    install(tmp_path, FAL_CLIENT)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "program.mjs").write_text(block.replace(HOST, plain.url))
    request_id, url = run(["node", "program.mjs"], cwd=tmp_path).stdout.split()
    assert plain.http.get(url).status_code == 200
    result = plain.http.get(f"/queue/fal-ai/z-image/requests/{request_id}").json()
    assert result["images"][0]["url"] == url


def test_every_setting_is_listed() -> None:
    for settings in (Settings, Deployment):
        for name in settings.model_fields:
            assert f"`ZIMAGE_{name.upper()}`" in README
