"""Promise 4: acceleration changes time, never meaning."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from PIL import Image

from inference.engine import Engine
from inference.plan import Plan
from media.decode import to_picture
from media.fit import fit
from schemas.task import Task
from tests.inference.tasks import change, only, psnr


@pytest.fixture(scope="module")
def bfloat16() -> Iterator[Engine]:
    engine = Engine.load("demo", device="cpu", dtype=torch.bfloat16)
    yield engine
    engine.close()


@pytest.mark.parametrize("prompt", ["a ginger cat", "a red apple on a blue background"])
def test_promise_4_regular_is_lossless_up_to_rounding(
    bfloat16: Engine, task: Task, photo: Image.Image, prompt: str
) -> None:
    picture = fit(to_picture(photo), 256, 256)
    square = change(task, prompt=prompt, width=256, height=256, image=picture)
    for each in (square, change(square, image=None, strength=1.0)):
        none, regular = (
            bfloat16(change(each, acceleration=level)) for level in ("none", "regular")
        )
        assert none.plan == "diffusers' own forward" and regular.plan == "lean forward"
        assert psnr(only(none), only(regular)) >= 45


@pytest.mark.parametrize("prompt", ["a ginger cat", "a red apple on a blue background"])
def test_promise_4_high_is_within_its_bound(
    bfloat16: Engine, task: Task, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 8-bit arithmetic of a GPU's plan, done by a CPU."""
    whole = change(task, prompt=prompt, width=256, height=256, image=None, strength=1.0)
    none = bfloat16(change(whole, acceleration="none"))
    monkeypatch.setattr("inference.engine.plan", lambda *_: Plan(lean=True, float8=True))
    high = bfloat16(change(whole, acceleration="high"))
    assert high.plan == "lean forward, float8 matrices"
    assert 30 <= psnr(only(none), only(high)) < 60


def test_promise_4_levels_leave_nothing_behind(bfloat16: Engine, task: Task) -> None:
    before = only(bfloat16(change(task, acceleration="none")))
    bfloat16(change(task, acceleration="regular"))
    bfloat16(change(task, acceleration="high"))
    assert only(bfloat16(change(task, acceleration="none"))) == before
