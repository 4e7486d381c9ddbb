"""Seamless pictures: opposite edges match, so that copies laid side by side show no seam.

    without_border → circular → periodic_positions, seamless, keep → composite, resize

A mode names the axes that wrap: "horizontal" joins the left edge to the right one, "vertical" the
top to the bottom. An axis that does not wrap is left as it is without tiling. Three things draw a
seam, and each is made periodic: the VAE's padding, the transformer's positions, the input picture.

An axis that fits in one tile costs one forward per step. On a longer one, overlapping tiles of
`size` every `stride`, around the edge, are blended; only axes that wrap are cut into tiles. So a step
takes ceil(width / stride) · ceil(height / stride) forwards, each counting longer axes only.

All is a function of sizes alone: seeds keep their meaning. What was measured, and rejected, is in
docs/measurements/2026-11-22-tiling.json. Latents are float32 (C, h, w), h and w even. Knows no
prompts, tasks or files.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from inference import sampling
from inference.velocity import Velocity
from schemas.task import Tiling

DENSEST = 4
"""Tiles overlap at most so many deep along an axis: beyond, they cost and change nothing."""


def tiles(tiling: Tiling, length: int, wraps: bool) -> tuple[list[int], int]:
    """First latents and size of the tiles along an axis; a last tile reaches around the edge."""
    if not wraps or length <= tiling.size:
        return [0], length
    stride = min(max(tiling.stride, tiling.size // DENSEST), tiling.size)
    count = math.ceil(length / stride)
    # Evenly spaced, half a space in: the picture's edge lies inside a tile.
    return [(2 * k + 1) * (length // 2) // (2 * count) * 2 for k in range(count)], tiling.size


def tile(tiling: Tiling, height: int, width: int) -> tuple[int, int]:
    """Height and width of the latents that a forward sees."""
    vertical, horizontal = tiling.wraps
    return tiles(tiling, height, vertical)[1], tiles(tiling, width, horizontal)[1]


def without_border(pixels: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """The input picture (…, H, W) in −1…1, float32, with its jump across wrapping edges removed.

    Subtracts the smooth picture whose Laplacian is that jump: L. Moisan, "Periodic plus smooth image
    decomposition" (2011). Detail and mean stay, light and colour drift; may leave −1…1 a little.
    """
    jumps = torch.zeros_like(pixels)
    for dim, wraps in zip((-2, -1), tiling.wraps, strict=True):
        if wraps:
            jump = pixels.select(dim, -1) - pixels.select(dim, 0)
            jumps.select(dim, 0).add_(jump)
            jumps.select(dim, -1).sub_(jump)
    rows, columns = (
        2 * torch.cos(2 * math.pi * torch.arange(n, device=pixels.device) / n) - 2
        for n in pixels.shape[-2:]
    )
    laplacian = rows[:, None] + columns
    laplacian[0, 0] = 1  # the mean, which jumps do not have
    smooth: torch.Tensor = torch.fft.ifft2(torch.fft.fft2(jumps) / laplacian).real
    return pixels - smooth


def circular(vae: Any, tiling: Tiling) -> Any:
    """A copy of the VAE that pads around wrapping edges; weights are shared, the VAE is untouched.

    Rolling latents by k and decoding is decoding and rolling by 8·k, and likewise for encoding.
    """
    from diffusers.models.downsampling import Downsample2D

    vertical, horizontal = tiling.wraps

    def pad(conv: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        """What a convolution of padding 1 needs, kernels being 3×3."""
        sides = (horizontal, horizontal, vertical, vertical)
        return functional.pad(inputs[0], [int(side) for side in sides], mode="circular")

    def pad_end(conv: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        """Downsample2D has appended a row and a column of zeros; make them the first ones."""
        x = inputs[0]
        x = torch.cat((x[..., :-1], x[..., :1]), dim=-1) if horizontal else x
        return torch.cat((x[..., :-1, :], x[..., :1, :]), dim=-2) if vertical else x

    shared = {id(tensor): tensor for tensor in (*vae.parameters(), *vae.buffers())}
    wrapped = copy.deepcopy(vae, shared)
    for module in wrapped.modules():
        if isinstance(module, Downsample2D) and module.padding == 0:
            module.conv.register_forward_pre_hook(pad_end)
        elif isinstance(module, torch.nn.Conv2d) and module.padding == (1, 1):
            module.padding = (int(not vertical), int(not horizontal))
            module.register_forward_pre_hook(pad)
    return wrapped


@contextmanager
def periodic_positions(transformer: Any, tiling: Tiling, height: int, width: int) -> Iterator[None]:
    """While open, positions wrap along wrapping axes of h×w latents that fit in one tile.

    Rotary frequencies are rounded to whole turns per axis, so position N is position 0; the edge is
    then no place of its own. Changes the transformer: hold the tensor lock, and cache no rotary
    embeddings beyond it. Idea: leejet/stable-diffusion.cpp, pull request 914.
    """
    rope, before = transformer.rope_embedder, transformer.rope_embedder.freqs_cis
    tables = list(before or rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, rope.theta))
    for axis, length, wraps in zip((1, 2), (height, width), tiling.wraps, strict=True):
        if wraps and tiles(tiling, length, wraps)[1] == length:
            patches, dim = length // 2, rope.axes_dims[axis]
            turns = patches / (2 * math.pi * rope.theta ** (torch.arange(0, dim, 2).double() / dim))
            angles = 2 * math.pi / patches * turns.round()
            phases = torch.outer(torch.arange(len(tables[axis])).double(), angles)
            tables[axis] = torch.polar(torch.ones_like(phases), phases).to(tables[axis])
    rope.freqs_cis = tables
    try:
        yield
    finally:
        rope.freqs_cis = before


def seamless(velocity: Velocity, tiling: Tiling) -> Velocity:
    """The velocity with wrapping axes that are longer than a tile blended from tiles.

    `velocity` is called with latents of one size, min(tile, axis) where an axis wraps.
    """

    def blended(latents: torch.Tensor, i: int) -> torch.Tensor:
        vertical, horizontal = tiling.wraps
        tops, height = tiles(tiling, latents.shape[1], vertical)
        lefts, width = tiles(tiling, latents.shape[2], horizontal)
        if len(tops) == len(lefts) == 1:
            return velocity(latents, i)
        weight = torch.outer(_weights(tops, height), _weights(lefts, width)).to(latents.device)
        total, weights = torch.zeros_like(latents), torch.zeros_like(latents[0])
        rest = (0, latents.shape[2] - width, 0, latents.shape[1] - height)
        for top, left in product(tops, lefts):
            tile = latents.roll((-top, -left), (1, 2))[:, :height, :width]
            part = functional.pad(weight * velocity(tile, i), rest)
            total += part.roll((top, left), (1, 2))
            weights += functional.pad(weight, rest).roll((top, left), (0, 1))
        return total / weights

    return blended


def _weights(starts: list[int], size: int) -> torch.Tensor:
    """How much a tile counts along an axis: least at its edges, never 0; 1 if it is alone."""
    bell = torch.sin(math.pi * (torch.arange(size) + 0.5) / size) ** 2
    return bell if len(starts) > 1 else torch.ones(size)


def regenerated(mask: torch.Tensor) -> torch.Tensor:
    """Latents (1, H/8, W/8) to generate, bool, for a mask (H, W) uint8: those with any pixel ≥ 128.

    Any, not most: thin strokes count, and what is generated beyond them `composite` takes back.
    """
    return functional.max_pool2d((mask >= 128).float()[None], sampling.LATENT_FACTOR).bool()


def keep(
    latents: torch.Tensor,
    i: int,
    image_latents: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    regenerate: torch.Tensor,
) -> torch.Tensor:
    """Latents after step i, the kept ones replaced by the input's at the noise level reached.

    image_latents, noise (C, h, w); sigmas (n + 1,) on the CPU; regenerate (1, h, w), from `regenerated`.
    """
    level = float(sigmas[i + 1])
    return torch.where(regenerate, latents, sampling.start(image_latents, noise, level))


def composite(generated: torch.Tensor, original: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(H, W, 3) uint8 by a mask (H, W) uint8: 0 is the original exactly, 255 the generated, greys mix.

    No feathering of our own: a soft mask asks for a soft edge.
    """
    alpha = mask[..., None].float() / 255
    return (original + alpha * (generated.float() - original)).round().to(torch.uint8)


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """To an exact size whose edges match still: Lanczos, reading around the edge.

    Cropping, which other pictures get, would take the edges away.
    """
    if image.size == (width, height):
        return image
    margin = 16
    around = np.pad(np.asarray(image), ((margin, margin), (margin, margin), (0, 0)), mode="wrap")
    box = (margin, margin, margin + image.width, margin + image.height)
    return Image.fromarray(around).resize((width, height), Image.Resampling.LANCZOS, box=box)
