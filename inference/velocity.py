"""Ways to ask the transformer in which direction a picture's noise lies.

A `Velocity` belongs to one request: prompt, schedule and size are in it; latents and the number of the
step come with each call. `reference` is diffusers' own forward; `inference.lean` is the same
arithmetic with what does not change from step to step computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

Velocity: TypeAlias = Callable[[torch.Tensor, int], torch.Tensor]
"""(latents (C, h, w) float32, step from 0) → noise − z, of the same shape, float32."""


def times(sigmas: torch.Tensor) -> torch.Tensor:
    """The model's time of each noise level, 1 − σ, computed as the pipeline does, to the last bit."""
    return (1000 - sigmas * 1000) / 1000


def reference(transformer: Any, prompt_embeds: torch.Tensor, sigmas: torch.Tensor) -> Velocity:
    """The pipeline's own forward. prompt_embeds (tokens, width), sigmas (n + 1,) on its device."""
    dtype = transformer.dtype  # looked up by walking over all parameters: once, not every step
    levels = times(sigmas)

    def velocity(latents: torch.Tensor, i: int) -> torch.Tensor:
        (output,) = transformer(
            [latents.to(dtype).unsqueeze(1)], levels[i : i + 1], [prompt_embeds], return_dict=False
        )
        noise_pred: torch.Tensor = -output[0].float().squeeze(1)
        return noise_pred

    return velocity


def guided(positive: Velocity, negative: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance as Z-Image's pipeline does it: p + scale · (p − n), scale 0 for none.

    (Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, equation 6.) Two forwards, one after
    the other: prompts of different lengths in a batch would need a mask.
    """

    def velocity(latents: torch.Tensor, i: int) -> torch.Tensor:
        towards = positive(latents, i)
        return towards + scale * (towards - negative(latents, i))

    return velocity
