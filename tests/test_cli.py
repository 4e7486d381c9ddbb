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

from tests.conftest import CAT, ROOT

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


def test_a_tile_keeps_what_its_mask_says(tmp_path: Path) -> None:
    image, mask, out = (tmp_path / name for name in ("image.png", "mask.png", "out.png"))
    Image.new("RGB", (64, 48), "teal").save(image)
    Image.new("L", (64, 48)).save(mask)
    tiling = ["--tiling", "horizontal", "--tile-size", "64", "--tile-stride", "32", "--mask", mask]
    options = [*tiling, "--size", "64x48", "--strength", "1", "--steps", "1"]
    done = zimage("run", image, "a hat", "-o", out, *options)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as made:
        assert made.size == (64, 48) and made.getcolors() == [(64 * 48, (0, 128, 128))]


def test_the_base_model(tmp_path: Path) -> None:
    out = tmp_path / "cat.png"
    guided = ["--guidance-scale", "2", "--negative-prompt", "a dog", "--steps", "9"]
    done = zimage("run", "-", "a cat", "-o", out, "--base", *guided, "--size", "64x48")
    assert done.returncode == 0, done.stderr
    with Image.open(out) as made:
        assert made.size == (64, 48)
    assert "then ZIMAGE_BASE_WEIGHTS=Tongyi-MAI/Z-Image" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-", "--base", "--strength", "0.5"], "--strength is not for fal-ai/z-image/base, but"),
        ([CAT, "--base"], "IMAGE is not for fal-ai/z-image/base, but"),
        (["-", "--base", "--expand"], "--expand is not for fal-ai/z-image/base, but"),
        (["-", "--base", "--tiling", "both"], "--tiling is not for fal-ai/z-image/base, but"),
        (
            [CAT, "--mask", CAT],
            "--mask is not for fal-ai/z-image/turbo/image-to-image, "
            "but for fal-ai/z-image/turbo/tiling\n",
        ),
        (["-", "--tile-size", "64"], "--tile-size is not for fal-ai/z-image/turbo, but"),
        (["-", "--negative-prompt", "x"], "--negative-prompt is not for fal-ai/z-image/turbo, but"),
        (["-", "--tiling", "both", "--strength", "0.5"], "--strength and --size auto need an"),
        (["-", "--tiling", "both", "--mask", "no.png"], "--mask 'no.png' is neither a file nor"),
        (["-", "--tiling", "both", "--mask", CAT], "IMAGE: A mask needs an image"),
        (["-", "--tiling", "up"], "'up' is not one of 'both', 'horizontal', 'vertical'"),
        (["-", "--base", "--weights", "/nowhere"], "'/nowhere' does not exist"),
        (["-", "--base"], "set ZIMAGE_BASE_WEIGHTS"),
    ],
    ids=str,
)
def test_what_an_endpoint_does_not_have_is_named(
    arguments: list[object], message: str, tmp_path: Path
) -> None:
    options = [*arguments, "-o", tmp_path / "a.png"]
    done = zimage("run", arguments[0], "x", *options[1:], ZIMAGE_WEIGHTS="/not/looked/at")
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere.png", "x", "-o", "a.png"], 2, "neither a file nor a URL"),
        (["no[/b]where.png", "x", "-o", "a.png"], 2, "'no[/b]where.png' is neither"),
        ([CAT, "x", "-o", "a.bmp"], 2, "give it a suffix"),
        ([CAT, "x", "-o", "/proc/a.png"], 2, "--out /proc/a.png cannot be written"),
        ([CAT, "x", "-o", "a.png", "--size", "300"], 2, "WIDTHxHEIGHT such as 451x300"),
        (["-", "x", "-o", "a.png", "--strength", "0.3"], 2, "need an input picture"),
        ([CAT, "x", "-o", "a.png", "--strength", "2"], 2, "strength: Input should be less than"),
        ([CAT, "x", "-o", "a.png", "--size", "99999x1"], 2, "--size: Input should be less than"),
        (
            ["http://10.0.0.1/a.png", "x", "-o", "a.png"],
            1,
            "is not a public address; ZIMAGE_FETCH_ALLOW",
        ),
        ([__file__, "x", "-o", "a.png"], 2, "IMAGE: Unsupported or unrecognized image format"),
        ([CAT, "x", "-o", "a.png", "--lora", "a.safetensors:much"], 2, "scale 'much' is not a"),
        ([CAT, "x", "-o", "/tmp"], 2, "is a directory"),
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


def test_a_failed_run_leaves_no_folder(tmp_path: Path) -> None:
    done = zimage("run", "http://10.0.0.1/a.png", "x", "-o", tmp_path / "new" / "a.png")
    assert done.returncode == 1 and not list(tmp_path.iterdir())


def test_json_of_a_refusal_is_the_response_body(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    done = zimage("run", broken, "x", "-o", tmp_path / "a.png", "--json")
    assert done.returncode == 2
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
        ([], {"ZIMAGE_DEVICE": "gpu"}, "ZIMAGE_DEVICE: there is no device 'gpu' here"),
        ([], {"ZIMAGE_DEVICE": "xpu"}, "ZIMAGE_DEVICE: there is no device 'xpu' here"),
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


def test_a_setting_that_nobody_reads_is_named() -> None:
    environment = {"ZIMAGE_WEIGHT": "demo", "ZIMAGE_RETENTION": "60"}
    done = zimage("schedule", "list", **environment)
    assert "no setting ZIMAGE_WEIGHT; is ZIMAGE_WEIGHTS meant?" in done.stderr.replace("\n", " ")
    assert "RETENTION" not in done.stderr


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


@pytest.mark.parametrize("command", [["serve", "--port", "0"], ["schedule", "serve"]], ids=str)
def test_an_interrupted_server_says_so(command: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen(
        [ZIMAGE, *command],
        stderr=subprocess.PIPE,
        env={
            **os.environ,
            "ZIMAGE_HOME": str(tmp_path),
            "ZIMAGE_SCHEDULES": str(ROOT / "examples" / "schedules.toml"),
        },
    )
    while not (tmp_path / "zimage.db").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in errors, errors


def test_a_download_that_fails_was_begun(tmp_path: Path) -> None:
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = zimage("weights", "fetch", "some/weights", **away)
    assert done.returncode == 1 and "some/weights could not be downloaded" in done.stderr
    assert zimage("weights", "fetch", "no-hub-id").returncode == 2


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
