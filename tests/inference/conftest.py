"""A task to vary, and a transformer of its own for tests that change its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from inference.engine import Engine
from inference.lora import Loras
from media.decode import to_picture
from media.fit import fit
from schemas.task import Task
from tests.inference.lora_files import same_bytes


@pytest.fixture
def task(photo: Image.Image) -> Task:
    return Task(
        prompt="a ginger cat",
        width=160,
        height=128,
        steps=8,
        strength=0.6,
        seed=7,
        num_images=1,
        image=fit(to_picture(photo), 160, 128),
    )


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def transformer(engine: Engine, request: pytest.FixtureRequest) -> torch.nn.Module:
    """The demo transformer, apart from the engine's."""
    return copy.deepcopy(engine.models.transformer).to(request.param)


@pytest.fixture
def loras(transformer: torch.nn.Module, tmp_path: Path) -> Iterator[Loras]:
    """Ends with every byte and every address what they were."""
    before = {name: (p.data_ptr(), p.clone()) for name, p in transformer.named_parameters()}
    loras = Loras(transformer, tmp_path)
    yield loras
    loras.apply([])
    for name, parameter in transformer.named_parameters():
        address, value = before[name]
        assert parameter.data_ptr() == address and same_bytes(parameter, value), name
