"""Attention by each kernel there is on a CPU, where cuDNN's order falls through to torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from inference.attention import Kernel, attend


def switches() -> list[object]:
    names = ("cudnn", "flash", "mem_efficient", "math", "overrideable")
    enabled = [getattr(torch._C, f"_get_{name}_sdp_enabled")() for name in names]
    return [enabled, torch._C._get_sdp_priority_order()]


@pytest.mark.parametrize("kernel", ["torch", "plain", "cudnn", "flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_differ_by_rounding_only(kernel: Kernel, dtype: torch.dtype) -> None:
    """Views of one projection, as `inference.lean` has them."""
    qkv = torch.randn(130, 3, 4, 32, generator=torch.Generator().manual_seed(0))
    q, k, v = qkv.to(dtype).transpose(0, 2).unbind(1)
    exact = scaled_dot_product_attention(*(part.double()[None] for part in (q, k, v)))[0]
    got = attend(q, k, v, kernel)
    assert got.shape == q.shape and got.dtype == dtype
    assert (got - exact).abs().max() < 32 * torch.finfo(dtype).eps


def test_switches_are_put_back() -> None:
    q = torch.randn(2, 8, 16)
    before = switches()
    attend(q, q, q, "cudnn")
    assert switches() == before
    with pytest.raises(RuntimeError):
        attend(q, q[:, :, :8], q, "flash")
    assert switches() == before


def test_a_kernel_that_is_not_there_is_an_error_where_it_was_asked_for_alone() -> None:
    q = torch.randn(2, 8, 16)
    with pytest.raises(RuntimeError, match="No viable backend"):
        attend(q, q, q, "efficient")
