"""The engine's promises (DESIGN §4), each on the real pipeline classes with demo weights.

Those about seeds, levels and LoRAs are in files of their own.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImageImg2ImgPipeline, ZImagePipeline
from PIL import Image

from inference import sampling
from inference.engine import Engine
from inference.weights import DEMO_DIRECTORY
from media.decode import to_image
from media.fit import fit
from schemas.errors import InputError
from schemas.task import Progress, Task, TaskCancelled
from tests.conftest import opened
from tests.inference.tasks import change, only, pixels


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
