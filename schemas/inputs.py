"""Request bodies of the Z-Image endpoints: names, defaults, ranges and descriptions are fal's.

Unknown fields are ignored, as fal ignores them (SDKs add their own).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from schemas.errors import InputError
from schemas.sizes import SizeField, SizeOrAutoField
from schemas.task import Acceleration, Format

MAX_PROMPT = 20_000
"""Characters. Ours, not fal's: the model reads 512 tokens, and tokenising megabytes takes minutes."""

EXAMPLE_IMAGE = (
    "https://storage.googleapis.com/falserverless/example_inputs/z-image-turbo-i2i-input.png"
)


def _file_url(value: str) -> str:
    if value[:5].lower() == "data:" or value[:8].lower().startswith(("http://", "https://")):
        return value
    raise PydanticCustomError("input_value_error", "value must be a valid URL")


FileUrl = Annotated[str, AfterValidator(_file_url)]
"""An http(s) URL or a base64 data URI."""


class TurboInput(BaseModel):
    """Fields common to all turbo endpoints."""

    model_config = ConfigDict(extra="ignore")

    prompt: str = Field(
        max_length=MAX_PROMPT,
        description="The prompt to generate an image from.",
        examples=["A hyper-realistic, close-up portrait of a tribal elder from the Omo Valley."],
    )
    num_inference_steps: int = Field(
        8, ge=1, le=8, description="The number of inference steps to perform."
    )
    seed: int | None = Field(
        None,
        description="The same seed and the same prompt given to the same version of the model "
        "will output the same image every time.",
    )
    sync_mode: bool = Field(
        False,
        description="If `True`, the media will be returned as a data URI and the output data "
        "won't be available in the request history.",
    )
    num_images: int = Field(1, ge=1, le=4, description="The number of images to generate.")
    enable_safety_checker: bool = Field(
        True, description="If set to true, the safety checker will be enabled."
    )
    output_format: Format = Field("png", description="The format of the generated image.")
    acceleration: Acceleration = Field("regular", description="The acceleration level to use.")
    enable_prompt_expansion: bool = Field(
        False,
        description="Whether to enable prompt expansion. "
        "Note: this will increase the price by 0.0025 credits per request.",
    )

    def check_supported(self) -> None:
        """Raises InputError for a documented feature that this deployment cannot perform."""
        if self.enable_prompt_expansion:
            raise InputError(
                ("body", "enable_prompt_expansion"),
                "Prompt expansion is not supported by this deployment yet",
                "feature_not_supported",
                input=True,
            )


class TextToImageInput(TurboInput):
    """Input of `fal-ai/z-image/turbo`."""

    image_size: SizeField = Field(
        "landscape_4_3", description="The size of the generated image.", validate_default=False
    )


class ImageToImageInput(TurboInput):
    """Input of `fal-ai/z-image/turbo/image-to-image`."""

    image_size: SizeOrAutoField = Field(
        "auto", description="The size of the generated image.", validate_default=False
    )
    image_url: FileUrl = Field(
        description="URL of Image for Image-to-Image generation.", examples=[EXAMPLE_IMAGE]
    )
    strength: float = Field(
        0.6, ge=0, le=1, description="The strength of the image-to-image conditioning."
    )


def example(model: type[TurboInput]) -> dict[str, Any]:
    """A complete request body for the documentation: every field, examples where there are any."""
    body: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if field.examples:
            body[name] = field.examples[0]
        elif field.default is not None:
            body[name] = field.default
    return body
