"""Where the time of our own pictures goes on a GPU, part by part. Every row stands alone; errors are rows."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import get_args

import torch
from rivals import STEPS, Rivals
from safetensors.torch import save_file
from serving import Row
from timing import alternate

from inference import sampling
from inference.attention import Kernel, attend
from inference.engine import Engine
from inference.models import Models
from inference.plan import plan
from schemas.task import Lora

ONE, OTHER = Lora("0" * 64), Lora("1" * 64)


def measured(name: str, run: Callable[[int], object], device: str, rounds: int) -> Row:
    """First call, then the median of others, and the most memory that any took. Errors are a row."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        run(-1)
        first = time.perf_counter() - began
        median = alternate({name: run}, rounds, warm_up=1)[name]
    except Exception as error:  # the rest is still worth measuring
        return {"case": name, "s": float("nan"), "error": f"{type(error).__name__}: {error}"[:60]}
    row = {"case": name, "s": median, "first s": first}
    if device == "cuda":
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def attention_kernels(engine: Engine, side: int, rounds: int) -> list[Row]:
    """Each kernel alone, and one forward of `regular` by each that works alone."""
    device, models, rows = engine.device.type, engine.models, list[Row]()
    config = models.transformer.config
    tokens, heads = (side // 16) ** 2 + 64, config.n_heads
    qkv = torch.randn(
        *(tokens, 3, heads, config.dim // heads), device=device, dtype=models.transformer.dtype
    )
    q, k, v = qkv.transpose(0, 2).unbind(1)
    sigmas = sampling.sigmas(models.scheduler, STEPS, 1.0, tokens).to(device)
    latents = torch.randn(config.in_channels, side // 8, side // 8, device=device)
    how = plan("regular", engine.device)

    def alone(kernel: Kernel, number: int) -> None:
        with torch.inference_mode():
            attend(q, k, v, kernel)
        wait(device)

    def forward(kernel: Kernel, number: int) -> None:
        with torch.inference_mode():
            velocity = models.velocity(
                "a cat", sigmas, side // 8, side // 8, replace(how, attention=kernel)
            )
            velocity(latents, 0)
        wait(device)

    for kernel in get_args(Kernel):
        if kernel == "plain" and how.attention != "plain":
            continue  # for CPUs
        name = f"{side}², attention by {kernel}" + ", as planned" * (kernel == how.attention)
        row = measured(name, partial(alone, kernel), device, rounds)
        if "error" not in row:  # one that is declined while a block is compiled ends all compiling
            row["ms"] = row["s"] * 1e3
            row["TFLOP/s"] = 4 * config.dim * tokens**2 / row["s"] / 1e12
            row["ms/forward"] = measured(name, partial(forward, kernel), device, rounds)["s"] * 1e3
        rows.append(row)
    return rows


def stages(rivals: Rivals, side: int, rounds: int) -> list[Row]:
    """The parts of one image-to-image request at strength 0.6, its prompt new."""
    run = partial(rivals.ours, side, 1, 0.6, "regular", "one of many cats, number {}")
    run(-1)
    timings = [run(k).timings for k in range(rounds)]
    return [
        {
            "case": f"{side}², i2i 0.6, {stage}",
            "ms": statistics.median(timing[stage] for timing in timings) * 1e3,
        }
        for stage in timings[0]
    ]


def another_prompt_length(rivals: Rivals, side: int) -> list[Row]:
    """What the first prompt of a length costs: kernels may be chosen or built for each."""
    prompt = "a cat on a sofa in a room of a house, " * 9 + "number {}"
    name = f"{side}², t2i, a longer prompt"
    run = partial(rivals.ours, side, 1, 1.0, "regular", prompt)
    return [measured(name, run, rivals.engine.device.type, rounds=2)]


def loras(rivals: Rivals, side: int, rounds: int) -> list[Row]:
    """Merging, alone, and pictures of two tasks with LoRAs of their own that take turns."""
    models, device = rivals.engine.models, rivals.engine.device.type
    for lora in (ONE, OTHER):
        save_random_lora(models, lora)
    rows = lora_swap(models)
    for name, turns in (("the same LoRA", (ONE,)), ("two LoRAs taking turns", (ONE, OTHER))):

        def run(k: int, turns: tuple[Lora, ...] = turns) -> None:
            lora = turns[k % len(turns)]
            rivals.ours(side, 1, 1.0, "regular", "a cat", k, loras=(lora,))

        rows.append(measured(f"{side}², t2i, {name}", run, device, rounds))
    models.merge(())
    return rows


def save_random_lora(models: Models, lora: Lora, rank: int = 16) -> None:
    """On every matrix of the layers, too small to be seen."""
    tensors = dict[str, torch.Tensor]()
    for name, parameter in models.transformer.named_parameters():
        if name.startswith("layers.") and parameter.ndim == 2:
            out, width = parameter.shape
            module = name.removesuffix(".weight")
            tensors[f"transformer.{module}.lora_A.weight"] = torch.randn(rank, width) / width
            tensors[f"transformer.{module}.lora_B.weight"] = torch.randn(out, rank) / rank
    save_file(tensors, models.loras._directory / f"{lora.digest}.safetensors")


def lora_swap(models: Models) -> list[Row]:
    """Merging a LoRA from its file, taking it out, and merging it from memory."""
    rows = []
    with torch.inference_mode():
        for what, loras in (("from its file", [ONE]), ("taken out", []), ("from memory", [ONE])):
            began = time.perf_counter()
            models.merge(tuple(loras))
            models.synchronize()
            rows.append(
                {"case": f"LoRA of rank 16, {what}", "ms": (time.perf_counter() - began) * 1e3}
            )
        models.merge(())
    return rows
