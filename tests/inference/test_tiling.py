"""Seamless pictures on the demo weights: what wraps, what stays, and that nothing is left behind."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from inference import sampling, tiling
from inference.engine import Engine
from inference.velocity import Velocity
from media.decode import to_picture
from media.fit import fit
from schemas.task import Tiling, TilingMode

APPLE = "a small red apple on a blue background"
PROMPTS = (APPLE, "a house on a green background, on the left", "a banana on a purple background")
MODES: tuple[TilingMode, ...] = ("both", "horizontal", "vertical")
ROWS, COLUMNS = 0, 1


@dataclass
class Painter:
    """One picture at a time, put together as an engine would; no tiling: the plain picture."""

    engine: Engine

    def velocity(self, prompt: str, sigmas: torch.Tensor) -> Velocity:
        embeds, times = self.engine.models.encode_prompt(prompt), (1000 - sigmas * 1000) / 1000

        def velocity(latents: torch.Tensor, i: int) -> torch.Tensor:
            (output,) = self.engine.models.transformer(
                [latents.unsqueeze(1)], times[i : i + 1], [embeds], return_dict=False
            )
            return -output[0].float().squeeze(1)

        return velocity

    def __call__(
        self,
        prompt: str,
        seed: int,
        plan: Tiling | None,
        size: tuple[int, int] = (256, 256),
        image: torch.Tensor | None = None,
        strength: float = 1.0,
    ) -> np.ndarray:
        width, height = size
        sigmas = sampling.sigmas(self.engine.models.scheduler, 8, strength, 256)
        velocity, vae = self.velocity(prompt, sigmas), self.engine.models.autoencoder.vae
        transformer, latents = (
            self.engine.models.transformer,
            sampling.noise(seed, 16, width, height),
        )
        with torch.inference_mode():
            if plan:
                vae, velocity = tiling.circular(vae, plan), tiling.seamless(velocity, plan)
            if image is not None:
                image = tiling.without_border(image, plan) if plan else image
                latents = sampling.start(encode(vae, image), latents, float(sigmas[0]))
            with (
                tiling.periodic_positions(transformer, plan, height // 8, width // 8)
                if plan
                else nullcontext()
            ):
                for i in range(len(sigmas) - 1):
                    latents = latents + (sigmas[i + 1] - sigmas[i]) * velocity(latents, i)
            return sampling.to_pixels(decode(vae, latents)).numpy()


@pytest.fixture(scope="module")
def paint(engine: Engine) -> Painter:
    return Painter(engine)


def encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    mode = vae.encode(pixels).latent_dist.mode()[0]
    return (mode - vae.config.shift_factor) * vae.config.scaling_factor


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(latents[None], return_dict=False)[0][0]


def jumps(picture: np.ndarray, axis: int) -> tuple[float, float]:
    """Mean absolute step across the seam, and between neighbours inside, in levels of 255."""
    steps = np.abs(np.roll(picture, -1, axis).astype(float) - picture).mean(axis=(1 - axis, 2))
    return float(steps[-1]), float(steps[:-1].mean())


def ratio(pictures: list[np.ndarray], axis: int) -> float:
    """Mean jump across the seams over the mean jump inside."""
    seam, inside = np.mean([jumps(picture, axis) for picture in pictures], axis=0)
    return float(seam / inside)


@pytest.mark.parametrize("mode", MODES)
def test_seams_are_no_larger_than_what_is_inside(paint: Painter, mode: TilingMode) -> None:
    pictures = [paint(prompt, seed, Tiling(mode)) for seed, prompt in enumerate(PROMPTS)]
    for axis, wraps in zip((ROWS, COLUMNS), Tiling(mode).wraps, strict=True):
        if wraps:
            assert ratio(pictures, axis) <= 1


@pytest.mark.parametrize(("mode", "wrapped"), [("horizontal", COLUMNS), ("vertical", ROWS)])
def test_the_other_axis_keeps_its_seam(paint: Painter, mode: TilingMode, wrapped: int) -> None:
    """On the long side of a picture, plain ones have a seam of tens of levels."""
    size = (256, 384) if mode == "horizontal" else (384, 256)
    plain = [paint(prompt, 1, None, size) for prompt in PROMPTS[:2]]
    tiled = [paint(prompt, 1, Tiling(mode), size) for prompt in PROMPTS[:2]]
    assert ratio(tiled, wrapped) <= 1 < ratio(plain, wrapped)
    assert ratio(plain, 1 - wrapped) > 5 and ratio(tiled, 1 - wrapped) > 5


@pytest.mark.parametrize("strength", [0.4, 0.6])
def test_an_input_that_does_not_tile(paint: Painter, photo: Image.Image, strength: float) -> None:
    picture = fit(to_picture(photo), 256, 256)
    rgb = torch.frombuffer(bytearray(picture.rgb), dtype=torch.uint8).view(256, 256, 3)
    pixels = sampling.from_pixels(rgb)
    plain, tiled = (
        [
            paint(prompt, 5 + k, plan, (256, 256), pixels, strength)
            for k, prompt in enumerate(PROMPTS)
        ]
        for plan in (None, Tiling())
    )
    for axis in (ROWS, COLUMNS):
        assert ratio(tiled, axis) <= 1 < ratio(plain, axis)


def test_tiles_leave_no_seam(paint: Painter) -> None:
    pictures = [
        paint(prompt, k, Tiling("both", 32, 16), (384, 256)) for k, prompt in enumerate(PROMPTS)
    ]
    assert ratio(pictures, ROWS) <= 1 and ratio(pictures, COLUMNS) <= 1


def test_the_same_seed_is_the_same_picture(paint: Painter) -> None:
    plan, size = Tiling("both", 32, 16), (320, 256)
    first = paint(APPLE, 3, plan, size)
    assert (first == paint(APPLE, 3, plan, size)).all()
    assert (first != paint(APPLE, 4, plan, size)).any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_the_vae_commutes_with_rolling(
    engine: Engine, mode: TilingMode, memory: torch.memory_format
) -> None:
    engine.models.autoencoder.vae.to(memory_format=memory)
    try:
        vae = tiling.circular(engine.models.autoencoder.vae, Tiling(mode))
        vertical, horizontal = Tiling(mode).wraps
        moved = (3 * vertical, 5 * horizontal)
        pixels = tuple(8 * k for k in moved)
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(16, 12, 20, generator=generator)
        picture = torch.rand(1, 3, 96, 160, generator=generator) * 2 - 1
        with torch.inference_mode():
            decoded = decode(vae, latents).roll(pixels, (1, 2))
            assert torch.allclose(decode(vae, latents.roll(moved, (1, 2))), decoded, atol=1e-4)
            encoded = encode(vae, picture).roll(moved, (1, 2))
            assert torch.allclose(encode(vae, picture.roll(pixels, (2, 3))), encoded, atol=1e-4)
            if mode != "both":  # an axis that does not wrap has its edge
                other = decode(vae, latents.roll((5, 3), (1, 2))).roll((-40, -24), (1, 2))
                assert not torch.allclose(other, decode(vae, latents), atol=1e-2)
    finally:
        engine.models.autoencoder.vae.to(memory_format=torch.contiguous_format)


def test_the_full_size_architecture_commutes_too() -> None:
    """Two layers a block, attention in the middle and 1×1 quantisation convolutions, random weights."""
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=4,
        shift_factor=0.1,
    )
    latents = torch.randn(16, 8, 12, generator=torch.Generator().manual_seed(0))
    wrapped = tiling.circular(vae, Tiling())
    with torch.inference_mode():
        decoded = decode(wrapped, latents).roll((24, 40), (1, 2))
        assert torch.allclose(decode(wrapped, latents.roll((3, 5), (1, 2))), decoded, atol=1e-4)
        encoded = encode(wrapped, decoded[None]).roll((-3, -5), (1, 2))
        again = encode(wrapped, decoded.roll((-24, -40), (1, 2))[None])
        assert torch.allclose(again, encoded, atol=1e-4)


def test_nothing_is_left_behind(engine: Engine, paint: Painter) -> None:
    before = paint(APPLE, 1, None)
    weights = {
        name: tensor.clone() for name, tensor in engine.models.autoencoder.vae.state_dict().items()
    }
    structure, table = (
        repr(engine.models.autoencoder.vae),
        engine.models.transformer.rope_embedder.freqs_cis,
    )
    copied = tiling.circular(engine.models.autoencoder.vae, Tiling())
    paint(APPLE, 1, Tiling())
    with (
        pytest.raises(RuntimeError, match="stop"),
        tiling.periodic_positions(engine.models.transformer, Tiling(), 32, 32),
    ):
        raise RuntimeError("stop")
    assert engine.models.transformer.rope_embedder.freqs_cis is table
    assert repr(engine.models.autoencoder.vae) == structure
    assert not any(module._forward_pre_hooks for module in engine.models.autoencoder.vae.modules())
    pairs = zip(engine.models.autoencoder.vae.parameters(), copied.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)
    after = engine.models.autoencoder.vae.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights.items())
    assert paint(APPLE, 1, None).tobytes() == before.tobytes()


def test_positions_wrap_on_the_wrapping_axis_only(engine: Engine) -> None:
    rope = engine.models.transformer.rope_embedder
    plain = rope.freqs_cis or rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, rope.theta)
    with tiling.periodic_positions(engine.models.transformer, Tiling("horizontal"), 40, 48):
        caption, rows, columns = rope.freqs_cis
    assert torch.equal(caption, plain[0]) and torch.equal(rows, plain[1])
    assert torch.allclose(columns[24:48], columns[:24], atol=1e-4)
    assert not torch.allclose(columns[12], columns[0], atol=0.1)
    with tiling.periodic_positions(engine.models.transformer, Tiling("both", 32), 40, 48):
        for table, same in zip(rope.freqs_cis, plain, strict=True):  # longer than a tile
            assert torch.equal(table, same)


@pytest.mark.parametrize(("tile", "stride"), [(32, 16), (64, 16), (32, 32), (32, 128), (64, 20)])
@pytest.mark.parametrize("length", [16, 32, 34, 48, 64, 130])
def test_tiles_cover_every_latent_around_the_edge(tile: int, stride: int, length: int) -> None:
    starts, size = tiling.tiles(Tiling("both", tile, stride), length, True)
    seen = Counter((start + k) % length for start in starts for k in range(size))
    assert set(seen) == set(range(length))
    assert all(start % 2 == 0 for start in starts) and size % 2 == 0
    assert size == min(length, tile // 2 * 2)
    if length > size:
        assert len(starts) == -(-length // min(stride // 2 * 2, size))
        assert any(start + size > length for start in starts)


@pytest.mark.parametrize("mode", MODES)
def test_tiles_of_a_velocity_without_context_change_nothing(mode: TilingMode) -> None:
    sizes: list[tuple[int, ...]] = []

    def velocity(latents: torch.Tensor, i: int) -> torch.Tensor:
        sizes.append(tuple(latents.shape[1:]))
        return latents * (i + 2)

    latents = torch.randn(4, 48, 80, generator=torch.Generator().manual_seed(0))
    whole = tiling.seamless(velocity, Tiling(mode, 32, 16))(latents, 1)
    assert torch.allclose(whole, latents * 3, atol=1e-5)
    assert (
        Counter(sizes)
        == {
            "both": {(32, 32): 15},
            "horizontal": {(48, 32): 5},
            "vertical": {(32, 80): 3},
        }[mode]
    )


def test_an_input_without_border_keeps_mean_and_detail() -> None:
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 48, 64) + 0.2 * torch.randn(
        1, 3, 48, 64, generator=torch.Generator().manual_seed(0)
    )
    for mode in MODES:
        result = tiling.without_border(ramp, Tiling(mode))
        assert torch.allclose(result.mean(), ramp.mean(), atol=1e-5)
        jump = (result[..., 0] - result[..., -1]).mean().abs()
        assert jump > 1.5 if mode == "vertical" else jump < 0.1
        change = (result - ramp)[..., 16:48]
        assert change.diff(dim=-1).abs().mean() < 0.1


def test_kept_latents_are_the_inputs_at_the_level_reached() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, z, noise = torch.randn(3, 16, 4, 4, generator=generator).unbind()
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    mask = torch.zeros(32, 32, dtype=torch.uint8)
    mask[7, 15] = 255  # one pixel makes its latent
    mask[31, 31] = 127
    regenerate = tiling.regenerated(mask)
    assert regenerate.nonzero().tolist() == [[0, 0, 1]]
    for i, kept in enumerate((0.5 * noise + 0.5 * z, z)):
        result = tiling.keep(latents, i, z, noise, sigmas, regenerate)
        assert torch.equal(result[:, 0, 1], latents[:, 0, 1])
        assert torch.equal(result[:, 1:], kept[:, 1:])


def test_black_pixels_are_the_inputs_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    original, generated = torch.randint(
        0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=generator
    ).unbind()
    mask = torch.zeros(16, 16, dtype=torch.uint8)
    mask[:, 4:8], mask[:, 8:] = 128, 255
    result = tiling.composite(generated, original, mask)
    assert torch.equal(result[:, :4], original[:, :4])
    assert torch.equal(result[:, 8:], generated[:, 8:])
    between = (original[:, 4:8].float() + generated[:, 4:8].float()) / 2
    assert (result[:, 4:8] - between).abs().max() <= 1.5
