"""A LoRA is applied whole or refused, and leaves no trace (DESIGN §4, promise 8)."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inference import lora
from inference.lora import Loras
from schemas.lora import LoraError
from schemas.task import Lora
from tests.inference.lora_files import (
    ATTENTION,
    RANK,
    Tensors,
    pairs,
    random_tensors,
    same_bytes,
    save,
    weights,
    written,
)


def test_scale_0_is_the_base_and_its_file_is_checked(
    transformer: torch.nn.Module, loras: Loras
) -> None:
    base = weights(transformer)
    good = save(loras, "good", written("fused", pairs(base)))
    loras.apply([good])
    loras.apply([Lora("good", 0.0)])
    assert all(same_bytes(p, base[name]) for name, p in transformer.named_parameters())
    save(loras, "bad", {"layers.0.attention.to_q.diff": torch.zeros(2, 2)})
    with pytest.raises(LoraError):
        loras.apply([Lora("bad", 0.0)])


def test_what_is_merged_already_is_not_touched(transformer: torch.nn.Module, loras: Loras) -> None:
    one = save(loras, "one", written("peft", pairs(weights(transformer))))
    loras.apply([one])
    versions = [p._version for p in transformer.parameters()]
    (loras._directory / "one.safetensors").unlink()
    loras._cache.clear()
    loras.apply([Lora("one", 1.0)])
    assert [p._version for p in transformer.parameters()] == versions


BAD: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "unknown": (lambda t: t.update({"lora_te_x.alpha": torch.ones(1)}), "lora_te_x.alpha"),
    "unpaired": (lambda t: t.pop("layers.5.feed_forward.w2.lora_B.weight"), "layers.5.feed_forward.w2"),
    "another size": (
        lambda t: t.update({"cap_embedder.1.lora_A.weight": torch.ones(RANK, 2560)}),
        r"cap_embedder.1.weight is \(256, 128\), the LoRA's \(256, 2560\)",
    ),
    "no such layer": (
        lambda t: t.update({"layers.29.ffn_norm1.diff": torch.ones(256)}),
        "this model has no layers.29.ffn_norm1.weight",
    ),
    "no such bias": (
        lambda t: t.update({"layers.0.attention.qkv.diff_b": torch.ones(768)}),
        "this model has no layers.0.attention.to_q.bias",
    ),
    "nan": (lambda t: t["t_embedder.mlp.0.lora_A.weight"].fill_(torch.nan), "t_embedder.* not finite"),
    "infinity": (lambda t: t.update({"cap_embedder.1.alpha": torch.tensor(torch.inf)}), "not finite"),
    "overflow": (lambda t: t["t_embedder.mlp.0.lora_A.weight"].fill_(3e38), "to infinity"),
    "twice": (
        lambda t: t.update({"layers.0.attention.out.diff": torch.ones(256, 256)}),
        r"layers.0.attention.to_out.0.weight is there twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_what_does_not_fit_is_refused_whole(
    transformer: torch.nn.Module, loras: Loras, bad: str
) -> None:
    break_it, message = BAD[bad]
    base = weights(transformer)
    tensors = {key: t.clone() for key, t in written("bare", pairs(base)).items()}
    save(loras, "good", tensors)
    break_it(tensors)
    save(loras, "bad", tensors)
    versions = [p._version for p in transformer.parameters()]
    with pytest.raises(LoraError, match=message):
        loras.apply([Lora("good", 1.0), Lora("bad", 1.0)])
    if bad != "overflow":  # which shows only in the merged weights
        assert [p._version for p in transformer.parameters()] == versions
    assert all(same_bytes(p, base[name]) for name, p in transformer.named_parameters())
    loras.apply([Lora("good", 1.0)])
    name = "cap_embedder.1.weight"
    assert not torch.equal(transformer.get_parameter(name), base[name])


def test_a_refusal_leaves_what_was_merged(transformer: torch.nn.Module, loras: Loras) -> None:
    loras.apply([save(loras, "good", written("bare", pairs(weights(transformer))))])
    before = weights(transformer)
    (loras._directory / "bad.safetensors").write_bytes(b"not a LoRA")
    with pytest.raises(LoraError, match="not a safetensors file"):
        loras.apply([Lora("bad", 1.0)])
    with pytest.raises(OSError):
        loras.apply([Lora("absent", 1.0)])
    assert all(same_bytes(p, before[name]) for name, p in transformer.named_parameters())
    assert loras.active == (Lora("good", 1.0),)


@pytest.mark.parametrize("backup", [None, "cpu"])
def test_any_sequence_leads_back_to_the_base(
    transformer: torch.nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backup: str | None,
) -> None:
    loras = Loras(transformer, tmp_path, cache_bytes=300_000, backup=backup)
    base = weights(transformer)
    one, two = written("kohya", pairs(base)), written("fused", pairs(base, 7))
    part = {k: v for k, v in two.items() if "attention" in k}
    for digest, tensors in {"one": one, "two": two, "part": part}.items():
        save(loras, digest, tensors)
    fresh: dict[tuple[Lora, ...], Tensors] = {}
    chance = random.Random(8)
    left = 0

    def failing(*args: Any) -> Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            raise torch.OutOfMemoryError("no memory left")
        return delta(*args)

    delta = lora.delta
    monkeypatch.setattr(lora, "delta", failing)
    for _ in range(25):
        wanted = tuple(
            Lora(chance.choice(["one", "two", "part"]), chance.choice([-1.0, 0.0, 0.7]))
            for _ in range(chance.randrange(3))
        )
        left = chance.choice([0, 0, 5, 15])
        try:
            loras.apply(wanted)
            expected = fresh.setdefault(wanted, weights(transformer))
        except torch.OutOfMemoryError:
            expected = base
            assert loras.active == ()
        assert all(same_bytes(p, expected[n]) for n, p in transformer.named_parameters())
        if chance.random() < 0.2:
            loras.forget()
    loras.forget()
    assert not loras._pristine
    assert all(same_bytes(p, base[name]) for name, p in transformer.named_parameters())


def test_views_of_the_weights_follow(transformer: torch.nn.Module, loras: Loras) -> None:
    """As a fused q, k, v projection of the attention does."""
    base = weights(transformer)
    copied = copy.deepcopy(transformer)
    attention = copied.get_submodule(ATTENTION)
    projections = [getattr(attention, f"to_{letter}") for letter in "qkv"]
    fused = torch.cat([projection.weight for projection in projections]).detach()
    for projection, third in zip(projections, fused.chunk(3), strict=True):
        projection.weight.data = third
    viewed = Loras(copied, loras._directory)
    viewed.apply([save(loras, "one", written("fused", pairs(base)))])
    loras.apply([Lora("one", 1.0)])
    names = [f"{ATTENTION}.to_{letter}.weight" for letter in "qkv"]
    assert torch.equal(fused, torch.cat([transformer.get_parameter(name) for name in names]))
    viewed.apply([])
    assert torch.equal(fused, torch.cat([base[name] for name in names]))


def test_files_are_kept_up_to_a_number_of_bytes(
    transformer: torch.nn.Module, tmp_path: Path
) -> None:
    loras = Loras(transformer, tmp_path, cache_bytes=4000)
    module = "cap_embedder.1"
    for digest, rank in {"a": 1, "b": 1, "c": 1, "large": 4}.items():  # 1536 bytes a rank
        tensors = random_tensors(rank, lora_A=(rank, 128), lora_B=(256, rank))
        save(loras, digest, {f"{module}.{role}.weight": t for role, t in tensors.items()})
    for digest, kept in [
        ("a", "a"),
        ("b", "ab"),
        ("a", "ba"),
        ("c", "ac"),
        ("large", ""),
        ("b", "b"),
    ]:
        loras.apply([Lora(digest, 1.0)])
        assert list(loras._cache) == list(kept)
    loras.forget()
