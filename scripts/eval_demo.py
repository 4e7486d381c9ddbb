"""Measure what the demo weights can do, through the engine, on combinations they never saw.

    python scripts/eval_demo.py [--weights demo] [--subjects N] [--side 256] [--scenes 200] [--json FILE]

background  text-to-image: the border's mean colour, nearest of the ten named ones
subject     text-to-image: the picture's nearest neighbour among the same scene drawn with 20
            subjects, the asked-for one and 19 random others; features are 16×16 means in CIELAB
change      image-to-image at strength 0.6, a scene and the caption of another subject: does the
            subject change (as above), and does the layout stay (correlation of the 16×16 luminance
            of what stands out from the background with the input's, and with a random input's)
recolour    image-to-image at 0.6 and 0.8, a scene and the caption of another background
sweep       strength 0, 0.2 … 1: mean distance from the input, and the share of steps that grow
photographs the autoencoder's PSNR at 256² (it was trained on all but `camera`)
time        seconds to load, and for one 8-step picture

Needs what `train_demo.py` needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import random
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from demo_data import (
    COLOURS,
    FIRST,
    Scene,
    Subject,
    caption,
    draw,
    fetch,
    held_out,
    load_photographs,
    load_subjects,
)
from demo_transformer import random_scene
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from skimage.color import rgb2lab

from inference import sampling
from inference.engine import Engine
from schemas.task import Picture, Task

STRENGTH = 0.6
CHOICES = 20
SWEEP = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
PALETTE = torch.tensor(list(COLOURS.values()))


class Evaluation:
    """Subjects, their pictures, and the engine that is asked to draw them."""

    def __init__(self, engine: Engine, subjects: list[Subject], files: Any, side: int) -> None:
        self.engine, self.subjects, self.side = engine, subjects, side
        self.pictures = load_subjects(subjects, files, side)
        self.random = random.Random(1)
        torch.manual_seed(1)

    def scene(self) -> Scene:
        """A combination that training left out."""
        while True:
            scene = random_scene(self.random, self._subject())
            if held_out(self.subjects[scene.subject], scene):
                return scene

    def _subject(self) -> int:
        return self.random.randrange(len(self.subjects))

    def caption(self, scene: Scene) -> str:
        return caption(self.subjects[scene.subject].name, scene)

    def drawn(self, *scenes: Scene) -> torch.Tensor:
        return draw(list(scenes), self.pictures, self.side)

    def generate(
        self, prompt: str, image: torch.Tensor | None = None, strength: float = 1.0
    ) -> torch.Tensor:
        """What the engine makes, (3, side, side), 0…1."""
        seed = self.random.randrange(2**31)
        task = Task(prompt, self.side, self.side, 8, strength, seed, 1, safety=False)
        if image is not None:
            rgb = (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy().tobytes()
            task = dataclasses.replace(task, image=Picture(self.side, self.side, rgb))
        (result,) = self.engine(task).images
        array = np.array(Image.open(io.BytesIO(result.data)).convert("RGB"))
        return torch.from_numpy(array).permute(2, 0, 1).float() / 255

    def finds_subject(self, picture: torch.Tensor, scene: Scene) -> bool:
        others = [k for k in range(len(self.subjects)) if k != scene.subject]
        choices = [scene.subject, *self.random.sample(others, CHOICES - 1)]
        wanted = self.drawn(*(dataclasses.replace(scene, subject=k) for k in choices))
        distances = (features(wanted) - features(picture[None])).square().sum(dim=1)
        return int(distances.argmin()) == 0

    def text_to_image(self, n: int) -> dict[str, float]:
        colours, subjects = [], []
        for scene in [self.scene() for _ in track(range(n), description="text to image")]:
            picture = self.generate(self.caption(scene))
            colours.append(background(picture) == scene.colour)
            subjects.append(self.finds_subject(picture, scene))
        return {"background": share(colours), "subject": share(subjects)}

    def change(self, n: int) -> dict[str, float]:
        subjects, kept, chance = [], [], []
        inputs = [self.scene() for _ in range(n)]
        for k in track(range(n), description="change of subject"):
            scene = dataclasses.replace(inputs[k], subject=self._subject())
            (image,) = self.drawn(inputs[k])
            picture = self.generate(self.caption(scene), image, STRENGTH)
            subjects.append(self.finds_subject(picture, scene))
            (stranger,) = self.drawn(inputs[k - 1])
            kept.append(layout(picture, image))
            chance.append(layout(picture, stranger))
        return {
            "change: subject": share(subjects),
            "change: layout kept": statistics.mean(kept),
            "change: layout by chance": statistics.mean(chance),
        }

    def recolour(self, n: int) -> dict[str, float]:
        hits: dict[float, list[bool]] = {STRENGTH: [], 0.8: []}
        for _ in track(range(n), description="change of background"):
            scene = self.scene()
            other = self.random.choice([name for name in COLOURS if name != scene.colour])
            (image,) = self.drawn(scene)
            wanted = dataclasses.replace(scene, colour=other)
            for strength, found in hits.items():
                picture = self.generate(self.caption(wanted), image, strength)
                found.append(background(picture) == other)
        return {f"recolour: background at {s:g}": share(found) for s, found in hits.items()}

    def sweep(self, n: int) -> dict[str, float]:
        rows = []
        for _ in track(range(n), description="sweeps of strength"):
            scene = self.scene()
            wanted = dataclasses.replace(
                scene, subject=self._subject(), colour=self.random.choice([*COLOURS])
            )
            (image,) = self.drawn(scene)
            row = [self.generate(self.caption(wanted), image, strength) for strength in SWEEP]
            rows.append([(picture - image).abs().mean().item() for picture in row])
        means = [statistics.mean(column) for column in zip(*rows, strict=True)]
        grows = [b >= a - 1e-3 for row in rows for a, b in pairwise(row)]
        named = {f"sweep: {s:g}": mean for s, mean in zip(SWEEP, means, strict=True)}
        return {**named, "sweep: steps that grow": share(grows)}


def share(values: list[bool]) -> float:
    return statistics.mean(map(float, values))


def background(picture: torch.Tensor) -> str:
    """The name of the colour nearest to the border's mean."""
    edge = max(2, picture.shape[1] // 32)
    mask = torch.ones(picture.shape[1:], dtype=torch.bool)
    mask[edge:-edge, edge:-edge] = False
    mean = picture[:, mask].median(dim=1).values
    return list(COLOURS)[int((PALETTE - mean).square().sum(dim=1).argmin())]


def features(pictures: torch.Tensor) -> torch.Tensor:
    """(n, 3, S, S), 0…1 → (n, 768): CIELAB of 16×16 means."""
    small = F.interpolate(pictures, (16, 16), mode="area").permute(0, 2, 3, 1).numpy()
    return torch.from_numpy(rgb2lab(small)).flatten(1)


def layout(one: torch.Tensor, other: torch.Tensor) -> float:
    """Correlation of where they differ from their own backgrounds, in 16×16 luminance."""
    maps = []
    for picture in (one, other):
        luminance = F.interpolate(picture[None], (16, 16), mode="area")[0].mean(dim=0)
        maps.append((luminance - luminance[0].median()).abs().flatten())
    return float(torch.corrcoef(torch.stack(maps))[0, 1])


def photographs(engine: Engine, side: int = 256) -> dict[str, float]:
    """PSNR in dB of the autoencoder alone, on squares cut from the middle."""
    from skimage.data import camera

    unseen = torch.from_numpy(camera()).float().div(255).expand(3, -1, -1)
    names = ("astronaut", "chelsea", "coffee", "rocket", "china", "flower", "camera")
    result = {}
    for name, picture in zip(names, [*load_photographs(), unseen], strict=True):
        edge = min(picture.shape[1:])
        top, left = ((length - edge) // 2 for length in picture.shape[1:])
        square = picture[None, :, top : top + edge, left : left + edge]
        square = F.interpolate(square, (side, side), mode="area") * 2 - 1
        with torch.inference_mode():
            latents = engine.models.autoencoder.vae.encode(
                square.to(engine.models.autoencoder.vae.dtype)
            ).latent_dist.mode()
            decoded = engine.models.autoencoder.vae.decode(latents).sample[0]
        got = sampling.to_pixels(decoded).permute(2, 0, 1).float() / 255
        error = (got - (square[0] + 1) / 2).square().mean()
        result[f"PSNR: {name}"] = -10 * float(error.log10())
    return result


def times(spec: str, side: int) -> dict[str, float]:
    started = time.perf_counter()
    engine = Engine.load(spec, device="cpu")
    loaded = time.perf_counter() - started
    task = Task("a red apple on a blue background", side, side, 8, 1.0, 7, 1)
    engine(task)
    seconds = [engine(task).timings["inference"] for _ in range(5)]
    engine.close()
    return {"seconds to load": loaded, "seconds for a picture": statistics.median(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="demo")
    parser.add_argument("--cache", type=Path, default=Path("out/demo_data"))
    parser.add_argument(
        "--subjects", type=int, default=len(FIRST), help="as many as were trained on"
    )
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    every, files = fetch(options.cache)
    figures = times(options.weights, options.side)
    engine = Engine.load(options.weights, device="cpu")
    evaluation = Evaluation(engine, every[: options.subjects], files, options.side)
    figures |= photographs(engine)
    figures |= evaluation.text_to_image(options.scenes)
    figures |= evaluation.change(options.scenes // 2)
    figures |= evaluation.recolour(options.scenes // 2)
    figures |= evaluation.sweep(options.scenes // 10)
    engine.close()
    table = Table("", "figure", title=f"{options.weights}, {engine.weights.revision}")
    for name, value in figures.items():
        table.add_row(name, f"{value:.3f}")
    Console().print(table)
    if options.json:
        settings = {"subjects": options.subjects, "side": options.side, "scenes": options.scenes}
        options.json.write_text(json.dumps({**settings, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
