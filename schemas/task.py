"""What crosses the border between gateway and engine: plain data, no torch on either side.

A `Task` is completely validated; an engine never says "bad input". Pictures travel as raw sRGB so
that the engine need not know of file formats on the way in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

Format = Literal["jpeg", "png", "webp"]
Acceleration = Literal["none", "regular", "high"]
Variant = Literal["turbo"]
"""A set of weights. One engine serves one variant."""


@dataclass(frozen=True, slots=True)
class Picture:
    """8-bit sRGB pixels, rows top to bottom, 3 bytes each: len(rgb) == width · height · 3."""

    width: int
    height: int
    rgb: bytes


@dataclass(frozen=True, slots=True)
class Lora:
    """Small changes of the weights for one request.

    digest: names the file, whose contents were checked with `schemas.lora`. scale: finite, how much of
    the change is applied; 1 is what was trained, 0 nothing, and below 0 is its opposite.
    """

    digest: str
    scale: float


@dataclass(frozen=True, slots=True)
class Task:
    """One request for `num_images` pictures of exactly width×height pixels.

    image: None for text-to-image; otherwise a picture at `generation_size(width, height)`, whose
      top-left width×height pixels are the picture to work from.
    strength: 0…1, 1 for text-to-image. steps: ≥ 1. seed: any integer; picture k uses seed + k.
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


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A finished file: its bytes, and whether it is the black stand-in for a flagged picture."""

    data: bytes
    flagged: bool


@dataclass(frozen=True, slots=True)
class Result:
    """`timings` are seconds per stage, summed over pictures; `inference` is the whole."""

    images: tuple[EncodedImage, ...]
    seed: int
    prompt: str
    forwards: int
    timings: dict[str, float]


@dataclass(frozen=True, slots=True)
class Failure:
    """What an engine in another process answers instead of raising: exceptions do not travel well.

    kind: an "error" of the engine; or it was not asked, because the job had "ended", came too "late",
    or was "lost" with its process too often.
    """

    reason: str
    kind: Literal["error", "ended", "late", "lost"] = "error"


@dataclass(frozen=True, slots=True)
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
