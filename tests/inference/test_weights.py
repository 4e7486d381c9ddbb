from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from inference.engine import Engine
from inference.weights import DEMO_DIRECTORY, HUB_ID, WeightsError, broken_files, locate


def test_demo_weights_come_along() -> None:
    weights = locate("demo")
    assert weights.revision and weights.path == DEMO_DIRECTORY


def test_a_directory(tmp_path: Path) -> None:
    copied = shutil.copytree(DEMO_DIRECTORY, tmp_path / "mine")
    assert Engine.load(str(copied), device="cpu").weights.path == copied


@pytest.mark.parametrize(
    "missing",
    [
        "model_index.json",
        "transformer/config.json",
        "vae/*.safetensors",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_an_incomplete_set_says_what_is_missing(tmp_path: Path, missing: str) -> None:
    copied = shutil.copytree(DEMO_DIRECTORY, tmp_path / "mine")
    for file in copied.glob(missing):
        file.unlink()
    with pytest.raises(WeightsError, match="incomplete") as caught:
        locate(str(copied))
    assert missing in str(caught.value) and "zimage weights fetch" in str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    copied = shutil.copytree(DEMO_DIRECTORY, tmp_path / "mine")
    index = copied / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "shard-1.safetensors", "b": "shard-2.safetensors"}}')
    (copied / "transformer" / "shard-1.safetensors").touch()
    with pytest.raises(WeightsError, match=r"missing: transformer/shard-2\.safetensors\."):
        locate(str(copied))


@pytest.mark.parametrize("spec", ["./nowhere", "/nowhere", "~/nowhere", "nowhere", ""])
def test_a_missing_directory(spec: str) -> None:
    with pytest.raises(WeightsError):
        locate(spec)


@pytest.mark.parametrize("spec", [HUB_ID, f"{HUB_ID}@v1.0"])
def test_hub_weights_that_are_not_here_say_how_to_get_them(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=f"zimage weights fetch {spec}"):
        locate(spec)


def test_a_damaged_download_is_named(tmp_path: Path) -> None:
    """In the hub's cache a large file is a link to a blob that is named after its checksum."""
    snapshot, blobs = tmp_path / "snapshots" / "abc" / "vae", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    whole, damaged = (hashlib.sha256(data).hexdigest() for data in (b"whole", b"as it was"))
    (blobs / whole).write_bytes(b"whole")
    (blobs / damaged).write_bytes(b"as it is")
    (blobs / ("0" * 40)).write_bytes(b"small files have no such name")
    for name, blob in (
        ("a.safetensors", whole),
        ("b.safetensors", damaged),
        ("config.json", "0" * 40),
    ):
        (snapshot / name).symlink_to(blobs / blob)
    (found,) = broken_files(snapshot.parent)
    assert found.startswith("vae/b.safetensors ")
