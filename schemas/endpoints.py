"""The endpoint table: one entry per fal endpoint id. A new endpoint joins by adding one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from schemas.inputs import ImageToImageInput, TextToImageInput
from schemas.task import Variant

Input: TypeAlias = ImageToImageInput | TextToImageInput


@dataclass(frozen=True, slots=True)
class Endpoint:
    """id: the path under the host. price: US dollars per megapixel (1024² pixels) of output."""

    id: str
    input: type[ImageToImageInput] | type[TextToImageInput]
    variant: Variant
    price: float
    summary: str

    @property
    def app(self) -> str:
        """`owner/alias`, the part that status, result and cancel URLs carry."""
        return "/".join(self.id.split("/")[:2])


ENDPOINTS: dict[str, Endpoint] = {
    endpoint.id: endpoint
    for endpoint in (
        Endpoint(
            id="fal-ai/z-image/turbo/image-to-image",
            input=ImageToImageInput,
            variant="turbo",
            price=0.005,
            summary="Z-Image Turbo: a picture and a prompt to pictures",
        ),
        Endpoint(
            id="fal-ai/z-image/turbo",
            input=TextToImageInput,
            variant="turbo",
            price=0.005,
            summary="Z-Image Turbo: a prompt to pictures",
        ),
    )
}
