"""Our engine against a bare diffusers script: on demo weights, and on random ones of full size."""

from __future__ import annotations

import gc
import io
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageImg2ImgPipeline, ZImagePipeline
from PIL import Image
from random_models import random_models
from serving import Row
from timing import alternate

from inference.engine import Engine
from inference.plan import plan
from inference.sampling import forwards
from inference.weights import locate
from media.decode import to_picture
from media.fit import fit
from schemas.task import Acceleration, Lora, Task

CAT = Path(__file__).parent.parent / "examples" / "cat.jpg"
LEVELS: tuple[Acceleration, ...] = ("none", "regular", "high")
SIDES = (512, 1024, 1536, 2048)


class Rivals:
    """The same components twice: in our engine, and in diffusers' pipelines as a script has them."""

    def __init__(self, engine: Engine, sides: tuple[int, ...]) -> None:
        models, components = engine.models, dict[str, Any]()
        components = {
            "transformer": models.transformer,
            "scheduler": models.scheduler,
            "text_encoder": models.text_encoder,
            "tokenizer": models.encode_prompt._tokenizer,
            "vae": models.autoencoder.vae,
        }
        self.engine = engine
        self.text_to_image = ZImagePipeline(**components)
        self.image_to_image = ZImageImg2ImgPipeline(**components)
        for pipeline in (self.text_to_image, self.image_to_image):
            pipeline.set_progress_bar_config(disable=True)
        self.photos = {side: Image.open(CAT).convert("RGB").resize((side, side)) for side in sides}
        self.pictures = {
            side: fit(to_picture(photo), side, side) for side, photo in self.photos.items()
        }

    def ours(
        self, side: int, n: int, strength: float, level: Acceleration, prompt: str, k: int
    ) -> None:
        image = self.pictures[side] if strength < 1 else None
        self.engine(
            Task(
                prompt.format(k),
                *(side, side, 8, strength, 7, n, image),
                safety=False,
                acceleration=level,
            )
        )

    def bare(self, side: int, n: int, strength: float, prompt: str, k: int) -> None:
        options: dict[str, Any] = {}
        pipeline: Any = self.text_to_image
        if strength < 1:
            pipeline = self.image_to_image
            options = {"image": self.photos[side], "strength": strength}
        images = pipeline(
            prompt.format(k),
            width=side,
            height=side,
            num_inference_steps=8,
            guidance_scale=0.0,
            num_images_per_prompt=n,
            generator=torch.Generator().manual_seed(7),
            **options,
        ).images
        for image in images:
            image.save(io.BytesIO(), "PNG", compress_level=1)


def on_demo_weights(rounds: int = 7) -> list[Row]:
    """Image-to-image at strength 0.6: five forwards."""
    ours = Engine.load("demo", device="cpu")
    rivals = Rivals(ours, (256, 512))
    # A VAE of its own: ours has its channels last, a script's has not.
    dtype = ours.models.transformer.dtype
    rivals.image_to_image = ZImageImg2ImgPipeline.from_pretrained(locate("demo").path, dtype=dtype)
    rivals.image_to_image.set_progress_bar_config(disable=True)
    rows = []
    for side in rivals.photos:
        for name, n, prompt in (
            ("1 picture", 1, "a cat, number {}"),
            ("4 pictures", 4, "a cat, number {}"),
            ("repeated prompt", 1, "the same cat"),
        ):
            medians = alternate(
                {
                    "bare": partial(rivals.bare, side, n, 0.6, prompt),
                    **{
                        level: partial(rivals.ours, side, n, 0.6, level, prompt)
                        for level in ("none", "regular")
                    },
                },
                rounds,
            )
            rows.append(
                {
                    "case": f"{name}, {side}², {str(dtype).removeprefix('torch.')}",
                    "bare diffusers ms": medians["bare"] * 1e3,
                    "none ms": medians["none"] * 1e3,
                    "regular ms": medians["regular"] * 1e3,
                    "none: times faster": medians["bare"] / medians["none"],
                    "regular: times faster": medians["bare"] / medians["regular"],
                }
            )
    ours.close()
    return rows


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
    sides = (128, 256) if small else SIDES
    rivals, prompt = Rivals(engine, sides), "a ginger cat on a red sofa, number {}"
    rows += [{"case": f"{level}: {plan(level, engine.device)}"} for level in LEVELS]
    rows.append(lora_swap(engine))
    for side in sides:
        for strength in (1.0, 0.6):
            bare = 0.0
            for level in (None, *LEVELS):
                if time.monotonic() > ends:
                    rows.append({"case": f"{side}²: no time left"})
                    return rows
                run = (
                    partial(rivals.bare, side, 1, strength, prompt)
                    if level is None
                    else partial(rivals.ours, side, 1, strength, level, prompt)
                )
                name = f"{side}², {'t2i' if strength == 1 else 'i2i 0.6'}, {level or 'bare'}"
                row = measured(name, run, device, rounds=2 if small else 3)
                bare = bare or row["s"]
                n = forwards(8, strength)
                flops = n * forward_flops(engine.models.transformer.config, side)
                row |= {
                    "× bare": bare / row["s"],
                    "ms/forward": row["s"] / n * 1e3,
                    "of matmul rate": flops / row["s"] / rate,
                    "$/1000 MP": row["s"] * price / (side / 1024) ** 2 * 1e3,
                }
                rows.append(row)
    engine.close()
    return rows


def measured(name: str, run: Callable[[int], object], device: str, rounds: int) -> Row:
    """First call, then the median of others, and the most memory that any took. Errors are a row."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        run(-1)
    except Exception as error:  # the rest is still worth measuring
        return {"case": name, "s": float("nan"), "error": f"{type(error).__name__}: {error}"[:200]}
    first = time.perf_counter() - began
    median = alternate({name: run}, rounds, warm_up=1)[name]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
    return {"case": name, "s": median, "first s": first, "peak GiB": peak}


def forward_flops(config: Any, side: int, caption: int = 64) -> float:
    """Of one forward at side²: two for each weight and token, four · D for each pair of tokens."""
    width = config.dim
    weights = 4 * width**2 + 3 * width * int(width / 3 * 8)
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
    """FLOP/s of a square bfloat16 product, the best of ten."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        _wait(device)
        began = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def lora_swap(engine: Engine, rank: int = 16) -> Row:
    """Seconds to merge a LoRA on every matrix of the layers, from memory, and to take it out again."""
    from safetensors.torch import save_file

    models, tensors = engine.models, dict[str, torch.Tensor]()
    for name, parameter in models.transformer.named_parameters():
        if name.startswith("layers.") and parameter.ndim == 2:
            out, width = parameter.shape
            module = name.removesuffix(".weight")
            tensors[f"transformer.{module}.lora_A.weight"] = torch.randn(rank, width) / width
            tensors[f"transformer.{module}.lora_B.weight"] = torch.randn(out, rank)
    save_file(tensors, models.loras._directory / f"{'0' * 64}.safetensors")
    times = {}
    with torch.inference_mode():
        for what, loras in (("first", [Lora("0" * 64)]), ("out", []), ("in", [Lora("0" * 64)])):
            began = time.perf_counter()
            models.merge(tuple(loras))
            models.synchronize()
            times[f"{what} s"] = time.perf_counter() - began
        models.merge(())
    return {"case": f"LoRA of rank {rank}, {len(tensors) // 2} matrices", **times}


def no_checker(image: Image.Image) -> bool:
    raise RuntimeError("nothing is checked here")


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
