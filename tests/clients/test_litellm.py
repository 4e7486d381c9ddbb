"""LiteLLM's image generation with fal, `api_base` pointed at an endpoint."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.conftest import KEY
from tests.clients.python import python
from tests.clients.readme import pointing
from tests.conftest import ENDS, Server


def run(local: Server, program: str) -> Any:
    environment = dict(line.split("=") for line in pointing("LiteLLM", local.url))
    environment["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    return python("import json, litellm\n" + program, **environment)


def test_image_generation(local: Server) -> None:
    url = run(
        local,
        """
answer = litellm.image_generation(
    model="fal_ai/fal-ai/z-image/turbo", prompt="a red apple",
    image_size={"width": 64, "height": 48})
print(json.dumps(answer.data[0].url))
""",
    )
    assert local.http.get(url).status_code == 200


def test_a_422_shows_its_detail(local: Server) -> None:
    message = run(
        local,
        """
try:
    litellm.image_generation(
        model="fal_ai/fal-ai/z-image/turbo", prompt="a red apple", num_inference_steps=99)
except Exception as error:
    print(json.dumps(str(error)))
""",
    )
    assert "num_inference_steps: Input should be less than or equal to 8" in message


@pytest.mark.parametrize("end", ENDS)
def test_an_end_without_pictures(local: Server, end: str) -> None:
    with local.ending(end, KEY):
        message = run(
            local,
            """
try:
    litellm.image_generation(
        model="fal_ai/fal-ai/z-image/turbo", prompt="x", image_size={"width": 64, "height": 48})
except Exception as error:
    print(json.dumps(str(error)))
""",
        )
    assert ENDS[end][1] in message
