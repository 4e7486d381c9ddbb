"""Field names, defaults and ranges are fal's (facts: its OpenAPI of 2026-02)."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.inputs import parse
from schemas.endpoints import ENDPOINTS
from schemas.errors import InputError, ValidationFailed
from schemas.inputs import (
    ImageToImageInput,
    LoRAInput,
    TextToImageInput,
    TextToImageLoraInput,
    example,
)

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
]


@pytest.mark.parametrize(("field", "value", "type"), BAD, ids=lambda value: str(value)[:40])
def test_bad_values_are_refused_naming_the_field(field: str, value: Any, type: str) -> None:
    body = {"prompt": "a", "image_url": URL, field.split(".")[0]: value}
    with pytest.raises(InputError) as caught:
        parse(I2I, json.dumps(body).encode())
    (detail,) = caught.value.detail
    assert detail["loc"] == ["body", *field.split(".")]
    assert detail["type"] == type


BAD_ELSEWHERE = [
    ("turbo/tiling", "tile_size", 31, "greater_than_equal"),
    ("turbo/tiling", "tile_size", 257, "less_than_equal"),
    ("turbo/tiling", "tile_stride", 15, "greater_than_equal"),
    ("turbo/tiling", "tile_stride", 130, "less_than_equal"),
    ("turbo/tiling", "tiling_mode", "diagonal", "literal_error"),
    ("turbo/tiling", "image_size", "huge", "literal_error"),
    ("base", "guidance_scale", 0.9, "greater_than_equal"),
    ("base", "guidance_scale", 20.1, "less_than_equal"),
    ("base", "num_inference_steps", 51, "less_than_equal"),
    ("base", "negative_prompt", "x" * 20_001, "string_too_long"),
    ("turbo/lora", "loras.0.scale", [{"path": URL, "scale": 4.1}], "less_than_equal"),
    ("turbo/lora", "loras.0.path", [{"path": ""}], "string_too_short"),
    ("turbo/lora", "loras.1.path", [{"path": URL}, {}], "missing"),
    ("turbo/lora", "loras", [{"path": URL}] * 4, "too_long"),
]


@pytest.mark.parametrize(("endpoint", "field", "value", "type"), BAD_ELSEWHERE)
def test_bad_values_of_other_endpoints(endpoint: str, field: str, value: Any, type: str) -> None:
    body = {"prompt": "a", field.split(".")[0]: value}
    with pytest.raises(InputError) as caught:
        parse(ENDPOINTS[f"fal-ai/z-image/{endpoint}"], json.dumps(body).encode())
    (detail,) = caught.value.detail
    assert ".".join(map(str, detail["loc"])) == f"body.{field}"
    assert detail["type"] == type


@pytest.mark.parametrize(
    ("body", "field", "type"),
    [
        ({"mask_image_url": URL}, "image_url", "missing"),
        ({"tile_size": 32, "tile_stride": 64}, "tile_stride", "less_than_equal"),
    ],
)
def test_fields_of_tiling_that_contradict_each_other(
    body: dict[str, Any], field: str, type: str
) -> None:
    with pytest.raises(InputError) as caught:
        parse(
            ENDPOINTS["fal-ai/z-image/turbo/tiling"], json.dumps({"prompt": "a", **body}).encode()
        )
    assert caught.value.detail[0]["loc"] == ["body", field]
    assert caught.value.detail[0]["type"] == type


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        ("turbo/tiling", {"image_size": "square_hd", "image_url": None, "mask_image_url": None,
                          "strength": 0.6, "tile_size": 128, "tile_stride": 64,
                          "tiling_mode": "both", "num_inference_steps": 8}),
        ("base", {"image_size": "landscape_4_3", "num_inference_steps": 28, "guidance_scale": 4.0,
                  "negative_prompt": "", "acceleration": "regular", "num_images": 1}),
        ("turbo/lora", {"loras": [], "image_size": "landscape_4_3"}),
        ("base/lora", {"loras": [], "guidance_scale": 4.0}),
    ],
)  # fmt: skip
def test_defaults_of_other_endpoints(endpoint: str, fields: dict[str, Any]) -> None:
    model = ENDPOINTS[f"fal-ai/z-image/{endpoint}"].input
    assert fields.items() <= model(prompt="a").model_dump().items()
    assert ("enable_prompt_expansion" in model.model_fields) == endpoint.startswith("turbo")


def test_a_small_tile_needs_no_stride() -> None:
    body = json.dumps({"prompt": "a", "tile_size": 32}).encode()
    assert parse(ENDPOINTS["fal-ai/z-image/turbo/tiling"], body)


def test_a_lora_s_scale_is_one_by_default() -> None:
    (lora,) = TextToImageLoraInput(prompt="a", loras=[LoRAInput(path="a/b")]).loras
    assert (lora.path, lora.scale) == ("a/b", 1.0)


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
    with pytest.raises(InputError) as caught:
        parse(I2I, body.replace("%s", "z" * 3_000_000).encode())
    text = json.dumps(caught.value.body(), allow_nan=False)
    assert len(text) < 2000
