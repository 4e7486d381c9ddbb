"""The endpoint table: one entry per fal endpoint id. A new endpoint joins by adding one."""

from __future__ import annotations

from dataclasses import dataclass

from schemas.inputs import (
    BaseInput,
    BaseLoraInput,
    ImageToImageInput,
    ImageToImageLoraInput,
    Input,
    TextToImageInput,
    TextToImageLoraInput,
    TilingInput,
    TilingLoraInput,
)
from schemas.task import Variant

EXPANSION_PRICE = 0.0025
"""US dollars for a request whose prompt is expanded, on top of its pictures."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """id: the path under the host. price: US dollars per megapixel (1024² pixels) of output."""

    id: str
    input: type[Input]
    price: float
    summary: str
    variant: Variant = "turbo"

    @property
    def app(self) -> str:
        """`owner/alias`, the part that status, result and cancel URLs carry."""
        return "/".join(self.id.split("/")[:2])


# fal's prices where they are known: turbo, its LoRAs, tiling. The others are ours, in proportion.
ENDPOINTS: dict[str, Endpoint] = {
    endpoint.id: endpoint
    for endpoint in (
        Endpoint(
            id="fal-ai/z-image/turbo/image-to-image",
            input=ImageToImageInput,
            price=0.005,
            summary="Z-Image Turbo: a picture and a prompt to pictures",
        ),
        Endpoint(
            id="fal-ai/z-image/turbo/image-to-image/lora",
            input=ImageToImageLoraInput,
            price=0.0085,
            summary="Z-Image Turbo: a picture and a prompt to pictures, with LoRAs",
        ),
        Endpoint(
            id="fal-ai/z-image/turbo",
            input=TextToImageInput,
            price=0.005,
            summary="Z-Image Turbo: a prompt to pictures",
        ),
        Endpoint(
            id="fal-ai/z-image/turbo/lora",
            input=TextToImageLoraInput,
            price=0.0085,
            summary="Z-Image Turbo: a prompt to pictures, with LoRAs",
        ),
        Endpoint(
            id="fal-ai/z-image/turbo/tiling",
            input=TilingInput,
            price=0.02,
            summary="Z-Image Turbo: pictures whose opposite edges match",
        ),
        Endpoint(
            id="fal-ai/z-image/turbo/tiling/lora",
            input=TilingLoraInput,
            price=0.0235,
            summary="Z-Image Turbo: pictures whose opposite edges match, with LoRAs",
        ),
        Endpoint(
            id="fal-ai/z-image/base",
            input=BaseInput,
            price=0.01,
            summary="Z-Image: a prompt to pictures, with guidance and a negative prompt",
            variant="base",
        ),
        Endpoint(
            id="fal-ai/z-image/base/lora",
            input=BaseLoraInput,
            price=0.0135,
            summary="Z-Image: a prompt to pictures, with guidance and LoRAs",
            variant="base",
        ),
    )
}
