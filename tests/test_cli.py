"""The `zimage` command as a person runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
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
        ([CAT, "x", "-o", "/proc/a.png"], 2, "--out /proc/a.png cannot be written"),
        ([CAT, "x", "-o", "a.png", "--size", "300"], 2, "WIDTHxHEIGHT such as 451x300"),
        (["-", "x", "-o", "a.png", "--strength", "0.3"], 2, "need an input picture"),
        ([CAT, "x", "-o", "a.png", "--strength", "2"], 1, "strength: Input should be less than"),
        ([CAT, "x", "-o", "a.png", "--size", "99999x1"], 1, "--size: Input should be less than"),
        (
            ["http://10.0.0.1/a.png", "x", "-o", "a.png"],
            1,
            "is not a public address; ZIMAGE_FETCH_ALLOW",
        ),
        ([__file__, "x", "-o", "a.png"], 1, "IMAGE: Unsupported or unrecognized image format"),
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


def test_json_of_a_refusal_is_the_response_body(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    done = zimage("run", broken, "x", "-o", tmp_path / "a.png", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["detail"][0]["type"] == "unsupported_image_format"


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


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = zimage("serve", "--home", tmp_path, "--port", port)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


def test_an_interrupt_stops_after_the_step(tmp_path: Path) -> None:
    command = [ZIMAGE, "run", "-", "x", "-o", tmp_path / "a.png", "--num-images", "4"]
    process = subprocess.Popen(
        [*command, "--size", "768x768"],
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    while not list(tmp_path.glob("zimage-*/zimage.db")):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"stopping after this step" in errors and b"Traceback" not in errors
    assert not list(tmp_path.glob("zimage-*"))


def test_version() -> None:
    assert zimage("--version").stdout.strip() == "0.1.0"


def test_help_lists_every_setting() -> None:
    from gateway.settings import Settings

    text = zimage("serve", "--help").stdout
    for name in Settings.model_fields:
        assert f"ZIMAGE_{name.upper()}" in text


def test_a_lora_that_is_not_there(tmp_path: Path) -> None:
    done = zimage("run", "-", "x", "-o", tmp_path / "x.png", "--lora", "./typo.safetensors:0.5")
    assert done.returncode == 2 and "no such file" in done.stderr


def test_weights_info() -> None:
    done = zimage("weights", "info")
    assert done.returncode == 0
    assert "ZImageTransformer2DModel" in done.stdout
    (largest,) = (line for line in done.stdout.splitlines() if "2048²" in line)
    _, weights, denoise, decode, together = (float(n) for n in re.findall(r"[\d.]+", largest))
    assert weights < denoise < decode and together == pytest.approx(weights + decode, abs=0.011)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tls-cert", CAT], "--tls-cert and --tls-key belong together"),
        (["--tls-cert", CAT, "--tls-key", CAT], "are no certificate with its key"),
        (["--port", "99999"], "less than or equal to 65535"),
    ],
    ids=str,
)
def test_a_server_that_could_not_answer_is_not_started(
    options: list[object], message: str, tmp_path: Path
) -> None:
    done = zimage("serve", "--home", tmp_path, *options)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
