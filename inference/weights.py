"""Where weights come from: `demo`, a directory, or a hub id with optional `@revision`.

A set of weights is a diffusers pipeline directory (model_index.json and five component folders).
Nothing is ever downloaded here except by `fetch`, and a missing set is an error that says how to get
it: there is no silent fallback from real weights to demo weights.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEMO = "demo"
DEMO_DIRECTORY = Path(__file__).parent / "demo_weights"
HUB_ID = "Tongyi-MAI/Z-Image-Turbo"

COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")

_HUB_SPEC = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_SHA256 = re.compile("[0-9a-f]{64}")
_PATTERNS = ["model_index.json", *(f"{name}/*" for name in COMPONENTS)]


class WeightsError(Exception):
    """Weights are missing or incomplete; the message says which and how to get them."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A complete set on disk. revision: hub commit, or what the set's own `revision.txt` says."""

    spec: str
    path: Path
    revision: str

    @property
    def language_model(self) -> bool:
        """Whether the text encoder was saved as a whole language model, so that it can write, too."""
        config = self.config("text_encoder")
        return any(name.endswith("ForCausalLM") for name in config.get("architectures") or ())

    @property
    def bytes(self) -> int:
        """Of all tensors, as the files hold them."""
        return sum(file.stat().st_size for file in self.path.glob("*/*.safetensors"))

    def config(self, component: str) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.path / component / "config.json").read_text())
        return config


def locate(spec: str) -> Weights:
    """Find a complete set of weights on this machine. Raises WeightsError."""
    if spec == DEMO:
        return _checked(spec, DEMO_DIRECTORY)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _checked(spec, path)
    match = _HUB_SPEC.fullmatch(spec)
    if match is None or spec.startswith((".", "/", "~")):
        raise WeightsError(
            f"Weights directory {spec!r} does not exist. Give 'demo', an existing directory in "
            f"diffusers layout, or a hub id such as {HUB_ID}@main."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(
            match["id"],
            revision=match["revision"],
            allow_patterns=_PATTERNS,
            local_files_only=True,
        )
    except LocalEntryNotFoundError:
        raise WeightsError(
            f"Weights {spec} are not on this machine. Get them with: zimage weights fetch {spec} "
            f"(about 20 GB), or use the small ones that come along: ZIMAGE_WEIGHTS=demo"
        ) from None
    return _checked(spec, Path(snapshot))


def fetch(spec: str) -> Weights:
    """Download a hub id into the hub's local cache, resuming what is there, and check it.

    Raises WeightsError if a file is missing or is not what its checksum says; whatever the hub raises.
    """
    from huggingface_hub import snapshot_download

    match = _HUB_SPEC.fullmatch(spec)
    if match is None:
        raise WeightsError(f"{spec!r} is not a hub id such as {HUB_ID}@main")
    snapshot_download(match["id"], revision=match["revision"], allow_patterns=_PATTERNS)
    weights = locate(spec)
    if broken := broken_files(weights.path):
        raise WeightsError(
            f"Weights {spec} arrived damaged: {', '.join(broken)}. Delete them and fetch again."
        )
    return weights


def broken_files(snapshot: Path) -> list[str]:
    """Large files whose SHA-256 is not what the hub calls them by. Reads all of them, 1 GB/s or so."""
    broken = []
    for file in sorted(snapshot.rglob("*")):
        name = file.resolve().name  # in the hub's cache, a link to a blob named after its checksum
        if _SHA256.fullmatch(name):
            with file.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != name:
                    broken.append(f"{file.relative_to(snapshot)} ({file.resolve()})")
    return broken


def missing_files(path: Path) -> list[str]:
    """Files that a complete set would have and this one lacks, shards included."""
    if not (path / "model_index.json").is_file():
        return ["model_index.json"]
    return list(_missing(path))


def _missing(path: Path) -> Iterator[str]:
    if not (path / "scheduler" / "scheduler_config.json").is_file():
        yield "scheduler/scheduler_config.json"
    if not any((path / "tokenizer" / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        yield "tokenizer/tokenizer.json"
    for component in ("text_encoder", "transformer", "vae"):
        folder = path / component
        if not (folder / "config.json").is_file():
            yield f"{component}/config.json"
        if indexes := list(folder.glob("*.safetensors.index.json")):
            shards = set(json.loads(indexes[0].read_text())["weight_map"].values())
            yield from (
                f"{component}/{name}" for name in sorted(shards) if not (folder / name).is_file()
            )
        elif not list(folder.glob("*.safetensors")):
            yield f"{component}/*.safetensors"


def _checked(spec: str, path: Path) -> Weights:
    if missing := missing_files(path):
        raise WeightsError(
            f"Weights {spec} in {path} are incomplete, missing: {', '.join(missing)}. "
            f"Get a complete set with: zimage weights fetch {HUB_ID}"
        )
    return Weights(spec, path, _revision(path))


def _revision(path: Path) -> str:
    if (note := path / "revision.txt").is_file():
        return note.read_text().strip()
    return path.name if path.parent.name == "snapshots" else "local"
