"""LoRAs, merged into the transformer's weights in place.

    W = W₀ + Σ scale · ΔW     computed in float32, rounded once to the weight's own type

1. Whole or refused: a file that does not fit the model in every part raises LoraError before any
   weight is touched.
2. No leaks: W₀ of every weight that was ever touched is kept, and `apply([])` copies it back, so the
   bytes are the base's again. So it is after anything that breaks half-way.
3. Storage never changes. Weights are written with `copy_`, so compiled code, CUDA graphs and views of
   the weights stay valid, and a forward costs what it costs without LoRAs.

Whoever calls `apply` sees to it that no forward runs meanwhile. Knows no requests and fetches nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from schemas.lora import Adapter, LoraError, adapters
from schemas.task import Lora

CACHE_BYTES = 2 * 2**30
ROOM = 8 * 2**30
"""Bytes of GPU memory left to pictures when pristine weights are kept there, too."""


class Loras:
    """What is merged into one transformer. Files are `directory/<digest>.safetensors`.

    cache_bytes: of files kept in memory, least recently used ones leave first. backup: device of the
    pristine weights, up to as many bytes as the transformer has; None for the transformer's own while
    it has ROOM left, and the CPU after that.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        directory: Path,
        *,
        cache_bytes: int = CACHE_BYTES,
        backup: str | torch.device | None = None,
    ) -> None:
        self.active: tuple[Lora, ...] = ()
        self._transformer = transformer
        self._directory = directory
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[str, LoraFile] = OrderedDict()
        self._loading = threading.Lock()
        self._backup_device = backup
        self._pristine: dict[str, Tensor] = {}
        self._changed: set[str] = set()

    @torch.no_grad()
    def apply(self, loras: Sequence[Lora]) -> None:
        """Make the weights those of the base with exactly these. Raises LoraError, or OSError for
        a file that is not there.

        Costs nothing when they are already merged, in this order and at these scales.
        """
        wanted = tuple(loras)
        if wanted == self.active:
            return
        weights = dict(self._transformer.named_parameters())
        merges: dict[str, list[tuple[LoraFile, float]]] = {}
        for lora in wanted:
            file = self._file(lora.digest, weights)
            if lora.scale:
                for name in file.adapters:
                    merges.setdefault(name, []).append((file, lora.scale))
        try:
            self._restore(weights, self._changed - merges.keys())
            self._merge(weights, merges)
        except BaseException:
            self._restore(weights, self._changed)
            self.active = ()
            raise
        self.active = wanted

    def forget(self) -> None:
        """Restore the base and drop its copies: before the weights move or are changed otherwise."""
        self.apply([])
        self._pristine.clear()

    def _merge(
        self, weights: Mapping[str, Tensor], merges: Mapping[str, list[tuple[LoraFile, float]]]
    ) -> None:
        finite: list[Tensor] = []
        for name, parts in merges.items():
            weight = weights[name]
            if name not in self._pristine:
                self._pristine[name] = weight.detach().to(self._place(weight), copy=True)
            base = self._pristine[name].to(weight.device).float()
            merged = base.clone()
            for file, scale in parts:
                merged.add_(delta(file.adapters[name], file.tensors, base), alpha=scale)
            self._changed.add(name)
            weight.copy_(merged)
            finite.append(weight.isfinite().all())
        # Asked once at the end: every question makes the GPU wait for the CPU.
        if finite and not torch.stack(finite).all():
            raise LoraError("the LoRA drives weights of the model to infinity")

    def _place(self, weight: Tensor) -> str | torch.device:
        if self._backup_device is None and weight.is_cuda:
            return weight.device if torch.cuda.mem_get_info(weight.device)[0] > ROOM else "cpu"
        return self._backup_device or weight.device

    def _restore(self, weights: Mapping[str, Tensor], names: set[str]) -> None:
        for name in list(names):
            weights[name].copy_(self._pristine[name])
            self._changed.discard(name)

    def _file(self, digest: str, weights: Mapping[str, Tensor]) -> LoraFile:
        """From the cache or from disk. Raises LoraError if it does not fit the weights."""
        with self._loading:
            try:
                file = self._cache.pop(digest, None) or _load(
                    self._directory / f"{digest}.safetensors", weights
                )
            except LoraError as error:
                error.digest = digest
                raise
            self._cache[digest] = file
            while self._cache and sum(f.bytes for f in self._cache.values()) > self._cache_bytes:
                self._cache.popitem(last=False)
            return file

    def prefetch(self, loras: Sequence[Lora]) -> None:
        """Read and check files while others draw. Raises what `apply` raises. For any thread."""
        weights = dict(self._transformer.named_parameters())
        for lora in loras:
            self._file(lora.digest, weights)


@dataclass(frozen=True, slots=True)
class LoraFile:
    """adapters: one for each parameter it changes. tensors: on the CPU, in the file's own types."""

    adapters: Mapping[str, Adapter]
    tensors: Mapping[str, Tensor]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _load(path: Path, weights: Mapping[str, Tensor]) -> LoraFile:
    """Read a file and check all of it against the weights. Raises LoraError."""
    try:
        with safe_open(path, "pt") as opened:
            names = list(opened.keys())
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
            found = adapters(shapes, opened.metadata())
            # Clones: the others would keep the file open, and a Volume with open files stays as it is.
            tensors = {name: opened.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise LoraError(f"not a safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.float().isfinite().all():
            raise LoraError(f"{name} is not finite")
    kept: dict[str, Adapter] = {}
    for adapter in found:
        weight = weights.get(adapter.parameter)
        if weight is None:
            raise LoraError(f"this model has no {adapter.parameter}")
        if weight.shape != adapter.shape:
            shape = tuple(weight.shape)
            raise LoraError(f"{adapter.parameter} is {shape}, the LoRA's {adapter.shape}")
        twin = kept.setdefault(adapter.parameter, adapter)
        if twin is not adapter and not _same(twin, adapter, tensors, weight):
            raise LoraError(f"{adapter.parameter} is there twice, with different contents")
    return LoraFile(kept, tensors)


def _same(one: Adapter, other: Adapter, tensors: Mapping[str, Tensor], weight: Tensor) -> bool:
    """Whether two adapters are the same ΔW up to the rounding of their factors."""
    base = torch.zeros_like(weight, dtype=torch.float32)
    first, second = delta(one, tensors, base), delta(other, tensors, base)
    return bool((first - second).norm() <= 0.01 * first.norm())


def delta(adapter: Adapter, tensors: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """ΔW at scale 1: float32, of the shape and on the device of the pristine weight `base`, float32.

    With DoRA it is W' − W₀, so that scales fade it in and sums add up as they do for the others.
    """

    def load(name: str) -> Tensor:
        return tensors[name].to(base.device).float()

    def side(role: str) -> Tensor:
        if role in adapter.factors:
            return load(adapter.factors[role])
        return load(adapter.factors[f"{role}_a"]) @ load(adapter.factors[f"{role}_b"])

    def rows(tensor: Tensor) -> Tensor:
        return tensor if adapter.third is None else tensor.chunk(3)[adapter.third]

    factors = adapter.factors
    match adapter.kind:
        case "lora":
            change = rows(load(factors["up"])) @ load(factors["down"])
        case "loha":
            change = rows(load(factors["hada_w1_a"])) @ load(factors["hada_w1_b"])
            change *= rows(load(factors["hada_w2_a"])) @ load(factors["hada_w2_b"])
        case "lokr":
            change = rows(torch.kron(side("lokr_w1"), side("lokr_w2")))
        case "diff":
            change = rows(load(factors["diff"]))
    if adapter.rank and adapter.alpha:
        change = change * (float(tensors[adapter.alpha]) / adapter.rank)
    elif adapter.factor != 1.0:
        change = change * adapter.factor
    if adapter.dora:
        merged, magnitudes = base + change, load(adapter.dora)
        by_column = magnitudes.shape == (1, base.shape[1])
        if not by_column:
            magnitudes = rows(magnitudes.reshape(-1, 1))
        norms = torch.linalg.vector_norm(merged, dim=0 if by_column else 1, keepdim=True)
        change = magnitudes / (norms + torch.finfo(torch.float32).eps) * merged - base
    return change
