"""Bytes that a picture takes while it is made, from its size and two component configurations.

The most that a stage's tensors take at a time, weights apart, without MARGIN. Constants count what lives
together, in bfloat16; tests/inference/test_memory.py checks them against a measurement at full size.
Compiled blocks take less. A GPU needs the weights, the largest stage and about a GiB for CUDA itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from inference.lean import PATCH
from inference.sampling import LATENT_FACTOR
from inference.text import MAX_TOKENS

MARGIN = 1.3
"""What no count of tensors shows: cuDNN's workspaces, and copies of a layer's input in the order of its
numbers that normalisation (channel by channel) and convolution (pixel by pixel) want on a GPU."""

NUMBER = 2
"""Bytes of a bfloat16."""

DENOISE = 26
"""Numbers for each channel of each token: most are queries and keys, rotated in float32."""
ENCODE = 5
"""Pictures of the first level's channels: input, both halves of a residual block, their sum, its copy."""
DECODE = 3
"""Pictures of the second level's channels, which the last block gets: before, after norm, after SiLU."""
PIXEL = 8
"""Bytes for each pixel of the pictures themselves."""


def denoise_bytes(transformer: Mapping[str, Any], width: int, height: int) -> int:
    """Of a picture of width × height pixels, with the longest prompt, and any number of steps."""
    tokens = width * height // (LATENT_FACTOR * PATCH) ** 2 + MAX_TOKENS
    return DENOISE * NUMBER * int(transformer["dim"]) * tokens


def encode_bytes(vae: Mapping[str, Any], width: int, height: int) -> int:
    """Of width × height pixels to latents."""
    first: int = vae["block_out_channels"][0]
    return (ENCODE * NUMBER * first + PIXEL) * width * height


def decode_bytes(vae: Mapping[str, Any], width: int, height: int) -> int:
    """Of latents to width × height pixels."""
    second: int = vae["block_out_channels"][1]
    return (DECODE * NUMBER * second + PIXEL) * width * height


def layer_weights(transformer: Mapping[str, Any]) -> int:
    """Numbers in one layer's matrices: four of attention, three of feed-forward, whose width is 8/3."""
    width: int = transformer["dim"]
    return 4 * width**2 + 3 * width * int(width / 3 * 8)


def float8_bytes(transformer: Mapping[str, Any]) -> int:
    """Of the 8-bit copies that `high` makes of all layers' matrices but the first's and the last's."""
    return (int(transformer["n_layers"]) - 2) * layer_weights(transformer)


def fits(needed: int, device: torch.device) -> bool:
    """Whether so many bytes, and the margin, are free on a device."""
    free = free_bytes(device)
    return free is None or free >= needed * MARGIN


def free_bytes(device: torch.device) -> int | None:
    """Of a GPU, what its allocator keeps without using it included. None on a CPU: nobody knows."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
