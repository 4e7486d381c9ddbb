"""The plan of memory against a measurement: models of full size run on tensors without contents."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import random_models
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from inference import memory
from inference.autoencoder import Autoencoder
from inference.engine import Engine
from inference.float8 import Float8Weight
from inference.lean import LeanTransformer, in_float8
from inference.velocity import reference


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside take at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self._now = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # "is all of it finite?", asked of nothing
        given = {tensor.untyped_storage()._cdata for tensor in tensors_of((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes and key not in given:
                self._sizes[key] = storage.nbytes()
                self._now += storage.nbytes()
                weakref.finalize(storage, self._freed, key)
        self.bytes = max(self.bytes, self._now)
        return result

    def _freed(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))


def peak_of(run: Callable[[], object]) -> int:
    with Peak() as peak:
        run()
    return peak.bytes


@contextmanager
def without_contents() -> Iterator[None]:
    # Not in inference mode, where an operation shows its parts' results to no mode.
    with FakeTensorMode(), torch.no_grad(), random_models.in_bfloat16():
        yield


def full_size_autoencoder() -> Autoencoder:
    vae = random_models.vae(small=False)
    vae.to = lambda **_: vae  # the format of parameters without contents cannot be changed
    return Autoencoder(vae)


SIZES = [(512, 512), (1280, 720), (2048, 2048)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_plan_is_what_the_vae_takes(width: int, height: int) -> None:
    with without_contents():
        autoencoder = full_size_autoencoder()
        latents = torch.empty(16, height // 8, width // 8, dtype=torch.float32)
        pixels = torch.empty(1, 3, height, width, dtype=torch.float32)
        decode = peak_of(lambda: autoencoder.decode(latents))
        encode = peak_of(lambda: autoencoder.encode(pixels))
    config = autoencoder.vae.config
    assert decode <= memory.decode_bytes(config, width, height) <= 1.02 * decode
    assert encode <= memory.encode_bytes(config, width, height) <= 1.02 * encode


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_plan_is_what_denoising_takes(width: int, height: int) -> None:
    """The lean forward, its blocks as they are; diffusers' own takes less."""
    with without_contents():
        transformer = random_models.transformer(small=False)
        size, sigmas = (height // 8, width // 8), torch.linspace(1, 0, 9)
        caption, latents = torch.empty(512, 2560), torch.empty(16, *size, dtype=torch.float32)
        diffusers = peak_of(lambda: reference(transformer, caption, sigmas)(latents, 0))
        lean = LeanTransformer(transformer)
        denoise = peak_of(lambda: lean.velocity(caption, sigmas, *size)(latents, 0))
    assert diffusers < denoise <= memory.denoise_bytes(transformer.config, width, height)
    assert memory.denoise_bytes(transformer.config, width, height) <= 1.1 * denoise


def test_eight_bit_copies_take_what_is_said() -> None:
    with without_contents():
        transformer = random_models.transformer(small=False)
        lean = LeanTransformer(transformer)
        copies = [in_float8(block) for block in lean.layers[1:-1]]
        data = [part.data for copy in copies for part in copy if isinstance(part, Float8Weight)]
    assert sum(part.nbytes for part in data) == memory.float8_bytes(transformer.config)


@pytest.mark.parametrize(("spare", "in_tiles"), [(0, False), (-1, True)])
def test_tiles_at_once_when_memory_is_short(
    engine: Engine, spare: int, in_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    autoencoder = engine.models.autoencoder
    vae, tiled = autoencoder.vae, []
    for name in ("encode", "decode"):
        whole = getattr(vae, name)

        def watched(*arguments: Any, whole: Any = whole, **options: Any) -> Any:
            tiled.append(vae.use_tiling)
            return whole(*arguments, **options)

        monkeypatch.setattr(vae, name, watched)
    with torch.inference_mode():
        for needed, run in (
            (memory.decode_bytes, lambda: autoencoder.decode(torch.zeros(16, 8, 16))),
            (memory.encode_bytes, lambda: autoencoder.encode(torch.zeros(1, 3, 64, 128))),
        ):
            free = math.ceil(needed(vae.config, 128, 64) * memory.MARGIN) + spare
            monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
            run()
    assert tiled == [in_tiles, in_tiles] and not vae.use_tiling


def test_what_the_allocator_keeps_unused_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert memory.free_bytes(torch.device("cuda")) == 300
    assert memory.free_bytes(torch.device("cpu")) is None


def test_tiles_take_little_memory() -> None:
    """Ours do; of Z-Image's own, a megapixel is one."""
    with without_contents():
        autoencoder = full_size_autoencoder()
        autoencoder.vae.enable_tiling()
        latents = torch.empty(16, 128, 128, dtype=torch.float32)
        peak = peak_of(lambda: autoencoder.decode(latents))
    assert peak < 0.4 * memory.decode_bytes(autoencoder.vae.config, 1024, 1024)
