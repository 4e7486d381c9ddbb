"""Picture sizes: what was asked for, what is generated, and the limits of both.

The pipeline generates multiples of 16 pixels (VAE factor 8, transformer patch 2), so a request for
W×H is generated at `generation_size(W, H)` and cropped to exactly W×H afterwards.

fal documents "up to 4 megapixels" and sides up to 14142. It does not document how `auto` is rounded
or clamped; `auto_size` states our rule. Knows no pictures, only numbers of pixels.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from schemas.errors import InputError

MEGAPIXEL = 1024 * 1024
"""Pixels in one billed megapixel: 1024×1024 costs exactly one unit."""

MULTIPLE = 16
MAX_PIXELS = 4 * MEGAPIXEL
AUTO_MIN_PIXELS = 256 * 256
MAX_SIDE = 8192
"""Longest side in pixels: the transformer's rotary tables hold 512 positions of 16 pixels per axis."""

PRESETS: dict[str, tuple[int, int]] = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}

Preset = Literal[
    "square_hd", "square", "portrait_4_3", "portrait_16_9", "landscape_4_3", "landscape_16_9"
]
PresetOrAuto = Literal[Preset, "auto"]


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int


class ImageSize(BaseModel):
    """A custom size in pixels."""

    model_config = ConfigDict(title="ImageSize")

    width: int = Field(512, gt=0, le=14142, description="The width of the generated image.")
    height: int = Field(512, gt=0, le=14142, description="The height of the generated image.")


CUSTOM_TAG, PRESET_TAG = "<custom>", "<preset>"
"""Union tags: pydantic puts them into error locations; `schemas.errors` takes them out again."""


def _kind(value: Any) -> str:
    return CUSTOM_TAG if isinstance(value, (dict, ImageSize)) else PRESET_TAG


_Custom = Annotated[ImageSize, Tag(CUSTOM_TAG)]
SizeField = Annotated[_Custom | Annotated[Preset, Tag(PRESET_TAG)], Discriminator(_kind)]
SizeOrAutoField = Annotated[
    _Custom | Annotated[PresetOrAuto, Tag(PRESET_TAG)], Discriminator(_kind)
]


def requested_size(value: ImageSize | str, source: Size | None = None) -> Size:
    """The exact output size for an `image_size` field.

    `source` is the input picture's size, needed for "auto" only.
    Raises InputError (422, loc body.image_size) above MAX_PIXELS or MAX_SIDE.
    """
    if value == "auto":
        if source is None:
            raise ValueError("image_size 'auto' needs the size of the input picture")
        return auto_size(source)
    size = (
        Size(value.width, value.height) if isinstance(value, ImageSize) else Size(*PRESETS[value])
    )
    for side, name in ((size.width, "width"), (size.height, "height")):
        if side > MAX_SIDE:
            raise InputError(
                ("body", "image_size", name),
                f"Input should be less than or equal to {MAX_SIDE}",
                "less_than_equal",
                ctx={"le": MAX_SIDE},
                input=side,
            )
    if size.width * size.height > MAX_PIXELS:
        raise InputError(
            ("body", "image_size"),
            f"width × height should be less than or equal to {MAX_PIXELS} pixels (4 megapixels)",
            "less_than_equal",
            ctx={"le": MAX_PIXELS},
        )
    return size


def auto_size(source: Size) -> Size:
    """The input's own size; scaled at constant aspect when outside AUTO_MIN_PIXELS…MAX_PIXELS.

    Sides are capped at MAX_SIDE and at least 1, so very long strips may end below the minimum area.
    """
    pixels = source.width * source.height
    scale = 1.0
    if pixels > MAX_PIXELS:
        scale = math.sqrt(MAX_PIXELS / pixels)
    elif pixels < AUTO_MIN_PIXELS:
        scale = math.sqrt(AUTO_MIN_PIXELS / pixels)
    scale = min(scale, MAX_SIDE / max(source))
    if scale == 1.0:
        return source
    # Floor when shrinking keeps the area inside the limit, whatever the rounding.
    rounding = math.floor if scale < 1.0 else round
    return Size(*(min(MAX_SIDE, max(1, rounding(side * scale))) for side in source))


def generation_size(width: int, height: int) -> Size:
    """The next multiples of 16 at or above width×height."""
    return Size(*(-(-side // MULTIPLE) * MULTIPLE for side in (width, height)))


def megapixels(width: int, height: int) -> float:
    """Billed units of one picture: pixels / 1024²."""
    return width * height / MEGAPIXEL
