"""Pixels to latents and back: the VAE and its scaling.

Whole pictures at a time; in tiles, which paint faint bands, only when memory is or runs short.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

import torch

from inference import memory, sampling

TILE = 512
"""Pixels along a side: a quarter of what a megapixel takes."""

logger = logging.getLogger(__name__)


class Autoencoder:
    """A diffusers AutoencoderKL. Latents are (16, H/8, W/8) float32."""

    def __init__(self, vae: Any) -> None:
        # Convolutions are a third to a half faster with channels last, on CPUs and GPUs.
        self.vae = vae.to(memory_format=torch.channels_last)
        vae.tile_sample_min_size = TILE
        vae.tile_latent_min_size = TILE // sampling.LATENT_FACTOR

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (1, 3, H, W) in −1…1. The mode of the posterior: no randomness, so no seed is spent."""
        pixels = pixels.to(self.vae.device, self.vae.dtype, memory_format=torch.channels_last)
        config, (height, width) = self.vae.config, pixels.shape[-2:]
        posterior = self._in_tiles_if_it_must(
            lambda: self.vae.encode(pixels, return_dict=False)[0],
            memory.encode_bytes(config, width, height),
        )
        latents: torch.Tensor = posterior.mode()[0].float() - config.shift_factor
        return latents * float(config.scaling_factor)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """uint8 (H, W, 3). Raises ArithmeticError on NaN or infinity."""
        config = self.vae.config
        # Cast before scaling, as the pipeline does.
        scaled = latents.to(self.vae.dtype) / config.scaling_factor + config.shift_factor
        height, width = (sampling.LATENT_FACTOR * side for side in latents.shape[-2:])
        decoded = self._in_tiles_if_it_must(
            lambda: self.vae.decode(scaled.unsqueeze(0), return_dict=False)[0],
            memory.decode_bytes(config, width, height),
        )
        return sampling.to_pixels(decoded[0])

    def _in_tiles_if_it_must(self, run: Callable[[], Any], needed: int) -> Any:
        """needed: bytes that the whole picture takes."""
        if memory.fits(needed, self.vae.device):
            try:
                return run()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            release_memory()
        logger.warning("%.1f GiB for the VAE are not free: in tiles", needed / 2**30)
        self.vae.enable_tiling()
        try:
            return run()
        finally:
            self.vae.disable_tiling()


def is_out_of_memory(error: RuntimeError) -> bool:
    """On a GPU, or on a CPU, where the error has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release_memory() -> None:
    """Give back what an error's traceback and the allocator's cache still hold."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
