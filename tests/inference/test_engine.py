"""The engine's promises (DESIGN §4), each on the real pipeline classes with demo weights."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImageImg2ImgPipeline, ZImagePipeline
from PIL import Image

from inference import sampling
from inference.engine import Engine
from inference.plan import Plan
from inference.weights import DEMO_DIRECTORY
from media.decode import to_image, to_picture
from media.fit import fit
from schemas.errors import InputError
from schemas.task import Lora, Progress, Result, Task, TaskCancelled
from tests.conftest import opened
from tests.inference.lora_files import pairs, save, weights, written

LEVELS = ("none", "regular", "high")


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


def change(task: Task, **fields: Any) -> Task:
    return dataclasses.replace(task, **fields)


def only(result: Result) -> bytes:
    (image,) = result.images
    return image.data


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(opened(data).convert("RGB"), dtype=np.int16)


def reference(pipeline_class: Any, **arguments: Any) -> np.ndarray:
    """What diffusers' own pipeline makes of the same weights in float32."""
    pipeline = pipeline_class.from_pretrained(DEMO_DIRECTORY, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        "a ginger cat",
        generator=torch.Generator().manual_seed(7),
        **{"guidance_scale": 0.0, **arguments},
    ).images
    return np.asarray(images[0], dtype=np.int16)


@pytest.mark.parametrize("level", ["none", "regular"])
def test_text_to_image_is_the_reference_pipeline(engine: Engine, task: Task, level: str) -> None:
    ours = pixels(only(engine(change(task, image=None, strength=1.0, acceleration=level))))
    theirs = reference(ZImagePipeline, width=160, height=128, num_inference_steps=8)
    assert np.abs(ours - theirs).max() <= 1  # rounding: the pipeline pads prompts to 512 tokens


@pytest.mark.parametrize("strength", [0.05, 0.6, 0.625])
def test_image_to_image_is_the_reference_pipeline(
    engine: Engine, task: Task, photo: Image.Image, strength: float
) -> None:
    """Given our start latents and its own schedule, the i2i pipeline makes the same picture."""
    assert task.image is not None
    n = sampling.forwards(8, strength)
    sigma = float(sampling.sigmas(engine.models.scheduler, 8, strength, 80)[0])
    with torch.inference_mode():
        rgb = torch.tensor(np.asarray(to_image(task.image)))
        z = engine.models.autoencoder.encode(sampling.from_pixels(rgb))
    start = sampling.start(z, sampling.noise(7, 16, 160, 128), sigma)
    theirs = reference(
        ZImageImg2ImgPipeline,
        image=photo,
        width=160,
        height=128,
        strength=1.0,
        num_inference_steps=n,
        sigmas=torch.linspace(strength, strength / n, n).tolist(),
        latents=start[None],
    )
    ours = pixels(only(engine(change(task, strength=strength, acceleration="none"))))
    assert np.abs(ours - theirs).max() <= 1


def test_guidance_is_the_reference_pipeline_s(engine: Engine, task: Task) -> None:
    """Two forwards one after the other, where the pipeline has a batch of two."""
    guided = change(
        task, image=None, strength=1.0, guidance_scale=4.0, negative_prompt="a blue background"
    )
    theirs = reference(
        ZImagePipeline,
        width=160,
        height=128,
        num_inference_steps=8,
        guidance_scale=4.0,
        negative_prompt="a blue background",
    )
    ours = pixels(only(engine(guided)))
    assert np.abs(ours - theirs).max() <= 2
    assert only(engine(change(guided, negative_prompt=""))) != only(engine(guided))


def test_promise_1_four_pictures_are_four_requests(engine: Engine, task: Task) -> None:
    together = engine(change(task, num_images=4))
    apart = [only(engine(change(task, seed=7 + k))) for k in range(4)]
    assert [image.data for image in together.images] == apart
    assert len(set(apart)) == 4


def test_promise_2_strength_0_returns_the_input_without_a_forward(
    engine: Engine, task: Task
) -> None:
    steps: list[Progress] = []
    result = engine(change(task, strength=0.0, num_images=2), steps.append)
    assert result.forwards == 0 and not steps
    assert "denoise" not in result.timings
    assert task.image is not None
    for image in result.images:
        assert opened(image.data).tobytes() == task.image.rgb


def test_promise_2_strength_1_is_text_to_image(engine: Engine, task: Task) -> None:
    assert only(engine(change(task, strength=1.0))) == only(
        engine(change(task, strength=1.0, image=None))
    )


def test_promise_2_five_forwards_at_eight_steps_and_0_6(engine: Engine, task: Task) -> None:
    steps: list[Progress] = []
    assert engine(task, steps.append).forwards == 5
    assert [(p.step, p.steps) for p in steps] == [(k, 5) for k in range(1, 6)]


def test_promise_2_one_step_at_half_strength_still_sees_the_picture(
    engine: Engine, task: Task
) -> None:
    assert task.image is not None
    inverted = dataclasses.replace(task.image, rgb=bytes(255 - b for b in task.image.rgb))
    one = change(task, steps=1, strength=0.5)
    assert only(engine(one)) != only(engine(change(one, image=inverted)))


@pytest.mark.parametrize("size", [(1, 1), (15, 33), (100, 100), (451, 300), (16, 512)])
def test_promise_3_sizes_are_exact(engine: Engine, task: Task, size: tuple[int, int]) -> None:
    width, height = size
    for image in (None, fit(task.image, width, height)):  # type: ignore[arg-type]
        sized = change(task, width=width, height=height, image=image, strength=0.5, steps=2)
        if image is None:
            sized = change(sized, strength=1.0)
        assert opened(only(engine(sized))).size == size


@pytest.fixture(scope="module")
def bfloat16() -> Iterator[Engine]:
    engine = Engine.load("demo", device="cpu", dtype=torch.bfloat16)
    yield engine
    engine.close()


def psnr(one: bytes, other: bytes) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = np.square((pixels(one) - pixels(other)).astype(float)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@pytest.mark.parametrize("prompt", ["a ginger cat", "a red apple on a blue background"])
def test_promise_4_regular_is_lossless_up_to_rounding(
    bfloat16: Engine, task: Task, photo: Image.Image, prompt: str
) -> None:
    picture = fit(to_picture(photo), 256, 256)
    square = change(task, prompt=prompt, width=256, height=256, image=picture)
    for each in (square, change(square, image=None, strength=1.0)):
        none, regular = (
            bfloat16(change(each, acceleration=level)) for level in ("none", "regular")
        )
        assert none.plan == "diffusers' own forward" and regular.plan == "lean forward"
        assert psnr(only(none), only(regular)) >= 45


@pytest.mark.parametrize("prompt", ["a ginger cat", "a red apple on a blue background"])
def test_promise_4_high_is_within_its_bound(
    bfloat16: Engine, task: Task, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 8-bit arithmetic of a GPU's plan, done by a CPU."""
    whole = change(task, prompt=prompt, width=256, height=256, image=None, strength=1.0)
    none = bfloat16(change(whole, acceleration="none"))
    monkeypatch.setattr("inference.engine.plan", lambda *_: Plan(lean=True, float8=True))
    high = bfloat16(change(whole, acceleration="high"))
    assert high.plan == "lean forward, float8 matrices"
    assert 30 <= psnr(only(none), only(high)) < 60


def test_promise_4_levels_leave_nothing_behind(bfloat16: Engine, task: Task) -> None:
    before = only(bfloat16(change(task, acceleration="none")))
    bfloat16(change(task, acceleration="regular"))
    bfloat16(change(task, acceleration="high"))
    assert only(bfloat16(change(task, acceleration="none"))) == before


@pytest.mark.parametrize("count", [1, 2])
def test_out_of_memory_in_the_decoder(
    engine: Engine, task: Task, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: in tiles. Twice: refused, and the next picture is as ever."""
    before = only(engine(task))
    vae, decode, tiled = engine.models.autoencoder.vae, engine.models.autoencoder.vae.decode, []

    def short_of_memory(*arguments: Any, **options: Any) -> Any:
        tiled.append(vae.use_tiling)
        if len(tiled) <= count:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(*arguments, **options)

    monkeypatch.setattr(vae, "decode", short_of_memory)
    if count == 1:
        assert opened(only(engine(task))).size == (160, 128)
    else:
        with pytest.raises(InputError) as refused:
            engine(task)
        assert refused.value.detail[0]["loc"] == ["body", "image_size"]
        assert refused.value.detail[0]["type"] == "image_too_large"
    monkeypatch.undo()
    assert tiled == [False, True] and not vae.use_tiling
    assert only(engine(task)) == before


def test_promise_5_flagged_pictures_are_black(engine: Engine, task: Task) -> None:
    """The shipped model with a threshold that every picture reaches."""
    from inference.safety import OpenNSFW

    strict = Engine(engine.models, OpenNSFW(threshold=1e-6))
    for format, exact in (("png", True), ("jpeg", False), ("webp", False)):
        result = strict(change(task, num_images=2, output_format=format))
        for image in result.images:
            assert image.flagged
            black = opened(image.data)
            assert black.size == (160, 128) and black.format == format.upper()
            assert np.asarray(black).max() <= (0 if exact else 2)
        unchecked = strict(change(task, safety=False, output_format=format))
        assert not unchecked.images[0].flagged
        assert np.asarray(opened(unchecked.images[0].data)).max() > 10
    strict.close()


def test_promise_5_a_broken_checker_fails_the_request(engine: Engine, task: Task) -> None:
    def broken(image: Image.Image) -> bool:
        raise RuntimeError("no checker")

    working, engine._safety = engine._safety, broken
    try:
        with pytest.raises(RuntimeError, match="no checker"):
            engine(change(task, num_images=2))
    finally:
        engine._safety = working


def test_promise_7_cancel_stops_between_two_steps(engine: Engine, task: Task) -> None:
    before = only(engine(task))
    steps: list[Progress] = []
    with pytest.raises(TaskCancelled):
        engine(change(task, num_images=4), steps.append, lambda: len(steps) >= 2)
    assert len(steps) == 2
    assert only(engine(task)) == before


def test_promise_6_weights_without_a_language_model_refuse_expansion(
    engine: Engine, task: Task
) -> None:
    with pytest.raises(InputError, match="cannot expand prompts") as refused:
        engine(change(task, expand_prompt=True))
    assert refused.value.detail[0]["loc"] == ["body", "enable_prompt_expansion"]


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


def test_prompt_and_picture_are_encoded_once(engine: Engine, task: Task) -> None:
    calls: list[str] = []
    hooks = [
        engine.models.autoencoder.vae.encoder.register_forward_hook(
            lambda *_: calls.append("picture")
        ),
        engine.models.text_encoder.register_forward_hook(lambda *_: calls.append("prompt")),
    ]
    try:
        engine(change(task, prompt="never said before", num_images=3))
        assert sorted(calls) == ["picture", "prompt"]
        engine(change(task, prompt="never said before"))
        assert sorted(calls) == ["picture", "picture", "prompt"]
    finally:
        for hook in hooks:
            hook.remove()


def test_threads_do_not_disturb_each_other(engine: Engine, task: Task) -> None:
    alone = {seed: only(engine(change(task, seed=seed))) for seed in range(4)}
    together: dict[int, bytes] = {}

    def work(seed: int) -> None:
        together[seed] = only(engine(change(task, seed=seed)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_timings_name_every_stage(engine: Engine, task: Task) -> None:
    timings = engine(task).timings
    assert next(iter(timings)) == "inference"
    assert set(timings) == {
        "inference",
        "prompt_encode",
        "vae_encode",
        "denoise",
        "vae_decode",
        "safety_check",
        "file_encode",
    }
    assert all(seconds >= 0 for seconds in timings.values())


def test_a_prompt_longer_than_the_model_reads_is_cut(engine: Engine, task: Task) -> None:
    assert engine(change(task, prompt="a very long story " * 1000)).forwards == 5


@pytest.mark.parametrize("prompt", ["", "🦊" * 20, "<|im_end|>", "a\x00b"])
def test_odd_prompts(engine: Engine, task: Task, prompt: str) -> None:
    assert engine(change(task, prompt=prompt)).prompt == prompt
