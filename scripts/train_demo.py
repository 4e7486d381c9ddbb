"""Train the demo weights: Z-Image's architecture, small, on captioned emoji and a few photographs.

    python scripts/train_demo.py autoencoder --minutes 60
    python scripts/train_demo.py transformer --minutes 180 --subjects 100

The autoencoder first; then text encoder and transformer together, with the flow-matching loss at the
scheduler's own noise levels and the pipeline's own chat template. Continues from what is in --weights,
so that it can be improved in several sittings; writes there, with a sheet of samples beside, every few
minutes. CPU or one GPU. The model classes are the pipeline's own. Needs npm for the pictures
(`demo_data`), and scikit-image and scikit-learn for photographs (`pip install -e .[train]`).
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from demo_data import (
    COLOURS,
    PLACES,
    SIZES,
    Scene,
    Subject,
    caption,
    compose,
    draw,
    fetch,
    held_out,
    load_photographs,
    load_subjects,
)
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from make_demo_weights import tokenizer
from PIL import Image
from rich.console import Console
from rich.progress import Progress, TextColumn, track
from transformers import Qwen3Config, Qwen3Model

SAVE_MINUTES = 5.0

console = Console()


def autoencoder_model() -> AutoencoderKL:
    """3.1 M parameters; factor 8 and 16 latent channels, as Z-Image's own."""
    model = AutoencoderKL(
        block_out_channels=(24, 48, 96, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    # A posterior that is narrow from the start: noise of size 1 hides colours.
    with torch.no_grad():
        model.encoder.conv_out.weight[16:] = 0
        model.encoder.conv_out.bias[16:] = -6
    return model


def autoencoder_pictures(
    pictures: torch.Tensor, photographs: list[torch.Tensor], batch: int, side: int
) -> Iterator[torch.Tensor]:
    """Endless batches (batch, 3, side, side), 0…1: three quarters subjects in shifted colours on any
    background, one quarter crops of photographs."""
    while True:
        n = batch * 3 // 4
        rgba = pictures[torch.randint(len(pictures), (n,))].float() / 255
        swap = torch.stack([torch.randperm(3) for _ in range(n)])
        recoloured = torch.gather(
            rgba[:, :3], 1, swap[:, :, None, None].expand(-1, -1, *rgba.shape[2:])
        )
        mix = (torch.rand(n) < 0.5)[:, None, None, None]
        rgba = torch.cat((torch.where(mix, recoloured, rgba[:, :3]), rgba[:, 3:]), dim=1)
        named = torch.tensor(random.choices(list(COLOURS.values()), k=n))
        colour = torch.where((torch.rand(n) < 0.5)[:, None], named, torch.rand(n, 3))
        scale = torch.empty(n).uniform_(0.4, 1.3)
        scenes = compose(rgba, colour, scale, torch.rand(n, 2), side)
        crops = [_crop(random.choice(photographs), side) for _ in range(batch - n)]
        yield torch.cat((scenes, torch.stack(crops)))


def _crop(photograph: torch.Tensor, side: int) -> torch.Tensor:
    height, width = photograph.shape[1:]
    taken = random.randint(side, min(height, width))
    top, left = random.randint(0, height - taken), random.randint(0, width - taken)
    crop = photograph[None, :, top : top + taken, left : left + taken]
    crop = F.interpolate(crop, (side, side), mode="area")[0]
    if random.random() < 0.5:
        crop = crop.flip(2)
    return crop[torch.randperm(3)] if random.random() < 0.2 else crop


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1, its gradients (edges stay sharp), and L1 of 8×8 means (flat colours stay right)."""
    loss = F.l1_loss(output, target)
    for axis in (2, 3):
        loss = loss + 0.5 * F.l1_loss(output.diff(dim=axis), target.diff(dim=axis))
    return loss + 3 * F.l1_loss(F.avg_pool2d(output, 8), F.avg_pool2d(target, 8))


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
    pictures = load_subjects(subjects, files, options.side)
    photographs = load_photographs()
    batches = autoencoder_pictures(pictures, photographs, options.batch, options.side)
    folder = options.weights / "vae"
    known = (folder / "config.json").is_file()
    model = AutoencoderKL.from_pretrained(folder) if known else autoencoder_model()
    model = model.to(options.device, memory_format=torch.channels_last).train()
    average = Average(model, decay=0.995)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)

    def save() -> None:
        average.module.save_pretrained(folder)
        sheet = torch.cat((next(batches)[:6], next(batches)[-6:]))
        with torch.no_grad():
            shown = average.module(sheet.to(options.device) * 2 - 1).sample.cpu() / 2 + 0.5
        save_sheet(torch.cat((sheet, shown)), options.weights / "autoencoder.png", columns=12)

    def step() -> torch.Tensor:
        target = next(batches).to(options.device, memory_format=torch.channels_last)
        with torch.autocast(options.device, dtype=torch.bfloat16, enabled=options.bf16):
            posterior = model.encode(target * 2 - 1).latent_dist
            output = model.decode(posterior.sample()).sample
        loss = reconstruction_loss(output.float() / 2 + 0.5, target)
        total: torch.Tensor = loss + 1e-6 * posterior.kl().mean()
        return total

    train("autoencoder", options, model, average, optimizer, step, save)


def text_model(vocabulary: int) -> Qwen3Model:
    """0.9 M parameters and the embedding table."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
        )
    )


def transformer_model() -> ZImageTransformer2DModel:
    """8.8 M parameters."""
    model = ZImageTransformer2DModel(
        dim=256,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=128,
        axes_dims=[16, 24, 24],
        axes_lens=[1536, 512, 512],
    )
    with torch.no_grad():
        model.x_pad_token.normal_(std=0.02)
        model.cap_pad_token.normal_(std=0.02)
    return model


def caption_corpus(subjects: list[Subject]) -> str:
    scenes = (
        Scene(k, colour, size, place)
        for k in range(len(subjects))
        for colour, size, place in zip(COLOURS, [*SIZES] * 4, [*PLACES] * 2, strict=False)
    )
    return "\n".join(caption(subjects[scene.subject], scene) for scene in scenes)


def sampled_scenes(subjects: int, each: int, seed: int) -> list[Scene]:
    """`each` random scenes of every subject, none of them held out."""
    generator = random.Random(seed)
    scenes = []
    for subject in range(subjects):
        for _ in range(each):
            while held_out(scene := _random_scene(generator, subject)):
                pass
            scenes.append(scene)
    return scenes


def _random_scene(generator: random.Random, subject: int) -> Scene:
    colour, size, place = (generator.choice([*words]) for words in (COLOURS, SIZES, PLACES))
    return Scene(subject, colour, size, place)


@torch.no_grad()
def encode_scenes(
    vae: AutoencoderKL, scenes: list[Scene], pictures: torch.Tensor, device: str
) -> torch.Tensor:
    """Latents (n, 16, side/8, side/8), not yet shifted and scaled."""
    parts = []
    for k in track(range(0, len(scenes), 32), description="encoding scenes", console=console):
        drawn = draw(scenes[k : k + 32], pictures, pictures.shape[-1]).to(device)
        parts.append(vae.encode(drawn * 2 - 1).latent_dist.mode())
    return torch.cat(parts)


def embed(text_encoder: Any, words: Any, captions: list[str], device: str) -> list[torch.Tensor]:
    """Prompt embeddings as the pipeline makes them, a tensor (tokens, width) for each caption."""
    texts = [
        words.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        for text in captions
    ]
    tokens = words(texts, padding=True, return_tensors="pt").to(device)
    states = text_encoder(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        output_hidden_states=True,
    ).hidden_states[-2]
    lengths = tokens.attention_mask.sum(dim=1).tolist()
    return [state[:length] for state, length in zip(states, lengths, strict=True)]


def flow_loss(transformer: Any, latents: torch.Tensor, embeds: list[torch.Tensor]) -> torch.Tensor:
    """Mean squared error of the velocity at σ = 3u / (1 + 2u), u uniform: the scheduler's shift 3.

    The model is asked for z − noise at time 1 − σ, as in the pipeline.
    """
    uniform = torch.rand(len(latents), device=latents.device)
    sigma = 3 * uniform / (1 + 2 * uniform)
    noise = torch.randn_like(latents)
    weight = sigma[:, None, None, None]
    noisy = weight * noise + (1 - weight) * latents
    outputs = transformer(list(noisy.unsqueeze(2)), 1 - sigma, embeds, return_dict=False)[0]
    predicted = torch.stack(outputs).squeeze(2).float()
    return F.mse_loss(predicted, latents - noise)


def train_transformer(options: argparse.Namespace) -> None:
    every, files = fetch(options.cache)
    subjects = every[: options.subjects]
    pictures = load_subjects(subjects, files, options.side)
    device, weights = options.device, options.weights
    vae = AutoencoderKL.from_pretrained(weights / "vae").to(device).eval()
    scenes = sampled_scenes(len(subjects), options.scenes, seed=random.randrange(2**32))
    captions = [caption(subjects[scene.subject], scene) for scene in scenes]
    latents = encode_scenes(vae, scenes, pictures, device)
    if (weights / "model_index.json").is_file():
        known = ZImagePipeline.from_pretrained(weights)
        words, text_encoder, transformer = known.tokenizer, known.text_encoder, known.transformer
    else:
        # From all names, so that later sittings can add subjects.
        words = tokenizer(caption_corpus(every), vocabulary=4096)
        text_encoder, transformer = text_model(len(words)), transformer_model()
        vae.register_to_config(
            shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item()
        )
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    models = torch.nn.ModuleDict({"text": text_encoder.float(), "image": transformer.float()})
    models = models.to(device).train()
    average = Average(models, decay=0.999)
    optimizer = torch.optim.AdamW(models.parameters(), betas=(0.9, 0.99), weight_decay=0.01)

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
        shown = [_random_scene(generator, generator.randrange(len(subjects))) for _ in range(16)]
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(
            [caption(subjects[scene.subject], scene) for scene in shown],
            *(options.side, options.side, 8),
            guidance_scale=0.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images.cpu()
        wanted = draw(shown, pictures, options.side)
        rows = [part for pair in zip(wanted.chunk(2), drawn.chunk(2), strict=True) for part in pair]
        save_sheet(torch.cat(rows), weights / "transformer.png", columns=8)

    def step() -> torch.Tensor:
        chosen = torch.randint(len(scenes), (options.batch,))
        with torch.autocast(device, dtype=torch.bfloat16, enabled=options.bf16):
            prompts = [captions[k] for k in chosen.tolist()]
            embeds = embed(models["text"], words, prompts, device)
            return flow_loss(models["image"], latents[chosen.to(device)], embeds)

    train("transformer", options, models, average, optimizer, step, save)


def train(
    name: str,
    options: argparse.Namespace,
    models: torch.nn.Module,
    average: Average,
    optimizer: torch.optim.Optimizer,
    step: Callable[[], torch.Tensor],
    save: Callable[[], None],
) -> None:
    """Until the minutes are over; saves every few of them."""
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}"))
    started = saved = time.monotonic()
    seen, smooth = 0, 0.0
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=1.0, note="")
        while (share := (time.monotonic() - started) / (60 * options.minutes)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(share, options.rate)
            loss = step()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(models)
            seen += options.batch
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
    parser.add_argument("part", choices=["autoencoder", "transformer"])
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--weights", type=Path, default=Path("out/demo_weights"))
    parser.add_argument("--cache", type=Path, default=Path("out/demo_data"))
    parser.add_argument("--side", type=int, default=128, help="pixels of a training picture")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--subjects", type=int, default=100, help="of the transformer, food first")
    parser.add_argument("--scenes", type=int, default=40, help="encoded scenes for each subject")
    options = parser.parse_args()
    options.weights.mkdir(parents=True, exist_ok=True)
    {"autoencoder": train_autoencoder, "transformer": train_transformer}[options.part](options)


if __name__ == "__main__":
    main()
