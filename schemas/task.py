"""What crosses the border between gateway and engine: plain data, no torch on either side.

A `Task` is validated as far as that goes without the weights; what only they can tell (whether a LoRA
fits, whether a picture fits into memory) an engine says with an InputError. No slots: what an older
deployment has pickled finds the defaults of fields that are new. Pictures travel as raw sRGB so
that the engine need not know of file formats on the way in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Format = Literal["jpeg", "png", "webp"]
Acceleration = Literal["none", "regular", "high"]
TilingMode = Literal["both", "horizontal", "vertical"]
Variant = Literal["turbo", "base"]
"""A set of weights. One engine serves one variant."""


@dataclass(frozen=True)
class Picture:
    """8-bit sRGB pixels, rows top to bottom, 3 bytes each: len(rgb) == width · height · 3."""

    width: int
    height: int
    rgb: bytes


@dataclass(frozen=True)
class Lora:
    """Small changes of the weights for one request.

    digest: SHA-256 of the file, whose header was checked with `schemas.lora`. scale: 0…4, how much of
    the change is applied; 1 is what was trained, 0 nothing.
    """

    digest: str
    scale: float = 1.0


@dataclass(frozen=True)
class Tiling:
    """A picture that continues into itself. "horizontal": its left edge continues its right one.

    size, stride: of the tiles that a longer picture is made of, in latents (8 pixels each), even.
    """

    mode: TilingMode = "both"
    size: int = 128
    stride: int = 64

    @property
    def wraps(self) -> tuple[bool, bool]:
        """(vertical, horizontal): whether rows and columns wrap, in the order of a tensor's axes."""
        return self.mode != "horizontal", self.mode != "vertical"


@dataclass(frozen=True)
class Task:
    """One request for `num_images` pictures of exactly width×height pixels.

    image: None for text-to-image; otherwise a picture at `generation_size(width, height)`, whose
      top-left width×height pixels are the picture to work from; with tiling all of it is.
    mask: at the same size, white where `image` is made anew, black where it is kept; None for all of it.
    strength: 0…1, 1 for text-to-image. steps: ≥ 1. seed: any integer; picture k uses seed + k.
    guidance_scale: 0 for none (turbo); with it, a second forward for `negative_prompt` every step.
    expand_prompt: have the text encoder write a longer prompt first.
    """

    prompt: str
    width: int
    height: int
    steps: int
    strength: float
    seed: int
    num_images: int
    image: Picture | None = None
    output_format: Format = "png"
    safety: bool = True
    acceleration: Acceleration = "regular"
    variant: Variant = "turbo"
    guidance_scale: float = 0.0
    negative_prompt: str = ""
    loras: tuple[Lora, ...] = ()
    tiling: Tiling | None = None
    mask: Picture | None = None
    expand_prompt: bool = False


@dataclass(frozen=True)
class EncodedImage:
    """A finished file: its bytes, and whether it is the black stand-in for a flagged picture."""

    data: bytes
    flagged: bool


@dataclass(frozen=True)
class Result:
    """`timings` are seconds per stage, summed over pictures; `inference` is the whole.

    prompt: as it was used, expanded if that was asked for. plan: how it was accelerated, in words.
    """

    images: tuple[EncodedImage, ...]
    seed: int
    prompt: str
    forwards: int
    timings: dict[str, float]
    plan: str = ""


@dataclass(frozen=True)
class Failure:
    """What an engine in another process answers instead of raising: exceptions do not travel well.

    kind: an "error" of the engine; its refusal, with the "detail" of an InputError; or it was not asked,
    because the job had "ended", came too "late", or was "lost" with its process too often.
    """

    reason: str
    kind: Literal["error", "refused", "ended", "late", "lost"] = "error"
    detail: dict[str, Any] | None = None


@dataclass(frozen=True)
class Progress:
    """Step `step` of `steps` of picture `image` of `images` is done (all counted from 1)."""

    step: int
    steps: int
    image: int
    images: int

    @property
    def fraction(self) -> float:
        """0…1 over all pictures of the request."""
        return ((self.image - 1) * self.steps + self.step) / (self.steps * self.images)


class Generate(Protocol):
    """An engine as its callers see it. Blocks; safe to call from several threads.

    on_progress is called from the engine's thread after every denoising step. When `cancelled`
    answers True between two steps, raises TaskCancelled and is ready for the next task.
    """

    def __call__(
        self,
        task: Task,
        on_progress: Callable[[Progress], None] = ...,
        cancelled: Callable[[], bool] = ...,
    ) -> Result: ...


class TaskCancelled(Exception):
    """The task stopped between two denoising steps because its caller asked it to."""
