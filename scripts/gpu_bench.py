"""Our engine against a bare diffusers script and cache-dit, on random weights of full size."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, get_args

import gpu_parts
import torch
from gpu_parts import measured, wait
from PIL import Image
from random_models import random_models
from rivals import STEPS, Rivals
from serving import Row

from inference.engine import Engine
from inference.memory import layer_weights
from inference.plan import plan
from inference.sampling import forwards
from schemas.task import Acceleration

LEVELS: tuple[Acceleration, ...] = get_args(Acceleration)
SIDES = (512, 1024, 1536, 2048)
PROMPT = "a ginger cat on a red sofa, number {}"


def on_full_size(price: float, seconds: float = 540.0) -> list[Row]:
    """Random weights of Z-Image's size on a GPU; of the demo's on a CPU, to see the program work.

    price: of the device, dollars a second. Times are of whole requests, a forward's share included: text,
    VAE and PNG count as its. Stops at the next row when `seconds` are over.
    """
    ends = time.monotonic() + seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = device == "cpu"
    began = time.perf_counter()
    engine = Engine(random_models(device, small), no_checker)
    rows: list[Row] = [{"case": "random weights made", "s": time.perf_counter() - began}]
    rate = matmul_rate(device, 1024 if small else 8192)
    rows.append({"case": "matmul, bfloat16", "TFLOP/s": rate / 1e12})
    rows += [{"case": f"{level}: {plan(level, engine.device)}"} for level in LEVELS]
    sides, middle = ((128, 256), 256) if small else (SIDES, 1024)
    rivals, rounds = Rivals(engine, sides), 2 if small else 3
    rows += gpu_parts.attention_kernels(engine, middle, rounds)
    rows += gpu_parts.stages(rivals, middle, rounds)
    rows += gpu_parts.another_prompt_length(rivals, middle)
    rows += gpu_parts.loras(rivals, middle, rounds)
    for side in sides:
        for strength in (1.0, 0.6):
            bare, n = 0.0, forwards(STEPS, strength)
            flops = n * forward_flops(engine.models.transformer.config, side)
            for name, around, run in contenders(rivals, side, strength):
                if time.monotonic() > ends:
                    rows.append({"case": f"{side}²: no time left"})
                    return rows
                case = f"{side}², {'t2i' if strength == 1 else 'i2i 0.6'}, {name}"
                with around:
                    row = measured(case, run, device, rounds)
                bare = bare or row["s"]
                row |= {
                    "× bare": bare / row["s"],
                    "ms/forward": row["s"] / n * 1e3,
                    "of matmul rate": flops / row["s"] / rate,
                    "$/1000 MP": row["s"] * price / (side / 1024) ** 2 * 1e3,
                }
                rows.append(row)
    engine.close()
    return rows


def contenders(
    rivals: Rivals, side: int, strength: float
) -> Iterator[tuple[str, AbstractContextManager[Any], Callable[[int], object]]]:
    """Name, what to be inside of, and a request; the bare script first."""
    bare = partial(rivals.bare, side, 1, strength, PROMPT)
    yield "bare", nullcontext(), bare
    for level in LEVELS:
        yield level, nullcontext(), partial(rivals.ours, side, 1, strength, level, PROMPT)
    if importlib.util.find_spec("cache_dit"):
        yield "bare + cache-dit, 2 skipped", rivals.caching(strength), bare


def forward_flops(config: Any, side: int, caption: int = 64) -> float:
    """Of one forward at side²: two for each weight and token, four · D for each pair of tokens."""
    width, weights = config.dim, layer_weights(config)
    image = (side // 16) ** 2
    total = 0.0
    for blocks, tokens in (
        (config.n_layers, image + caption),
        (config.n_refiner_layers, image),
        (config.n_refiner_layers, caption),
    ):
        total += blocks * (2 * weights * tokens + 4 * width * tokens**2)
    return total


def matmul_rate(device: str, side: int) -> float:
    """FLOP/s of a square bfloat16 product, the best of twelve."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        wait(device)
        began = time.perf_counter()
        a @ b
        wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def no_checker(image: Image.Image) -> bool:
    raise RuntimeError("nothing is checked here")
