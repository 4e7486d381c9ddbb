"""The numerics against the reference: diffusers' own scheduler, and hand-computed values."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from inference import sampling

SCHEDULER = FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.mark.parametrize(
    ("steps", "strength", "n"),
    [
        (8, 1.0, 8),
        (8, 0.6, 5),
        (8, 0.625, 5),
        (1, 0.5, 1),
        (8, 0.0, 0),
        (8, 0.001, 1),
        (10, 0.7, 7),  # 10 · 0.7 is 7.000000000000001
        (5, 0.2, 1),
    ],
)
def test_forwards(steps: int, strength: float, n: int) -> None:
    assert sampling.forwards(steps, strength) == n


def reference_sigmas(steps: int, strength: float) -> torch.Tensor:
    """As ZImageImg2ImgPipeline: the whole schedule, its first N − N·strength steps skipped."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist())
    return scheduler.sigmas[steps - round(steps * strength) :]


@pytest.mark.parametrize("kept", range(1, 9))
def test_whole_steps_are_the_reference_schedule(kept: int) -> None:
    ours = sampling.sigmas(SCHEDULER, 8, kept / 8, image_tokens=256)
    torch.testing.assert_close(ours, reference_sigmas(8, kept / 8), rtol=0, atol=1e-6)


def test_published_sigmas_of_eight_steps() -> None:
    ours = sampling.sigmas(SCHEDULER, 8, 1.0, image_tokens=256)
    expected = [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0]
    assert ours.tolist() == pytest.approx(expected, abs=5e-5)


def test_strength_between_whole_steps() -> None:
    ours = sampling.sigmas(SCHEDULER, 8, 0.6, image_tokens=256)
    assert ours.tolist() == pytest.approx([0.818, 0.735, 0.628, 0.487, 0.290, 0], abs=1e-3)


def test_the_first_sigma_grows_with_strength() -> None:
    first = [
        float(sampling.sigmas(SCHEDULER, 8, s / 100, image_tokens=256)[0]) for s in range(1, 101)
    ]
    assert first == sorted(first) and len(set(first)) == 100


def test_sigmas_leave_the_scheduler_alone() -> None:
    before = dict(SCHEDULER.__dict__)
    sampling.sigmas(SCHEDULER, 3, 0.9, image_tokens=256)
    assert SCHEDULER.__dict__.keys() == before.keys()
    assert SCHEDULER.sigmas is before["sigmas"]


def test_noise_is_a_function_of_the_seed() -> None:
    one, again, other = (sampling.noise(seed, 16, 64, 32) for seed in (1, 1, 2))
    assert one.shape == (16, 4, 8)
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 + 1, 10**30])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert torch.isfinite(sampling.noise(seed, 16, 16, 16)).all()


def test_start_interpolates() -> None:
    z, noise = torch.full((1, 2, 2), 2.0), torch.full((1, 2, 2), 4.0)
    assert torch.equal(sampling.start(z, noise, 1.0), noise)
    assert torch.equal(sampling.start(None, noise, 0.3), noise)
    torch.testing.assert_close(sampling.start(z, noise, 0.25), torch.full((1, 2, 2), 2.5))


def test_pixels_round_trip() -> None:
    rgb = torch.arange(256, dtype=torch.uint8).view(8, 32, 1).expand(8, 32, 3)
    assert torch.equal(sampling.to_pixels(sampling.from_pixels(rgb)[0]), rgb)


def test_nan_is_an_error_not_a_black_picture() -> None:
    with pytest.raises(ArithmeticError):
        sampling.to_pixels(torch.full((3, 2, 2), float("nan")))
