"""Every snapshot mode ends with a warm engine on its device that draws the same picture."""

from __future__ import annotations

import pytest

from inference.engine import Engine
from inference.snapshot import Mode, SnapshotEngine
from schemas.task import Result, Task

TASK = Task("a cat", 64, 48, steps=2, strength=1.0, seed=3, num_images=1)


@pytest.mark.parametrize(
    ("mode", "warm_before", "warm_after"),
    [("gpu", 2, 0), ("cpu", 0, 2), ("off", 0, 2)],
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
    resident.after_restore()
    assert len(sizes) == warm_before + warm_after
    assert set(sizes) == {(32, 32), (64, 48)}
    assert resident.engine(TASK).images == engine(TASK).images
    resident.engine.close()


def test_moving_an_engine_forgets_embeddings_of_the_old_device(engine: Engine) -> None:
    before = engine(TASK).images
    engine.to("cpu")
    assert not engine._encode_prompt._cache
    assert engine(TASK).images == before
