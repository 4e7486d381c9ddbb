"""huggingface_hub's InferenceClient with provider "fal-ai", its hosts pointed here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from inference.engine import Engine
from tests.clients.python import python
from tests.clients.readme import block
from tests.conftest import CAT, ENDS, Server, serving

KEY = "id:secret-long-enough"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("home"), engine, keys=KEY) as server:
        yield server


def run(server: Server, program: str) -> Any:
    lines = ["import json", block("huggingface_hub", server.url), program]
    return python("\n".join(lines), HF_HUB_OFFLINE="0")


def test_text_to_image(server: Server) -> None:
    size = run(
        server,
        """
image = client.text_to_image("a red apple", model="my/turbo", width=64, height=48, seed=4)
print(json.dumps(image.size))
""",
    )
    assert size == [64, 48]


def test_image_to_image(server: Server) -> None:
    size = run(
        server,
        f"""
image = client.image_to_image(
    {str(CAT)!r}, prompt="a red apple", model="my/turbo-edit", num_inference_steps=1)
print(json.dumps(image.size))
""",
    )
    assert size == [451, 300]


def test_a_422_shows_its_detail(server: Server) -> None:
    status, text = run(
        server,
        """
try:
    client.text_to_image("x", model="my/turbo", num_inference_steps=99)
except Exception as error:
    print(json.dumps([error.response.status_code, error.response.text]))
""",
    )
    assert status == 422 and "num_inference_steps" in text


@pytest.mark.parametrize("end", ENDS)
def test_an_end_without_pictures(server: Server, end: str) -> None:
    with server.ending(end, KEY):
        status, message = run(
            server,
            """
try:
    client.text_to_image("x", model="my/turbo", width=64, height=48)
except Exception as error:
    print(json.dumps([error.response.status_code, error.response.json()["message"]]))
""",
        )
    assert (status, message) == ENDS[end]
