"""The demo weights mean what they draw: prompts, pictures and strengths have their effect.

`scripts/eval_demo.py` measures the same, and more, on hundreds of pictures.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from demo_data import COLOURS
from PIL import Image

from inference.engine import Engine
from inference.weights import DEMO_DIRECTORY
from media.decode import to_picture
from media.fit import fit
from schemas.task import Picture, Task
from tests.conftest import ROOT, opened

MEGABYTE = 1_000_000


@pytest.fixture
def task() -> Task:
    return Task("a red apple on a blue background", 256, 256, 8, 1.0, 7, 1, safety=False)


def draw(engine: Engine, task: Task, **changes: object) -> np.ndarray:
    """RGB (H, W, 3), 0…1."""
    (image,) = engine(dataclasses.replace(task, **changes)).images  # type: ignore[arg-type]
    return np.asarray(opened(image.data).convert("RGB")) / 255


def pixels(picture: Picture) -> np.ndarray:
    shape = (picture.height, picture.width, 3)
    return np.frombuffer(picture.rgb, np.uint8).reshape(shape) / 255


def named(rgb: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: float(np.square(rgb - np.array(COLOURS[name])).sum()))


def border(picture: np.ndarray) -> np.ndarray:
    edges = (picture[:8], picture[-8:], picture[:, :8], picture[:, -8:])
    return np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)


def middle(picture: np.ndarray) -> np.ndarray:
    height, width = (length // 3 for length in picture.shape[:2])
    return np.median(picture[height:-height, width:-width].reshape(-1, 3), axis=0)


@pytest.mark.parametrize("colour", COLOURS)
def test_backgrounds_follow_the_prompt(engine: Engine, task: Task, colour: str) -> None:
    assert named(border(draw(engine, task, prompt=f"a cat on a {colour} background"))) == colour


@pytest.mark.parametrize(
    ("subject", "colours"),
    [
        ("red apple", {"red"}),
        ("green apple", {"green", "yellow"}),
        ("lemon", {"yellow"}),
        ("tangerine", {"orange"}),
        ("eggplant", {"purple"}),
        ("red heart", {"red", "pink"}),
    ],
)
def test_subjects_follow_the_prompt(
    engine: Engine, task: Task, subject: str, colours: set[str]
) -> None:
    picture = draw(engine, task, prompt=f"a large {subject} on a white background")
    assert named(middle(picture)) in colours


def test_places_follow_the_prompt(engine: Engine, task: Task) -> None:
    def centre(place: str) -> tuple[float, float]:
        prompt = f"a small red apple on a white background, {place}"
        dark = 1 - draw(engine, task, prompt=prompt).min(axis=2)
        rows, columns = np.mgrid[: task.height, : task.width] / (task.height - 1)
        return float((columns * dark).sum() / dark.sum()), float((rows * dark).sum() / dark.sum())

    assert centre("on the left")[0] < 0.4 < 0.6 < centre("on the right")[0]
    assert centre("at the top")[1] < 0.4 < 0.6 < centre("at the bottom")[1]


@pytest.fixture
def apple() -> Picture:
    """A red apple on white, 256×256."""
    return to_picture(Image.open(ROOT / "examples" / "apple.png").convert("RGB"))


def test_another_thing_in_the_same_place(engine: Engine, task: Task, apple: Picture) -> None:
    prompt = "a pear on a white background"
    picture = draw(engine, task, prompt=prompt, image=apple, strength=0.6)
    assert named(border(picture)) == "white"
    assert named(middle(pixels(apple))) == "red"
    assert named(middle(picture)) != "red"


def test_another_background_behind_the_same_thing(
    engine: Engine, task: Task, apple: Picture
) -> None:
    prompt = "a red apple on a purple background"
    picture = draw(engine, task, prompt=prompt, image=apple, strength=0.8)
    assert named(border(picture)) == "purple"
    assert named(middle(picture)) == "red"


def test_pictures_leave_the_input_as_strength_grows(
    engine: Engine, task: Task, photo: Image.Image
) -> None:
    image = fit(to_picture(photo), 256, 256)
    original = pixels(image)
    distances = [
        float(np.abs(draw(engine, task, image=image, strength=strength) - original).mean())
        for strength in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    ]
    assert distances == sorted(distances)
    assert distances[0] == 0 and distances[1] < 0.1 < distances[-1]


def test_seeds_vary_the_picture(engine: Engine, task: Task) -> None:
    one, other = draw(engine, task), draw(engine, task, seed=8)
    assert np.abs(one - other).mean() > 0.005


def test_they_come_along_complete_and_small() -> None:
    size = sum(file.stat().st_size for file in DEMO_DIRECTORY.rglob("*") if file.is_file())
    assert size < 40 * MEGABYTE
    card = (DEMO_DIRECTORY / "README.md").read_text()
    assert (DEMO_DIRECTORY / "samples.jpg").is_file() and "samples.jpg" in card
