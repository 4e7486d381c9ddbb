"""Draw one page of what the weights do: text to image, and a sweep of strengths from two pictures.

    python scripts/contact_sheet.py [FILE]

Runs the engine of ZIMAGE_WEIGHTS (default: the demo weights) at 256×256, eight steps.
"""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from inference.engine import Engine
from media.decode import decode, to_image
from media.fit import fit
from schemas.task import Task

ROOT = Path(__file__).parent.parent
SIDE, GAP, LABEL = 256, 8, 40
COLUMNS = 6

PROMPTS = (
    "a red apple on a blue background",
    "a rocket on a black background",
    "a large cat on a pink background",
    "a small bus on a green background, at the bottom",
    "a pizza on a white background",
    "a penguin on an orange background, on the left",
)
SWEEPS = (
    ("apple.png", "a pear on a purple background"),
    ("cat.jpg", "a cat face on a yellow background"),
)
STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def tiles(engine: Engine) -> Iterator[tuple[str, Image.Image]]:
    """Labels and pictures, row by row."""
    for seed, prompt in enumerate(PROMPTS):
        yield prompt, generate(engine, Task(prompt, SIDE, SIDE, 8, 1.0, seed, 1))
    for name, prompt in SWEEPS:
        picture = fit(decode((ROOT / "examples" / name).read_bytes()), SIDE, SIDE)
        for strength in STRENGTHS:
            label = f"strength {strength:g}: {prompt}" if strength else f"{name}, strength 0"
            yield label, generate(engine, Task(prompt, SIDE, SIDE, 8, strength, 7, 1, picture))


def generate(engine: Engine, task: Task) -> Image.Image:
    (result,) = engine(task).images
    return to_image(decode(result.data))


def sheet(labelled: list[tuple[str, Image.Image]]) -> Image.Image:
    rows = -(-len(labelled) // COLUMNS)
    width, height = SIDE + GAP, SIDE + LABEL + GAP
    page = Image.new("RGB", (COLUMNS * width + GAP, rows * height + GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=15)
    for k, (label, image) in enumerate(labelled):
        left, top = GAP + k % COLUMNS * width, GAP + k // COLUMNS * height
        page.paste(image, (left, top))
        text = "\n".join(textwrap.wrap(label, width=34))
        pen.text((left, top + SIDE + 3), text, fill="black", font=font)
    return page


def main(path: Path) -> None:
    engine = Engine.load(os.environ.get("ZIMAGE_WEIGHTS", "demo"))
    try:
        page = sheet(list(tiles(engine)))
    finally:
        engine.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, quality=90)
    print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = ROOT / "out" / "contact-sheet.jpg"
    parser.add_argument("path", nargs="?", type=Path, default=default, help="a .jpg or .png")
    main(parser.parse_args().path)
