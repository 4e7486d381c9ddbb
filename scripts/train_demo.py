"""Train the demo weights: Z-Image's architecture, small, on captioned emoji and a few photographs.

    python scripts/train_demo.py autoencoder --from-scratch --minutes 17 --batch 8 --rate 1e-3
    python scripts/train_demo.py transformer --minutes 25
    python scripts/train_demo.py transformer --minutes 50 --side 256 --batch 16 --rate 2e-3
    python scripts/train_demo.py publish

The autoencoder first; then text encoder and transformer together, with the flow-matching loss at the
scheduler's own noise levels and the pipeline's own chat template. Continues from what is in --weights,
or else from the weights that come along, so that they can be improved in several sittings; writes
there, with a sheet of samples beside, every few minutes. `publish` makes the result the demo weights.
Once there is a transformer, of the autoencoder only the decoder is trained. CPU or one GPU. The model
classes are the pipeline's own. Needs npm for the pictures (`demo_data`), and scikit-image and
scikit-learn for photographs (`pip install -e .[train]`).
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import hashlib
import math
import random
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from demo_autoencoder import (
    autoencoder_model,
    autoencoder_pictures,
    reconstruction_loss,
    sample_patches,
)
from demo_data import (
    FIRST,
    Scene,
    caption,
    draw,
    fetch,
    load_photographs,
    load_subjects,
    other_names,
)
from demo_transformer import (
    STEPS,
    caption_corpus,
    compile_blocks,
    embed,
    encode_scenes,
    flow_loss,
    optimizers,
    random_scene,
    sampled_scenes,
    spoken,
    text_model,
    tokenizer,
    transformer_model,
)
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline
from PIL import Image
from rich.console import Console
from rich.progress import Progress, TextColumn
from torch.nn.attention import SDPBackend, sdpa_kernel

from inference.weights import DEMO_DIRECTORY

SAVE_MINUTES = 5.0

console = Console()


class Average:
    """Exponential moving average of a module's parameters."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.module: Any = copy.deepcopy(module).requires_grad_(False)
        self._decay, self._steps = decay, 0

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        self._steps += 1
        decay = min(self._decay, self._steps / (self._steps + 10))
        for mine, its in zip(self.module.parameters(), module.parameters(), strict=True):
            mine.lerp_(its, 1 - decay)


def learning_rate(share: float, peak: float) -> float:
    """Learning rate at a share 0…1 of the time: a short rise, then a cosine to a twentieth."""
    if share < 0.02:
        return peak * share / 0.02
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))


def train_autoencoder(options: argparse.Namespace) -> None:
    subjects, files = fetch(options.cache)
    pictures = load_subjects(subjects, files, options.side[0])
    photographs = load_photographs()
    batches = autoencoder_pictures(pictures, photographs, options.batch, options.side[0])
    folder = options.weights / "vae"
    known = (folder / "config.json").is_file()
    model = (
        AutoencoderKL.from_pretrained(folder)
        if known
        else autoencoder_model(sample_patches(pictures, photographs))
    )
    model = model.to(options.device, memory_format=torch.channels_last).train()
    # What a transformer has learnt to draw must keep its meaning.
    model.encoder.requires_grad_(not (options.weights / "transformer").exists())
    average = Average(model, decay=0.995)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=0.0)

    def save() -> None:
        average.module.save_pretrained(folder)
        sheet = torch.cat((next(batches)[:6], next(batches)[-6:]))
        with torch.no_grad():
            shown = average.module(sheet.to(options.device) * 2 - 1).sample.cpu() / 2 + 0.5
        save_sheet(torch.cat((sheet, shown)), options.weights / "autoencoder.png", len(sheet))

    def step() -> tuple[torch.Tensor, int]:
        target = next(batches).to(options.device, memory_format=torch.channels_last)
        with torch.autocast(options.device, dtype=torch.bfloat16, enabled=options.bf16):
            latents = model.encode(target * 2 - 1).latent_dist.mode()
            # Generated latents are not exact; a decoder that has seen noise forgives.
            noisy = latents + 0.1 * torch.randn_like(latents)
            output = model.decode(noisy).sample
        return reconstruction_loss(output.float() / 2 + 0.5, target), options.batch

    train("autoencoder", options, model, average, [optimizer], step, save)


def train_transformer(options: argparse.Namespace) -> None:
    every, files = fetch(options.cache)
    subjects = every[: options.subjects]
    tags = other_names(subjects)
    device, weights = options.device, options.weights
    vae = AutoencoderKL.from_pretrained(weights / "vae").to(device).eval()
    pictures = load_subjects(subjects, files, max(options.side))
    if (weights / "model_index.json").is_file():
        known = ZImagePipeline.from_pretrained(weights)
        words, text_encoder, transformer = known.tokenizer, known.text_encoder, known.transformer
    else:
        # From all names, so that later sittings can add subjects.
        words = tokenizer(caption_corpus(every), vocabulary=4096)
        text_encoder, transformer = text_model(len(words)), transformer_model()
        whiten(vae, sampled_scenes(subjects, 1, seed=0)[:256], pictures, options)
    scenes = sampled_scenes(subjects, options.scenes, seed=random.randrange(2**32))
    sets = [encode_scenes(vae, scenes, pictures, side, options) for side in options.side]
    models = torch.nn.ModuleDict({"text": text_encoder.float(), "image": transformer.float()})
    models = models.to(device).train()
    average = Average(models, decay=0.999)
    if options.compile:
        compile_blocks(text_encoder, transformer)

    def save() -> None:
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=average.module["text"],
            tokenizer=words,
            transformer=average.module["image"],
        )
        pipeline.save_pretrained(weights)
        generator = random.Random(0)
        shown = [random_scene(generator, generator.randrange(len(subjects))) for _ in range(20)]
        pipeline.set_progress_bar_config(disable=True)
        side = max(options.side)
        drawn = pipeline(
            [caption(subjects[scene.subject].name, scene) for scene in shown],
            *(side, side, STEPS),
            guidance_scale=0.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images.cpu()
        wanted = draw(shown, pictures, side)
        rows = [part for pair in zip(wanted.chunk(2), drawn.chunk(2), strict=True) for part in pair]
        save_sheet(torch.cat(rows), weights / "transformer.png", columns=10)

    def step() -> tuple[torch.Tensor, int]:
        latents = random.choice(sets)
        # As many tokens in every batch, whatever the side.
        batch = max(1, options.batch * sets[0][0].numel() // latents[0].numel())
        chosen = torch.randint(len(scenes), (batch,))
        prompts = [
            spoken(scene, subjects[scene.subject].name, tags[scene.subject])
            for scene in (scenes[k] for k in chosen.tolist())
        ]
        target = latents[chosen].float().to(device)
        # The plain formula beats CPU flash attention's backward on sequences this short.
        plain = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()
        with plain, torch.autocast(device, dtype=torch.bfloat16, enabled=options.bf16):
            embeds = embed(models["text"], words, prompts, device)
            return flow_loss(models["image"], target, embeds), batch

    train("transformer", options, models, average, optimizers(models), step, save)


def whiten(
    vae: AutoencoderKL, scenes: list[Scene], pictures: torch.Tensor, options: argparse.Namespace
) -> None:
    """Write into the configuration the shift and scale that make latents standard."""
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    latents = encode_scenes(vae, scenes, pictures, options.side[0], options).float()
    vae.register_to_config(
        shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item()
    )


def train(
    name: str,
    options: argparse.Namespace,
    models: torch.nn.Module,
    average: Average,
    optimizers: list[torch.optim.Optimizer],
    step: Callable[[], tuple[torch.Tensor, int]],
    save: Callable[[], None],
) -> None:
    """Until the minutes are over; saves every few of them.

    step: the loss of one batch, and the number of samples in it.
    """
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}"))
    started = saved = time.monotonic()
    seen, smooth = 0, 0.0
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=1.0, note="")
        while (share := (time.monotonic() - started) / (60 * options.minutes)) < 1:
            loss, batch = step()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(share, options.rate)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            average.update(models)
            seen += batch
            smooth = 0.98 * smooth + 0.02 * loss.item() if smooth else loss.item()
            rate = seen / (time.monotonic() - started)
            note = f"{seen:,} samples, {rate:.0f}/s, loss {smooth:.4f}"
            bar.update(task, completed=share, note=note)
            if time.monotonic() - saved > 60 * SAVE_MINUTES:
                save()
                saved = time.monotonic()
                console.print(note)
    save()
    console.print(f"{name}: {note}")


def publish(options: argparse.Namespace) -> None:
    """Write --weights into the package, in bfloat16, with a revision made of their content."""
    pipeline = ZImagePipeline.from_pretrained(options.weights, dtype=torch.bfloat16)
    for name in ("scheduler", "text_encoder", "tokenizer", "transformer", "vae"):
        shutil.rmtree(DEMO_DIRECTORY / name, ignore_errors=True)
    pipeline.save_pretrained(DEMO_DIRECTORY)
    digest = hashlib.sha256()
    for file in sorted(DEMO_DIRECTORY.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    revision = f"demo-{digest.hexdigest()[:8]}"
    (DEMO_DIRECTORY / "revision.txt").write_text(revision + "\n")
    size = sum(file.stat().st_size for file in DEMO_DIRECTORY.rglob("*") if file.is_file())
    console.print(f"{DEMO_DIRECTORY}: {revision}, {size / 1e6:.1f} MB")


def keep_memory() -> None:
    """Have glibc keep freed memory: giving every large tensor back and faulting it in again takes
    a third of a training step on a CPU."""
    if sys.platform == "linux":
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def save_sheet(pictures: torch.Tensor, path: Path, columns: int) -> None:
    """Pictures (n, 3, S, S), 0…1, as one PNG of n / columns rows."""
    n, _, height, width = pictures.shape
    grid = pictures.view(n // columns, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    array = (grid.reshape(n // columns * height, columns * width, 3).clamp(0, 1) * 255).byte()
    Image.fromarray(array.cpu().numpy()).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["autoencoder", "transformer", "publish"])
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--from-scratch", action="store_true", help="forget --weights")
    parser.add_argument("--weights", type=Path, default=Path("out/demo_weights"))
    parser.add_argument("--cache", type=Path, default=Path("out/demo_data"))
    parser.add_argument(
        "--side", type=int, nargs="+", default=[128], help="pixels of a training picture"
    )
    parser.add_argument("--batch", type=int, default=48, help="at the first --side")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--subjects", type=int, default=len(FIRST), help="for the transformer")
    parser.add_argument("--scenes", type=int, default=32, help="encoded scenes for each subject")
    options = parser.parse_args()
    if options.from_scratch:
        shutil.rmtree(options.weights, ignore_errors=True)
    elif not options.weights.exists():
        shutil.copytree(DEMO_DIRECTORY, options.weights)
    options.weights.mkdir(parents=True, exist_ok=True)
    keep_memory()
    parts = {
        "autoencoder": train_autoencoder,
        "transformer": train_transformer,
        "publish": publish,
    }
    parts[options.part](options)


if __name__ == "__main__":
    main()
