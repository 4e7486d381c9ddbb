"""Attention of every token to every other, and whose kernel computes it.

The kernel is part of the plan: a function of the device, never of a measurement, so that two containers
on like devices draw the same bytes.

cudnn   On Hopper and Blackwell. Torch's own flash kernel is FlashAttention 2, which makes about half of
        what these can: Shah et al., "FlashAttention-3", 2024. Where cuDNN declines a shape, the others
        are asked in torch's order. Torch 2.13 prefers it there, too, unless its environment says not to.
plain   On CPUs: two products for short sequences of bfloat16, else torch's own.
torch   Whatever torch prefers: everywhere else.

flash and efficient are those kernels of torch's alone, to compare with; a shape they decline is an error.
Switches are set where attention is called and put back there. They are process-wide, and a graph is
bound to a kernel while it is traced: set around a compiled call, they would change nothing in it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Kernel = Literal["torch", "plain", "cudnn", "flash", "efficient"]

CUDNN_GENERATIONS = (9, 10)
"""Major compute capabilities, of Hopper and Blackwell, for which torch prefers cuDNN as well."""

CUDNN_WRONG_UNTIL = 91500
"""The last cuDNN with wrong results where tokens are no multiple of 128 (pytorch issue 169849)."""

PLAIN_TOKENS = 1536
"""Up to here plain products were 2.3 to 2.6 times as fast (two cores with AVX512-BF16); from 2400 slower."""

_ORDER = {
    "cudnn": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
}


def kernel_of(device: torch.device) -> Kernel:
    """The kernel that a plan names on a device."""
    if device.type == "cpu":
        return "plain"
    if device.type == "cuda":
        generation, _ = torch.cuda.get_device_capability(device)
        version: int = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]
        if generation in CUDNN_GENERATIONS and version > CUDNN_WRONG_UNTIL:
            return "cudnn"
    return "torch"


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: Kernel) -> torch.Tensor:
    """(heads, tokens, d) each, and so is the result. Views will do if their last dimension is dense."""
    if kernel == "plain" and q.dtype == torch.bfloat16 and q.shape[1] <= PLAIN_TOKENS:
        # Torch's kernel for CPUs makes less of their bfloat16 units than two plain products do.
        weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(1, 2), dim=-1)
        return weights @ v
    q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    if kernel not in _ORDER:
        return F.scaled_dot_product_attention(q, k, v)[0]
    with sdpa_kernel(_ORDER[kernel], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)[0]
