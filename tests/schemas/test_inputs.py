"""Field names, defaults and ranges are fal's (facts: its OpenAPI of 2026-02)."""

from typing import Any

import pytest
from pydantic import ValidationError

from gateway.perform import parse
from schemas.endpoints import ENDPOINTS
from schemas.errors import InputError, ValidationFailed
from schemas.inputs import ImageToImageInput, TextToImageInput, example

URL = "https://example.com/a.png"
I2I = ENDPOINTS["fal-ai/z-image/turbo/image-to-image"]


def test_defaults_of_image_to_image() -> None:
    assert ImageToImageInput(prompt="a cat", image_url=URL).model_dump() == {
        "prompt": "a cat",
        "image_url": URL,
        "image_size": "auto",
        "strength": 0.6,
        "num_inference_steps": 8,
        "seed": None,
        "sync_mode": False,
        "num_images": 1,
        "enable_safety_checker": True,
        "output_format": "png",
        "acceleration": "regular",
        "enable_prompt_expansion": False,
    }


def test_defaults_of_text_to_image() -> None:
    fields = TextToImageInput(prompt="a cat").model_dump()
    assert fields["image_size"] == "landscape_4_3"
    assert "image_url" not in fields and "strength" not in fields


def test_unknown_fields_are_ignored() -> None:
    body = {"prompt": "a", "image_url": URL, "negative_prompt": "b", "image_urls": [URL]}
    assert ImageToImageInput.model_validate(body).prompt == "a"


def test_every_endpoint_example_is_valid() -> None:
    for endpoint in ENDPOINTS.values():
        body = example(endpoint.input)
        assert endpoint.input.model_validate(body)
        assert set(body) >= {"prompt", "image_size", "num_inference_steps"}


BAD = [
    ("prompt", 7, "string_type"),
    ("prompt", None, "string_type"),
    ("prompt", "x" * 20_001, "string_too_long"),
    ("image_url", "ftp://example.com/a.png", "input_value_error"),
    ("image_url", "cat.png", "input_value_error"),
    ("image_size", "huge", "literal_error"),
    ("image_size", 512, "literal_error"),
    ("image_size.width", {"width": 0, "height": 512}, "greater_than"),
    ("image_size.height", {"width": 512, "height": 14143}, "less_than_equal"),
    ("image_size.height", {"width": 512, "height": "tall"}, "int_parsing"),
    ("image_size.width", {"width": 8193, "height": 16}, "less_than_equal"),
    ("image_size", {"width": 4096, "height": 4096}, "less_than_equal"),
    ("strength", -0.1, "greater_than_equal"),
    ("strength", 1.01, "less_than_equal"),
    ("strength", "strong", "float_parsing"),
    ("num_inference_steps", 0, "greater_than_equal"),
    ("num_inference_steps", 9, "less_than_equal"),
    ("num_inference_steps", 2.5, "int_from_float"),
    ("seed", "lucky", "int_parsing"),
    ("sync_mode", "perhaps", "bool_parsing"),
    ("num_images", 0, "greater_than_equal"),
    ("num_images", 5, "less_than_equal"),
    ("enable_safety_checker", [], "bool_type"),
    ("output_format", "gif", "literal_error"),
    ("acceleration", "warp", "literal_error"),
    ("enable_prompt_expansion", True, "feature_not_supported"),
]


@pytest.mark.parametrize(("field", "value", "type"), BAD, ids=lambda value: str(value)[:40])
def test_bad_values_are_refused_naming_the_field(field: str, value: Any, type: str) -> None:
    import json

    body = {"prompt": "a", "image_url": URL, field.split(".")[0]: value}
    with pytest.raises(InputError) as caught:
        parse(I2I, json.dumps(body).encode())
    (detail,) = caught.value.detail
    assert detail["loc"] == ["body", *field.split(".")]
    assert detail["type"] == type


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_strength_is_a_finite_number(number: str) -> None:
    body = f'{{"prompt": "a", "image_url": "{URL}", "strength": {number}}}'
    with pytest.raises(ValidationFailed):
        parse(I2I, body.encode())


def test_a_long_value_is_not_echoed_whole() -> None:
    body = {"prompt": "a", "image_url": "x" * 10_000_000}
    with pytest.raises(ValidationError) as caught:
        ImageToImageInput.model_validate(body)
    (detail,) = ValidationFailed(caught.value).detail
    assert len(detail["input"]) < 300


@pytest.mark.parametrize(
    "body",
    ['{"seed": NaN}', '{"seed": 1e400}', '{"strength": -Infinity}', '{"width": "%s", "height": 1}'],
)
def test_every_error_is_small_valid_json(body: str) -> None:
    import json

    with pytest.raises(InputError) as caught:
        parse(I2I, body.replace("%s", "z" * 3_000_000).encode())
    text = json.dumps(caught.value.body(), allow_nan=False)
    assert len(text) < 2000
