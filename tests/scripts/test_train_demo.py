"""Training the demo weights: the start, the diet, and the whole way on two emoji of our own."""

from __future__ import annotations

import io
import json
import random
import sys
import tarfile
from pathlib import Path

import demo_autoencoder
import demo_transformer
import pytest
import torch
import train_demo
from demo_data import COLOURS, NAMES, PICTURES, Scene, Subject, held_out, other_names
from PIL import Image

from inference.engine import Engine
from schemas.task import Task
from tests.conftest import CAT, encoded


@pytest.fixture(scope="module")
def photograph() -> torch.Tensor:
    rgb = Image.open(CAT).convert("RGB")
    data = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return data.view(rgb.height, rgb.width, 3).permute(2, 0, 1).float() / 255


def test_an_untrained_autoencoder_is_a_linear_code(photograph: torch.Tensor) -> None:
    square = photograph[None, :, :256, :256] * 2 - 1
    patches = square.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    mean, basis, scale = demo_autoencoder.principal_components(patches)
    model = demo_autoencoder.autoencoder_model(patches)
    with torch.no_grad():
        codes = model.encode(square).latent_dist.mode()[0].flatten(1)
    wanted = torch.einsum("npqr,kpqr->kn", patches - mean, basis) / scale[:, None]
    for ours, theirs in zip(codes, wanted, strict=True):
        assert torch.corrcoef(torch.stack((ours, theirs)))[0, 1] > 0.999
        assert ours.std() == pytest.approx(theirs.std().item(), rel=0.1)


@pytest.mark.parametrize("colour", COLOURS)
def test_an_untrained_autoencoder_keeps_flat_colours(colour: str, photograph: torch.Tensor) -> None:
    torch.manual_seed(0)
    patches = demo_autoencoder.sample_patches(
        torch.full((4, 4, 128, 128), 255, dtype=torch.uint8), [photograph]
    )
    model = demo_autoencoder.autoencoder_model(patches)
    flat = torch.tensor(COLOURS[colour])[None, :, None, None].expand(1, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        middle = model(flat).sample[0, :, 48:80, 48:80].mean(dim=(1, 2))
    distances = {
        name: (middle / 2 + 0.5 - torch.tensor(rgb)).norm().item() for name, rgb in COLOURS.items()
    }
    assert min(distances, key=distances.__getitem__) == colour


def test_nothing_held_out_is_trained_on() -> None:
    subjects = [Subject(f"thing {k}", 7, f"{k:x}") for k in range(50)]
    scenes = demo_transformer.sampled_scenes(subjects, 20, seed=1)
    assert len(scenes) == 1000
    assert not any(held_out(subjects[scene.subject], scene) for scene in scenes)


def test_captions_vary() -> None:
    random.seed(1)
    scene = Scene(0, "blue", "small", "on the left")
    said = {demo_transformer.spoken(scene, "automobile", ["car"]) for _ in range(200)}
    assert said == {
        f"a small {name}{background}, on the left"
        for name in ("automobile", "car")
        for background in ("", " on a blue background")
    }


def test_other_names_are_tags_that_say_which() -> None:
    animals = ("animal", "pet")
    subjects = [
        Subject("cat", 3, "1", (*animals, "kitten")),
        Subject("dog", 3, "2", (*animals, "puppy", "cat")),
        Subject("cow", 3, "3", ("animal",)),
    ]
    assert other_names(subjects) == [["pet", "kitten"], ["pet", "puppy"], []]


def archives(cache: Path) -> None:
    """The two packages as npm would fetch them, with two emoji: a red disc and a green square."""
    disc = Image.new("RGBA", (64, 64))
    disc.paste("red", (16, 16, 48, 48))
    square = Image.new("RGBA", (64, 64), "green")
    files = {
        PICTURES: {
            "package/assets/1f534.webp": encoded(disc, "WEBP"),
            "package/assets/1f7e9.webp": encoded(square, "WEBP"),
        },
        NAMES: {
            "package/en/data.json": json.dumps(
                [
                    {
                        "hexcode": "1F534",
                        "label": "red circle",
                        "group": 8,
                        "order": 1,
                        "tags": ["dot"],
                    },
                    {"hexcode": "1F7E9", "label": "green square", "group": 8, "order": 2},
                ]
            ).encode()
        },
    }
    for package, members in files.items():
        name, _, version = package.rpartition("@")
        path = cache / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
        with tarfile.open(path, "w:gz") as tar:
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_from_nothing_to_weights_that_load_and_train_on(
    tmp_path: Path, photograph: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds of training only: that the parts fit, not that the pictures are good."""
    archives(tmp_path)
    package = tmp_path / "package"
    monkeypatch.setattr(train_demo, "DEMO_DIRECTORY", package)
    monkeypatch.setattr(train_demo, "load_photographs", lambda: [photograph])

    def run(part: str, *options: str) -> None:
        small = ("--side", "32", "--batch", "4", "--minutes", "0.02", "--no-compile")
        places = ("--weights", str(tmp_path / "weights"), "--cache", str(tmp_path))
        monkeypatch.setattr(sys, "argv", ["train_demo.py", part, *small, *places, *options])
        train_demo.main()

    run("autoencoder", "--from-scratch")
    run("transformer", "--subjects", "2", "--scenes", "4")
    run("publish")
    revision = (package / "revision.txt").read_text()
    run("transformer", "--subjects", "2", "--scenes", "4")
    run("autoencoder")
    run("publish")
    assert revision != (package / "revision.txt").read_text()
    for sheet in ("autoencoder.png", "transformer.png"):
        Image.open(tmp_path / "weights" / sheet).load()

    engine = Engine.load(str(package), device="cpu")
    try:
        assert f"{engine.weights.revision}\n" == (package / "revision.txt").read_text()
        assert len(engine(Task("a dot", 32, 32, 2, 1.0, 0, 1)).images) == 1
    finally:
        engine.close()
