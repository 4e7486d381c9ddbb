"""A task's way through the models: what its pictures have in common once, then one after the other.

prompts → velocity          noise(seed + k) ─┐
input picture → latents ─────────────────────┴→ start → denoise → decode → picture k
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from PIL import Image

from inference import sampling, tiling
from inference.clock import StageClock
from inference.models import Models
from inference.plan import Plan
from inference.velocity import Velocity, guided
from media.decode import to_image
from schemas.sizes import generation_size
from schemas.task import Picture, Task


class Drawing:
    """Made under the engine's lock, in inference mode; so are its pictures."""

    def __init__(self, models: Models, task: Task, how: Plan, clock: StageClock) -> None:
        self._models, self._task, self._clock = models, task, clock
        self._width, self._height = generation_size(task.width, task.height)
        factor = sampling.LATENT_FACTOR
        self._latent_size = self._height // factor, self._width // factor
        tokens = (self._width // 16) * (self._height // 16)
        self._sigmas = sampling.sigmas(models.scheduler, task.steps, task.strength, tokens)
        self._autoencoder = models.autoencoder_for(task.tiling)
        self._original = _tensor(task.image) if task.image else None
        self._mask = _luminance(task.mask) if task.mask else None
        with clock.stage("prompt_encode"), self._positions():
            self._velocity = self._velocity_of(how)
            models.synchronize()
        with clock.stage("vae_encode"):
            self._start_latents, self._kept_latents = self._encode()
            models.synchronize()

    def picture(self, k: int, on_step: Callable[[int], None]) -> Image.Image:
        """Picture k, counted from 0. on_step as of `sampling.denoise`."""
        models, task = self._models, self._task
        with self._clock.stage("denoise"), self._positions():
            noise = sampling.noise(
                task.seed + k, models.transformer.in_channels, self._width, self._height
            ).to(models.device)
            latents = sampling.denoise(
                self._velocity,
                sampling.start(self._start_latents, noise, float(self._sigmas[0])),
                self._sigmas,
                on_step,
                self._keep(noise),
            )
        with self._clock.stage("vae_decode"):
            return self._finish(self._autoencoder.decode(latents))

    def _velocity_of(self, how: Plan) -> Velocity:
        task, models = self._task, self._models
        size = self._latent_size
        if task.tiling:
            size = tiling.tile(task.tiling, *size)
        sigmas = self._sigmas.to(models.device)
        velocity = models.velocity(task.prompt, sigmas, *size, how)
        if task.guidance_scale:
            negative = models.velocity(task.negative_prompt, sigmas, *size, how)
            velocity = guided(velocity, negative, task.guidance_scale)
        return tiling.seamless(velocity, task.tiling) if task.tiling else velocity

    def _positions(self) -> AbstractContextManager[None]:
        plan = self._task.tiling
        if plan is None:
            return nullcontext()
        return tiling.periodic_positions(self._models.transformer, plan, *self._latent_size)

    def _encode(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Latents to start from, and those that a mask keeps."""
        task, original = self._task, self._original
        if original is None or (self._sigmas[0] == 1.0 and self._mask is None):
            return None, None
        # As bytes to the device: a quarter of what they are as numbers.
        pixels = sampling.from_pixels(original.to(self._models.device))
        kept = None if self._mask is None else self._autoencoder.encode(pixels)
        if task.tiling:
            pixels = tiling.without_border(pixels, task.tiling)
        return self._autoencoder.encode(pixels), kept

    def _keep(self, noise: torch.Tensor) -> Callable[[torch.Tensor, int], torch.Tensor]:
        mask, kept = self._mask, self._kept_latents
        if mask is None or kept is None:
            return lambda latents, i: latents
        regenerate = tiling.regenerated(mask).to(noise.device)
        return lambda latents, i: tiling.keep(latents, i, kept, noise, self._sigmas, regenerate)

    def _finish(self, pixels: torch.Tensor) -> Image.Image:
        """uint8 (H, W, 3) at the size generated → the picture asked for."""
        task, pixels = self._task, pixels.cpu()
        if self._mask is not None and self._original is not None:
            pixels = tiling.composite(pixels, self._original, self._mask)
        if task.tiling:
            return tiling.resize(Image.fromarray(pixels.numpy(), "RGB"), task.width, task.height)
        return Image.fromarray(pixels[: task.height, : task.width].numpy(), "RGB")


def _tensor(picture: Picture) -> torch.Tensor:
    """uint8 (H, W, 3)."""
    rgb = torch.frombuffer(bytearray(picture.rgb), dtype=torch.uint8)
    return rgb.view(picture.height, picture.width, 3)


def _luminance(picture: Picture) -> torch.Tensor:
    """uint8 (H, W)."""
    grey = torch.frombuffer(bytearray(to_image(picture).convert("L").tobytes()), dtype=torch.uint8)
    return grey.view(picture.height, picture.width)
