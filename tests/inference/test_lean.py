"""The lean forward beside diffusers' own: eager and compiled, at several sizes and prompts."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest
import torch

from inference import float8
from inference.attention import Kernel
from inference.engine import Engine
from inference.lean import LeanTransformer
from inference.plan import Plan, plan
from inference.velocity import Velocity, reference

SIGMAS = torch.tensor([0.9, 0.6, 0.3, 0.0])
SIZES = ((32, 32), (20, 34), (8, 8))
PROMPTS = ("a cat", "a red apple on a blue background " * 5)


def velocities(
    engine: Engine,
    lean: LeanTransformer,
    prompt: str,
    size: tuple[int, int],
    attention: Kernel = "torch",
) -> tuple[Velocity, Velocity]:
    embeds = engine.models.encode_prompt(prompt)
    theirs = reference(engine.models.transformer, embeds, SIGMAS)
    return theirs, lean.velocity(embeds, SIGMAS, *size, attention=attention)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("prompt", PROMPTS)
@torch.inference_mode()
def test_every_step_is_the_reference(engine: Engine, prompt: str, size: tuple[int, int]) -> None:
    theirs, ours = velocities(engine, LeanTransformer(engine.models.transformer), prompt, size)
    latents = torch.randn(16, *size, generator=torch.Generator().manual_seed(1))
    for i in range(3):
        torch.testing.assert_close(ours(latents, i), theirs(latents, i), atol=2e-5, rtol=1e-4)


def test_the_weights_are_not_there_twice(engine: Engine) -> None:
    """Fused matrices take the place of their parts: whatever is written into those is in them."""
    lean = LeanTransformer(engine.models.transformer)
    block, attention = lean.layers[0], engine.models.transformer.layers[0].attention
    assert isinstance(block.qkv, torch.Tensor)
    parts = (attention.to_q.weight, attention.to_k.weight, attention.to_v.weight)
    width = len(parts[0])
    for k, part in enumerate(parts):
        assert part.data_ptr() == block.qkv[k * width :].data_ptr()
    assert attention.norm_k.weight.data_ptr() == block.qk_norm[1].data_ptr()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it imports
@pytest.mark.parametrize("attention", ["torch", "cudnn"])
@torch.inference_mode()
def test_compiled_blocks_are_one_graph_for_all_sizes_and_prompts(
    engine: Engine, attention: Kernel
) -> None:
    """What a GPU's plan does, compiled for this CPU."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        if os.environ.get("CI"):
            pytest.fail("no C++ compiler")
        pytest.skip("no C++ compiler")
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    lean = LeanTransformer(engine.models.transformer, compiled=True)
    for size, prompt in zip(SIZES, (*PROMPTS, "x"), strict=True):
        theirs, ours = velocities(engine, lean, prompt, size, attention)
        latents = torch.randn(16, *size, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(ours(latents, 1), theirs(latents, 1), atol=1e-4, rtol=1e-3)
    assert lean.compiled and counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_blocks_that_cannot_be_compiled_run_as_they_are(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    lean = LeanTransformer(engine.models.transformer, compiled=True)

    def broken(*arguments: object) -> torch.Tensor:
        raise torch._dynamo.exc.BackendCompilerFailed(broken, RuntimeError("no compiler"), None)

    lean._graph = broken
    with torch.inference_mode():
        theirs, ours = velocities(engine, lean, "a cat", (8, 8))
        latents = torch.randn(16, 8, 8)
        torch.testing.assert_close(ours(latents, 0), theirs(latents, 0), atol=2e-5, rtol=1e-4)
    assert not lean.compiled and "cannot be compiled" in caplog.text


def test_eight_bits_have_a_scale_for_every_token_and_channel() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 256, generator=generator) * torch.logspace(-3, 3, 64)[:, None]
    weight = torch.randn(128, 256, generator=generator) * torch.logspace(-3, 3, 128)[:, None]
    exact = x @ weight.T
    got = float8.linear(x.bfloat16(), float8.quantize_weight(weight.bfloat16())).float()
    error = ((got - exact).square().sum() / exact.square().sum()).sqrt()
    by_row = ((got - exact).norm(dim=1) / exact.norm(dim=1)).max()
    assert error < 0.05 and by_row < 0.08  # e4m3 has three bits after the point
    zeros = float8.linear(torch.zeros(16, 256).bfloat16(), float8.quantize_weight(weight))
    assert not zeros.any()


@pytest.mark.parametrize(
    ("capability", "cudnn", "attention"),
    [
        ((8, 0), 92000, "torch"),
        ((8, 9), 92000, "torch"),
        ((9, 0), 92000, "cudnn"),
        ((9, 0), 91500, "torch"),
        ((9, 0), None, "torch"),
        ((10, 0), 92000, "cudnn"),
        ((10, 3), 92000, "cudnn"),
        ((12, 0), 92000, "torch"),
    ],
)
def test_plans_of_gpus(
    capability: tuple[int, int],
    cudnn: int | None,
    attention: Kernel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    regular = Plan(lean=True, compiled=True, attention=attention)
    assert plan("none", gpu) == Plan(lean=False)
    assert plan("regular", gpu) == regular
    assert plan("high", gpu) == replace(regular, float8=capability >= (8, 9))


def test_plans_of_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert plan("none", cpu) == Plan(lean=False)
    assert plan("regular", cpu) == plan("high", cpu) == Plan(lean=True, attention="plain")


def test_plans_in_words() -> None:
    assert str(Plan(lean=False)) == "diffusers' own forward"
    assert str(Plan(lean=True, attention="plain")) == "lean forward"
    everything = Plan(lean=True, compiled=True, float8=True, attention="cudnn")
    assert str(everything) == "lean forward, compiled, float8 matrices, cuDNN attention"
