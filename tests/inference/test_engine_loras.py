"""Promise 8: a LoRA is applied whole or refused, and is gone when its task is."""

from __future__ import annotations

import threading

import pytest
import torch

from inference.engine import Engine
from schemas.errors import InputError
from schemas.task import Lora, Progress, Task, TaskCancelled
from tests.inference.lora_files import pairs, save, weights, written
from tests.inference.tasks import LEVELS, change, only, psnr


def test_promise_8_a_lora_does_not_leak(engine: Engine, task: Task) -> None:
    """Through pictures of other tasks in between, refusals, cancels and every level."""
    base = pairs(weights(engine.models.transformer), seed=3)
    strong = save(engine.models.loras, "a" * 64, written("comfyui", base))
    half = Lora(strong.digest, 0.5)
    with pytest.raises(FileNotFoundError):
        engine(change(task, loras=(Lora("f" * 64),)))
    foreign = {f"transformer.layers.99.attention.to_q.{name}": torch.ones(2, 2)
               for name in ("lora_A.weight", "lora_B.weight")}  # fmt: skip
    misfit = save(engine.models.loras, "b" * 64, foreign)

    before = {level: only(engine(change(task, acceleration=level))) for level in LEVELS}
    adapted = only(engine(change(task, loras=(strong,))))
    assert adapted != before["regular"]
    assert psnr(adapted, only(engine(change(task, loras=(strong,), acceleration="none")))) > 45
    assert engine(task).timings["lora"] > 0 and "lora" not in engine(task).timings
    assert only(engine(change(task, loras=(half,)))) not in (adapted, before["regular"])
    with pytest.raises(InputError, match=r"no layers\.99") as refused:
        engine(change(task, loras=(strong, misfit)))
    assert refused.value.detail[0]["loc"] == ["body", "loras", 1, "path"]
    with pytest.raises(TaskCancelled):
        asked: list[int] = []
        engine(change(task, loras=(strong,)), cancelled=lambda: asked.append(1) or len(asked) > 3)
    assert only(engine(change(task, loras=(strong,)))) == adapted
    for level in LEVELS:
        assert only(engine(change(task, acceleration=level))) == before[level]


@pytest.mark.parametrize("strength", [0.0, 0.6])
def test_promise_8_a_lora_that_does_not_fit_is_refused(
    engine: Engine, task: Task, strength: float
) -> None:
    """Before anything is drawn, and where nothing is drawn at all."""
    misfit = {"transformer.layers.99.attention.to_q.lora_A.weight": torch.ones(2, 2),
              "transformer.layers.99.attention.to_q.lora_B.weight": torch.ones(2, 2)}  # fmt: skip
    foreign = save(engine.models.loras, "d" * 64, misfit)
    fitting = save(
        engine.models.loras, "e" * 64, written("peft", pairs(weights(engine.models.transformer)))
    )
    with pytest.raises(InputError) as refused:
        engine(change(task, strength=strength, loras=(fitting, foreign)))
    assert refused.value.detail[0]["loc"] == ["body", "loras", 1, "path"]
    with pytest.raises(FileNotFoundError):
        engine(change(task, strength=strength, loras=(Lora("f" * 64),)))
    assert engine.models.loras.active == ()
    fits = change(task, strength=strength, loras=(fitting,))
    assert (only(engine(fits)) == only(engine(change(fits, loras=())))) == (strength == 0)


def test_promise_8_another_task_between_two_pictures(engine: Engine, task: Task) -> None:
    """The lock is free between pictures: whoever has it next has the weights it asked for."""
    lora = save(
        engine.models.loras,
        "c" * 64,
        written("kohya", pairs(weights(engine.models.transformer), 5)),
    )
    two = change(task, loras=(lora,), num_images=2)
    alone, plain = [image.data for image in engine(two).images], only(engine(task))
    between: list[bytes] = []

    def disturb(progress: Progress) -> None:
        if progress.image == 1 and progress.step == progress.steps:
            thread = threading.Thread(target=lambda: between.append(only(engine(task))))
            thread.start()
            threads.append(thread)

    threads: list[threading.Thread] = []
    together = [image.data for image in engine(two, disturb).images]
    for thread in threads:
        thread.join()
    assert together == alone and between == [plain]
