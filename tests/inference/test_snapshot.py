"""Every snapshot mode ends with a warm engine on its device that draws the same picture."""

from __future__ import annotations

import pytest
import torch

from inference.engine import Engine
from inference.snapshot import HEALTH_CHECK, Mode, SnapshotEngine
from schemas.task import Result, Task

TASK = Task("a cat", 64, 48, steps=2, strength=1.0, seed=3, num_images=1)


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the engine that pictures are compared with."""
    monkeypatch.setattr("inference.models.default_dtype", lambda device: torch.float32)


@pytest.mark.parametrize(
    ("mode", "warm_before", "warm_after"),
    [("gpu", 2, 1), ("cpu", 0, 2), ("off", 0, 2)],
)
def test_modes(
    mode: Mode,
    warm_before: int,
    warm_after: int,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[tuple[int, int]] = []
    call = Engine.__call__

    def recorded(self: Engine, task: Task, *arguments: object) -> Result:
        sizes.append((task.width, task.height))
        return call(self, task, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "__call__", recorded)
    resident = SnapshotEngine("demo", mode, device="cpu", warm_up=[(32, 32), (64, 48)])
    resident.before_snapshot()
    assert len(sizes) == warm_before
    assert resident.after_restore()
    assert len(sizes) == warm_before + warm_after
    assert set(sizes) - {HEALTH_CHECK} == {(32, 32), (64, 48)}
    assert resident.engine(TASK).images == engine(TASK).images
    resident.engine.close()


@pytest.mark.parametrize("mode", ["gpu", "cpu"])
def test_a_snapshot_that_is_no_good_is_replaced(
    mode: Mode, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    resident = SnapshotEngine("demo", mode, device="cpu", warm_up=[(32, 32)])
    resident.before_snapshot()
    broken = resident.engine
    broken.models.transformer = None  # as memory that did not come back
    assert not resident.after_restore()
    assert resident.engine is not broken and resident.engine(TASK).images == engine(TASK).images
    assert "the snapshot cannot be used" in caplog.text
    broken.close()
    resident.engine.close()


def test_without_a_snapshot_a_failure_is_a_failure() -> None:
    resident = SnapshotEngine("demo", "off", device="cpu", warm_up=[(32, 32)])
    resident.before_snapshot()
    resident.engine.models.transformer = None
    with pytest.raises(AttributeError):
        resident.after_restore()
    resident.engine.close()


def test_moving_an_engine_forgets_embeddings_of_the_old_device(engine: Engine) -> None:
    before = engine(TASK).images
    engine.to("cpu")
    assert not engine.models.encode_prompt._cache
    assert engine(TASK).images == before
