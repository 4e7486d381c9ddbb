"""Promise 1: picture k of a request with seed s is picture 0 of the request with seed s + k."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from inference.engine import Engine
from media.decode import to_picture
from schemas.task import Picture, Task, Tiling
from tests.inference.lora_files import pairs, save, weights, written
from tests.inference.tasks import change, only


@pytest.fixture
def engine(engine: Engine) -> Iterator[Engine]:
    """Leaves the weights as they were: a task's LoRAs stay merged until another task comes."""
    yield engine
    engine.models.merge(())


def masked(width: int, height: int) -> Picture:
    """White, to draw anew, in the left half."""
    mask = Image.new("RGB", (width, height))
    mask.paste((255, 255, 255), (0, 0, width // 2, height))
    return to_picture(mask)


@pytest.mark.parametrize("level", ["none", "regular"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"image": None, "strength": 1.0},
        {"guidance_scale": 4.0, "negative_prompt": "a dog"},
        {"mask": masked(160, 128)},
        {"tiling": Tiling("both", size=16, stride=8)},
        {"tiling": Tiling("horizontal", size=64, stride=32), "mask": masked(160, 128)},
        {"loras": "a file"},
    ],
    ids=["plain", "text", "guidance", "mask", "tiles", "tiling and mask", "lora"],
)
def test_promise_1_picture_k_is_seed_s_plus_k(
    engine: Engine, task: Task, level: str, fields: dict[str, Any]
) -> None:
    if "loras" in fields:
        made = written("kohya", pairs(weights(engine.models.transformer), 9))
        fields = {"loras": (save(engine.models.loras, "9" * 64, made),)}
    request = change(task, acceleration=level, steps=4, **fields)
    together = engine(change(request, num_images=3))
    apart = [only(engine(change(request, seed=7 + k))) for k in range(3)]
    assert [image.data for image in together.images] == apart
    assert len(set(apart)) == 3
