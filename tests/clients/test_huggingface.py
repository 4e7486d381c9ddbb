"""huggingface_hub's InferenceClient with provider "fal-ai", its hosts pointed here."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.conftest import KEY
from tests.clients.python import python
from tests.clients.readme import block
from tests.conftest import CAT, ENDS, Server


def run(local: Server, program: str) -> Any:
    lines = ["import json", block("huggingface_hub", local.url), program]
    return python("\n".join(lines), HF_HUB_OFFLINE="0")


def test_text_to_image(local: Server) -> None:
    size = run(
        local,
        """
image = client.text_to_image("a red apple", model="my/turbo", width=64, height=48, seed=4)
print(json.dumps(image.size))
""",
    )
    assert size == [64, 48]


def test_image_to_image(local: Server) -> None:
    size = run(
        local,
        f"""
image = client.image_to_image(
    {str(CAT)!r}, prompt="a red apple", model="my/turbo-edit", num_inference_steps=1)
print(json.dumps(image.size))
""",
    )
    assert size == [451, 300]


def test_a_422_shows_its_detail(local: Server) -> None:
    status, text = run(
        local,
        """
try:
    client.text_to_image("x", model="my/turbo", num_inference_steps=99)
except Exception as error:
    print(json.dumps([error.response.status_code, error.response.text]))
""",
    )
    assert status == 422 and "num_inference_steps" in text


@pytest.mark.parametrize("end", ENDS)
def test_an_end_without_pictures(local: Server, end: str) -> None:
    with local.ending(end, KEY):
        status, message = run(
            local,
            """
try:
    client.text_to_image("x", model="my/turbo", width=64, height=48)
except Exception as error:
    print(json.dumps([error.response.status_code, error.response.json()["message"]]))
""",
        )
    assert (status, message) == ENDS[end]
