"""Numerics of one picture, as small functions in the order they are called.

    forwards → sigmas → noise → start → denoise → to_pixels

Flow matching: x_σ = σ·noise + (1 − σ)·z, the model predicts the velocity noise − z (its output is
the negative), and an Euler step is x += (σ_next − σ)·velocity. Latents are float32 of shape
(16, H/8, W/8) throughout; only the model's input is cast to its own dtype. Knows no prompts, files
or requests.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from inference.velocity import Velocity

LATENT_FACTOR = 8


def forwards(steps: int, strength: float) -> int:
    """Model calls for a request: n = ceil(steps · strength).

    Rounded to 1e-6 first, so that 10 steps at 0.7 (7.000000000000001 in binary) are 7.
    """
    return math.ceil(round(steps * strength, 6))


def sigmas(scheduler: Any, steps: int, strength: float, image_tokens: int) -> torch.Tensor:
    """Noise levels of the n forwards and the final 0, shape (n + 1,), float32, on the CPU.

    Unshifted linspace(strength, strength/n, n), shifted as the scheduler's configuration says. With
    steps · strength whole this is exactly the reference pipeline's schedule.
    """
    n = forwards(steps, strength)
    unshifted = torch.linspace(strength, strength / n, n).tolist()
    own = copy.copy(
        scheduler
    )  # set_timesteps keeps state in the scheduler; requests must not share it
    own.set_timesteps(sigmas=unshifted, mu=_shift(own.config, image_tokens), device="cpu")
    levels: torch.Tensor = own.sigmas
    return levels


def _shift(config: Any, image_tokens: int) -> float:
    """Resolution-dependent shift, read only by schedulers with use_dynamic_shifting (Z-Image's is
    fixed): the line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift)."""
    low: int = config.get("base_image_seq_len", 256)
    high: int = config.get("max_image_seq_len", 4096)
    base: float = config.get("base_shift", 0.5)
    top: float = config.get("max_shift", 1.15)
    return base + (top - base) * (image_tokens - low) / (high - low)


def noise(seed: int, channels: int, width: int, height: int) -> torch.Tensor:
    """Standard normal latents (channels, height/8, width/8) for one seed, float32, on the CPU.

    Drawn on the CPU so that a seed means the same picture on every device. The leading 1 keeps the
    draw identical to the pipeline's batch of one. Seeds are taken modulo 2⁶⁴.
    """
    generator = torch.Generator("cpu").manual_seed(seed % 2**64)
    shape = (1, channels, height // LATENT_FACTOR, width // LATENT_FACTOR)
    return torch.randn(shape, generator=generator, dtype=torch.float32)[0]


def start(image_latents: torch.Tensor | None, noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """σ·noise + (1 − σ)·z; the noise alone for text-to-image or at σ = 1."""
    if image_latents is None or sigma == 1.0:
        return noise
    return sigma * noise + (1.0 - sigma) * image_latents


def denoise(
    velocity: Velocity,
    latents: torch.Tensor,
    sigmas: torch.Tensor,
    on_step: Callable[[int], None],
    keep: Callable[[torch.Tensor, int], torch.Tensor] = lambda latents, i: latents,
) -> torch.Tensor:
    """Euler integration over `sigmas` (n + 1,). latents (C, h, w) float32.

    on_step(k) is called when step k (from 1) is finished on the device, and may raise to stop. On a
    GPU one step is queued ahead of that, so that the device never waits; a stop wastes at most it.
    keep(latents, i) may change what step i (from 0) made.
    """
    sigmas = sigmas.to(latents.device)
    n = len(sigmas) - 1
    ahead = 1 if latents.device.type == "cuda" else 0
    running: deque[Callable[[], None]] = deque()
    finished = 0
    for i in range(n):
        latents = latents + (sigmas[i + 1] - sigmas[i]) * velocity(latents, i)
        latents = keep(latents, i)
        running.append(_fence(latents.device))
        while len(running) > (ahead if i < n - 1 else 0):
            running.popleft()()
            finished += 1
            on_step(finished)
    return latents


def _fence(device: torch.device) -> Callable[[], None]:
    """Something to call that returns once the work queued so far is done."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    synchronize: Callable[[], None] = event.synchronize
    return synchronize


def to_pixels(decoded: torch.Tensor) -> torch.Tensor:
    """VAE output (3, H, W) in −1…1 → uint8 (H, W, 3). Raises ArithmeticError on NaN or infinity."""
    if not torch.isfinite(decoded).all():
        raise ArithmeticError("the decoder produced NaN or infinite values")
    scaled = (decoded.float() * 0.5 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(1, 2, 0).contiguous()


def from_pixels(rgb: torch.Tensor) -> torch.Tensor:
    """uint8 (H, W, 3) → VAE input (1, 3, H, W) in −1…1, float32."""
    return (rgb.permute(2, 0, 1).unsqueeze(0).float() / 255) * 2 - 1
