"""Scenes of the demo weights' training set: what the caption says is what the picture shows."""

from __future__ import annotations

import itertools

import pytest
import torch
from demo_data import COLOURS, PLACES, SIZES, Scene, Subject, caption, draw, held_out

APPLE = Subject("red apple", 4, "1f34e")
WHITE_DISC = torch.zeros(1, 4, 64, 64, dtype=torch.uint8)
WHITE_DISC[0, :, 8:56, 8:56] = 255


def test_captions() -> None:
    assert caption(APPLE.name, Scene(0, "blue", "", "")) == "a red apple on a blue background"
    assert (
        caption(APPLE.name, Scene(0, "black", "small", "on the left"))
        == "a small red apple on a black background, on the left"
    )


@pytest.mark.parametrize("colour", COLOURS)
def test_backgrounds_have_the_named_colour(colour: str) -> None:
    (picture,) = draw([Scene(0, colour, "small", "")], WHITE_DISC, 64)
    assert picture.shape == (3, 64, 64)
    torch.testing.assert_close(picture[:, 0, 0], torch.tensor(COLOURS[colour]))
    torch.testing.assert_close(picture[:, 32, 32], torch.ones(3))


@pytest.mark.parametrize("place", PLACES)
def test_subjects_stand_where_the_caption_says(place: str) -> None:
    (picture,) = draw([Scene(0, "black", "small", place)], WHITE_DISC, 64)
    rows, columns = (picture[0] > 0.5).nonzero(as_tuple=True)
    middle = 0.25 + 0.5 * torch.tensor(PLACES[place])  # half the side is free room
    assert columns.float().mean() / 63 == pytest.approx(middle[0].item(), abs=0.03)
    assert rows.float().mean() / 63 == pytest.approx(middle[1].item(), abs=0.03)


def test_sizes_grow() -> None:
    areas = [
        (draw([Scene(0, "black", size, "")], WHITE_DISC, 64)[0, 0] > 0.5).sum() for size in SIZES
    ]
    assert areas == sorted(areas) and len(set(map(int, areas))) == len(SIZES)


def test_combinations_are_held_out_not_subjects_and_not_colours() -> None:
    subjects = [Subject(f"thing {k}", 7, f"{0x1F34E + k:x}") for k in range(20)]
    scenes = [Scene(*parts) for parts in itertools.product(range(20), COLOURS, SIZES, PLACES)]
    kept = [scene for scene in scenes if not held_out(subjects[scene.subject], scene)]
    assert 0.08 < 1 - len(kept) / len(scenes) < 0.12
    pairs = {(scene.subject, scene.colour) for scene in kept}
    assert pairs == set(itertools.product(range(20), COLOURS))
