"""huggingface_hub's InferenceClient with provider "fal-ai", its hosts pointed here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from inference.engine import Engine
from tests.clients.python import python
from tests.clients.readme import pointing
from tests.conftest import CAT, ENDS, Server, serving

KEY = "alice:a-secret-long-enough"

PRELUDE = """
import json, os
from huggingface_hub import InferenceClient
from huggingface_hub.hf_api import InferenceProviderMapping
from huggingface_hub.inference._providers import PROVIDERS
from huggingface_hub.inference._providers._common import HARDCODED_MODEL_INFERENCE_MAPPING

MODELS = {
    "text-to-image": ("a/turbo", "fal-ai/z-image/turbo"),
    "image-to-image": ("a/edit", "fal-ai/z-image/turbo/image-to-image"),
}
HARDCODED_MODEL_INFERENCE_MAPPING["fal-ai"] = {  # what the hub would say, without asking it
    name: InferenceProviderMapping(
        hf_model_id=name, provider="fal-ai", providerId=endpoint, task=task, status="live")
    for task, (name, endpoint) in MODELS.items()
}
client = InferenceClient(provider="fal-ai", api_key=os.environ["FAL_KEY"])
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("home"), engine, keys=KEY) as server:
        yield server


def run(server: Server, program: str) -> Any:
    lines = [PRELUDE, *pointing("huggingface_hub", server.url), program]
    return python("\n".join(lines), FAL_KEY=KEY, HF_HUB_OFFLINE="0")


def test_text_to_image(server: Server) -> None:
    size = run(
        server,
        """
image = client.text_to_image("a red apple", model="a/turbo", width=64, height=48, seed=4)
print(json.dumps(image.size))
""",
    )
    assert size == [64, 48]


def test_image_to_image(server: Server) -> None:
    size = run(
        server,
        f"""
image = client.image_to_image(
    {str(CAT)!r}, prompt="a red apple", model="a/edit", num_inference_steps=1)
print(json.dumps(image.size))
""",
    )
    assert size == [451, 300]


def test_a_422_shows_its_detail(server: Server) -> None:
    status, text = run(
        server,
        """
try:
    client.text_to_image("x", model="a/turbo", num_inference_steps=99)
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
    client.text_to_image("x", model="a/turbo", width=64, height=48)
except Exception as error:
    print(json.dumps([error.response.status_code, error.response.json()["message"]]))
""",
        )
    assert (status, message) == ENDS[end]
