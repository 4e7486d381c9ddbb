"""Request bodies of the Z-Image endpoints: names, defaults, ranges and descriptions are fal's.

Unknown fields are ignored, as fal ignores them (SDKs add their own).
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from schemas.errors import InputError
from schemas.sizes import SizeField, SizeOrAutoField
from schemas.task import Acceleration, Format, TilingMode

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


class CommonInput(BaseModel):
    """Fields common to all endpoints."""

    model_config = ConfigDict(extra="ignore")

    prompt: str = Field(
        max_length=MAX_PROMPT,
        description="The prompt to generate an image from.",
        examples=["A hyper-realistic, close-up portrait of a tribal elder from the Omo Valley."],
    )
    num_inference_steps: int
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

    def check(self) -> None:
        """Raises InputError for fields that contradict each other."""


class TurboInput(CommonInput):
    """Fields common to all turbo endpoints."""

    num_inference_steps: int = Field(
        8, ge=1, le=8, description="The number of inference steps to perform."
    )
    enable_prompt_expansion: bool = Field(
        False,
        description="Whether to enable prompt expansion. "
        "Note: this will increase the price by 0.0025 credits per request.",
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


class TilingInput(TurboInput):
    """Input of `fal-ai/z-image/turbo/tiling`."""

    image_size: SizeOrAutoField = Field(
        "square_hd",
        description="The size of the generated image. `auto` is the input image's size, "
        "or 1024x1024 without one.",
        validate_default=False,
    )
    image_url: FileUrl | None = Field(
        None, description="URL of an image to start from.", examples=[EXAMPLE_IMAGE]
    )
    mask_image_url: FileUrl | None = Field(
        None,
        description="URL of a mask: white areas of the image are regenerated, black areas kept. "
        "Needs `image_url`.",
    )
    strength: float = Field(
        0.6, ge=0, le=1, description="How much of the image is changed. Only with `image_url`."
    )
    tile_size: int = Field(
        128, ge=32, le=256, description="Size of the tiles in latent space (8 pixels each)."
    )
    tile_stride: int = Field(
        64, ge=16, le=128, description="Stride between tiles in latent space, at most `tile_size`."
    )
    tiling_mode: TilingMode = Field(
        "both",
        description="Which edges match: `horizontal` left and right, `vertical` top and bottom.",
    )

    def check(self) -> None:
        if self.mask_image_url is not None and self.image_url is None:
            raise InputError(("body", "image_url"), "A mask needs an image", "missing")
        if "tile_stride" in self.model_fields_set and self.tile_stride > self.tile_size:
            raise InputError(
                ("body", "tile_stride"),
                f"Input should be less than or equal to tile_size, {self.tile_size}",
                "less_than_equal",
                ctx={"le": self.tile_size},
                input=self.tile_stride,
            )


class BaseInput(CommonInput):
    """Input of `fal-ai/z-image/base`: more steps, guidance and a negative prompt."""

    image_size: SizeField = Field(
        "landscape_4_3", description="The size of the generated image.", validate_default=False
    )
    num_inference_steps: int = Field(
        28, ge=1, le=50, description="The number of inference steps to perform."
    )
    guidance_scale: float = Field(
        4.0, ge=1, le=20, description="How closely the image follows the prompt."
    )
    negative_prompt: str = Field(
        "", max_length=MAX_PROMPT, description="What the image should not be like."
    )


class LoRAInput(BaseModel):
    """A LoRA weight file."""

    model_config = ConfigDict(extra="ignore")

    path: str = Field(
        min_length=1,
        max_length=4096,
        description="URL of a .safetensors file, or a Hugging Face repository, owner/repo.",
    )
    scale: float = Field(1.0, ge=0, le=4, description="Scale factor for the LoRA, 0 to 4.")


class _WithLoras(BaseModel):
    loras: list[LoRAInput] = Field([], max_length=3, description="List of LoRA weights to apply.")


class TextToImageLoraInput(_WithLoras, TextToImageInput):
    """Input of `fal-ai/z-image/turbo/lora`."""


class ImageToImageLoraInput(_WithLoras, ImageToImageInput):
    """Input of `fal-ai/z-image/turbo/image-to-image/lora`."""


class TilingLoraInput(_WithLoras, TilingInput):
    """Input of `fal-ai/z-image/turbo/tiling/lora`."""


class BaseLoraInput(_WithLoras, BaseInput):
    """Input of `fal-ai/z-image/base/lora`."""


Input: TypeAlias = TextToImageInput | ImageToImageInput | TilingInput | BaseInput
"""Those with LoRAs are subclasses of these."""


def example(model: type[CommonInput]) -> dict[str, Any]:
    """A complete request body for the documentation: every field, examples where there are any."""
    body: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if field.examples:
            body[name] = field.examples[0]
        elif field.default is not None:
            body[name] = field.default
    return body
