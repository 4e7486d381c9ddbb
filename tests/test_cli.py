"""The `zimage` command as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import CAT

ZIMAGE = Path(sys.executable).parent / "zimage"
FAST = ["--steps", "2", "--size", "64x48", "--seed", "7"]


def zimage(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("ZIMAGE_")}
    return subprocess.run(
        [ZIMAGE, *map(str, arguments)],
        env={**clean, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_a_photograph_becomes_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "new" / "cat.webp"
    done = zimage("run", CAT, "a hat", "-o", out, "--json", *FAST)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as image:
        assert (image.size, image.format) == ((64, 48), "WEBP")
    body = json.loads(done.stdout)
    assert body["seed"] == 7 and body["images"][0]["url"] == out.as_uri()
    assert "where the time went" in done.stderr and "denoise" in done.stderr
    assert "zimage weights fetch" in done.stderr


def test_text_to_image_and_numbered_files(tmp_path: Path) -> None:
    out = tmp_path / "cat.jpg"
    done = zimage("run", "-", "a cat", "-o", out, "--num-images", 2, *FAST)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat-1.jpg", "cat-2.jpg"]
    assert "seed 7" in done.stderr and "seed 8" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere.png", "x", "-o", "a.png"], 2, "neither a file nor a URL"),
        (["no[/b]where.png", "x", "-o", "a.png"], 2, "'no[/b]where.png' is neither"),
        ([CAT, "x", "-o", "a.bmp"], 2, "give it a suffix"),
        ([CAT, "x", "-o", "a.png", "--strength", "2"], 1, "strength: Input should be less than"),
        ([CAT, "x", "-o", "a.png", "--size", "99999x1"], 1, "image_size.width"),
        (["http://10.0.0.1/a.png", "x", "-o", "a.png"], 1, "image_url: File download error"),
        ([__file__, "x", "-o", "a.png"], 1, "image_url: Unsupported or unrecognized image format"),
        ([CAT, "x", "-o", "a.png", "--weights", "/nowhere"], 2, "does not exist"),
        ([CAT, "x", "-o", "a.png", "--weights", "a/b"], 2, "zimage weights fetch a/b"),
    ],
    ids=str,
)
def test_mistakes_are_explained(
    arguments: list[object], code: int, message: str, tmp_path: Path
) -> None:
    done = zimage("run", *arguments, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--host", "0.0.0.0"], {}, "No keys to check requests with: set ZIMAGE_KEYS"),
        ([], {"ZIMAGE_AUTH": "on"}, "No keys to check"),
        ([], {"ZIMAGE_KEYS": "broken"}, "not of the form id:secret"),
        ([], {"ZIMAGE_FETCH_ALLOW": "everything"}, "ZIMAGE_FETCH_ALLOW"),
        ([], {"ZIMAGE_ACCELERATION_DEFAULT": "warp"}, "ZIMAGE_ACCELERATION_DEFAULT"),
        ([], {"ZIMAGE_WEIGHTS": "/nowhere"}, "does not exist"),
    ],
    ids=str,
)
def test_serve_refuses_to_start_wrong(
    arguments: list[str], environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    done = zimage("serve", "--home", tmp_path, *arguments, **environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_every_setting() -> None:
    from gateway.settings import Settings

    text = zimage("serve", "--help").stdout
    for name in Settings.model_fields:
        assert f"ZIMAGE_{name.upper()}" in text


def test_weights_info() -> None:
    done = zimage("weights", "info")
    assert done.returncode == 0
    assert "ZImageTransformer2DModel" in done.stdout
