"""What an acceleration level means on a device, said before it is done.

`none` is diffusers' own forward. `regular` is the lean forward, which differs by rounding only, with
the device's kernel for attention, and on a GPU its blocks compiled. `high` adds 8-bit matrices where the
GPU multiplies them; it may change pixels within a bound that a test keeps (PSNR ≥ 30 dB). Levels switch
from request to request: they share one set of weights, and whatever they prepare is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from inference.attention import Kernel, kernel_of
from schemas.task import Acceleration

FLOAT8_CAPABILITY = (8, 9)
"""First CUDA compute capability that multiplies 8-bit floating point: Ada, then Hopper and later."""


@dataclass(frozen=True, slots=True)
class Plan:
    """lean: see `inference.lean`. compiled: its blocks by torch.compile. float8: their matrices.

    attention: see `inference.attention`; in words only cuDNN's, the others being what one expects.
    """

    lean: bool
    compiled: bool = False
    float8: bool = False
    attention: Kernel = "torch"

    def __str__(self) -> str:
        if not self.lean:
            return "diffusers' own forward"
        words = "lean forward" + ", compiled" * self.compiled + ", float8 matrices" * self.float8
        return words + ", cuDNN attention" * (self.attention == "cudnn")


def plan(level: Acceleration, device: torch.device) -> Plan:
    """The plan of a level. On a CPU `high` is `regular`: there is nothing to gain there by 8 bits."""
    if level == "none":
        return Plan(lean=False)
    attention = kernel_of(device)
    if device.type != "cuda":
        return Plan(lean=True, attention=attention)
    float8 = level == "high" and torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY
    return Plan(lean=True, compiled=True, float8=float8, attention=attention)


def default_device() -> str:
    """The first GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(name: str) -> torch.device:
    """Raises ValueError for one that this machine, or this build of torch, does not have."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"there is no device {name!r} here: {reason}") from None
    return device
