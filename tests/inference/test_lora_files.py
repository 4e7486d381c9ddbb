"""Every kind and layout of LoRA changes the weights as its formula says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inference.engine import Engine
from inference.lora import Loras
from schemas.task import Lora
from tests.inference.lora_files import (
    ATTENTION,
    LAYOUTS,
    MODULES,
    Tensors,
    kohya,
    merged,
    near,
    pairs,
    random_tensors,
    same_bytes,
    save,
    weights,
    written,
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights(
    transformer: torch.nn.Module, loras: Loras, layout: str
) -> None:
    base = weights(transformer)
    adapters = pairs(base)
    file = save(loras, layout, written(layout, adapters))
    loras.apply([Lora(file.digest, 0.5)])
    for name, parameter in transformer.named_parameters():
        if (module := name.removesuffix(".weight")) in adapters:
            up, down = adapters[module]
            assert near(parameter, merged(base[name], 0.5 * (up @ down)))
            assert not torch.equal(parameter, base[name])
        else:
            assert same_bytes(parameter, base[name])


def lokr(t: Tensors) -> Tensor:
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    return torch.kron(w1, w2)


def loha(t: Tensors) -> Tensor:
    return (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


LOKR = {"lokr_w1": (4, 8), "lokr_w2": (64, 32)}
LOKR_A = {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 8), "lokr_w2": (64, 32)}
LOKR_B = {"lokr_w1": (4, 8), "lokr_w2_a": (64, 2), "lokr_w2_b": (2, 32)}
LOHA = {"hada_w1_a": (256, 2), "hada_w1_b": (2, 256), "hada_w2_a": (256, 2), "hada_w2_b": (2, 256)}
ROW_FACTORS = ("lokr_w2", "lokr_w2_a", "hada_w1_a", "hada_w2_a", "diff")
KINDS: list[Any] = [
    pytest.param(LOKR, lokr, 1.0, id="lokr"),  # whole factors: alpha has no say
    pytest.param(LOKR_A, lokr, 1.5, id="lokr, w1 decomposed"),
    pytest.param(LOKR_B, lokr, 1.5, id="lokr, w2 decomposed"),
    pytest.param(LOHA, loha, 1.5, id="loha"),
    pytest.param({"diff": (256, 256)}, lambda t: t["diff"], 1.0, id="diff"),
]


@pytest.mark.parametrize("dora", [None, (256,), (256, 1), (1, 256)])
@pytest.mark.parametrize(("shapes", "formula", "alpha_over_rank"), KINDS)
def test_other_kinds(
    transformer: torch.nn.Module,
    loras: Loras,
    shapes: dict[str, tuple[int, ...]],
    formula: Callable[[Tensors], Tensor],
    alpha_over_rank: float,
    dora: tuple[int, ...] | None,
) -> None:
    name = f"{ATTENTION}.to_k"
    base = weights(transformer)[f"{name}.weight"]
    tensors = random_tensors(1, **shapes)
    change = formula(tensors) * alpha_over_rank
    tensors["alpha"] = torch.tensor(3.0)
    if dora and "diff" not in shapes:
        tensors["dora_scale"] = random_tensors(2, m=dora)["m"].abs() + 0.5
        whole = base.float() + change
        norms = whole.norm(dim=0 if dora[0] == 1 else 1, keepdim=True)
        change = tensors["dora_scale"].reshape(norms.shape) * whole / norms - base.float()
    file = save(loras, "kind", {f"lycoris_{kohya(name)}.{k}": v for k, v in tensors.items()})
    loras.apply([Lora(file.digest, -0.5)])
    assert near(transformer.get_parameter(f"{name}.weight"), merged(base, -0.5 * change))


@pytest.mark.parametrize(("shapes", "formula", "alpha_over_rank"), KINDS)
def test_other_kinds_fused(
    transformer: torch.nn.Module,
    loras: Loras,
    shapes: dict[str, tuple[int, ...]],
    formula: Callable[[Tensors], Tensor],
    alpha_over_rank: float,
) -> None:
    tripled = {
        role: (3 * rows, *rest) if role in ROW_FACTORS else (rows, *rest)
        for role, (rows, *rest) in shapes.items()
    }
    tensors = random_tensors(1, **tripled)
    change = (formula(tensors) * alpha_over_rank).chunk(3)
    tensors["alpha"] = torch.tensor(3.0)
    base = weights(transformer)
    file = save(loras, "kind", {f"layers.0.attention.qkv.{k}": v for k, v in tensors.items()})
    loras.apply([file])
    for letter, third in zip("qkv", change, strict=True):
        name = f"{ATTENTION}.to_{letter}.weight"
        assert near(transformer.get_parameter(name), merged(base[name], third))


def test_dora_on_a_fused_projection(transformer: torch.nn.Module, loras: Loras) -> None:
    base = weights(transformer)
    tensors = random_tensors(3, down=(4, 256), up=(768, 4), m=(768, 1))
    key = "layers.0.attention.qkv"
    file = save(
        loras,
        "dora",
        {
            f"{key}.lora_A.weight": tensors["down"],
            f"{key}.lora_B.weight": tensors["up"],
            f"{key}.lora_magnitude_vector": tensors["m"],
        },
    )
    loras.apply([file])
    whole = torch.cat([base[f"{ATTENTION}.to_{letter}.weight"] for letter in "qkv"]).float()
    whole += tensors["up"] @ tensors["down"]
    whole *= tensors["m"] / whole.norm(dim=1, keepdim=True)
    for letter, third in zip("qkv", whole.chunk(3), strict=True):
        parameter = transformer.get_parameter(f"{ATTENTION}.to_{letter}.weight")
        assert near(parameter, third.to(parameter.dtype))


def test_several_add_up_and_biases_count(transformer: torch.nn.Module, loras: Loras) -> None:
    base = weights(transformer)
    one, two = pairs(base), pairs(base, 1000)
    bias = random_tensors(5, b=(256,))["b"]
    files = [
        save(loras, "one", written("kohya", one)),
        save(loras, "two", {**written("fused", two), "cap_embedder.1.diff_b": bias}),
    ]
    loras.apply([Lora(files[0].digest, 0.25), Lora(files[1].digest, -1.5), files[0]])
    for module in MODULES:
        changes = [
            0.25 * (one[module][0] @ one[module][1]),
            -1.5 * (two[module][0] @ two[module][1]),
        ]
        parameter = transformer.get_parameter(f"{module}.weight")
        expected = merged(base[f"{module}.weight"], *changes, one[module][0] @ one[module][1])
        assert near(parameter, expected)
    name = "cap_embedder.1.bias"
    assert near(transformer.get_parameter(name), merged(base[name], -1.5 * bias))


def test_the_same_thing_said_twice_counts_once(transformer: torch.nn.Module, loras: Loras) -> None:
    base = weights(transformer)
    adapters = pairs(base)
    both = {**written("kohya", adapters), **written("fused kohya", adapters)}
    loras.apply([save(loras, "both", both)])
    for module, (up, down) in adapters.items():
        name = f"{module}.weight"
        assert near(transformer.get_parameter(name), merged(base[name], up @ down))


def test_diffusers_metadata_scales(transformer: torch.nn.Module, loras: Loras) -> None:
    base = weights(transformer)
    adapters = pairs(base)
    config = '{"transformer.r": 4, "transformer.lora_alpha": 8}'
    file = save(loras, "a", written("diffusers", adapters), lora_adapter_metadata=config)
    loras.apply([file])
    for module, (up, down) in adapters.items():
        name = f"{module}.weight"
        assert near(transformer.get_parameter(name), merged(base[name], 2 * (up @ down)))


@pytest.mark.parametrize(
    "layout",
    ["diffusers", "ai-toolkit", "comfyui", "kohya", "fused kohya", "lokr", "lokr, decomposed"],
)
@pytest.mark.filterwarnings("ignore")
def test_the_reference_pipeline_merges_the_same(
    engine: Engine, tmp_path: Path, layout: str
) -> None:
    """Where diffusers understands a layout. It leaves the arithmetic to peft."""

    from diffusers import ZImagePipeline

    loras = Loras(copy.deepcopy(engine.models.transformer), tmp_path)
    if layout in LAYOUTS:
        adapters = pairs(weights(loras._transformer))
        if layout == "fused kohya":  # outside attention, it ignores the original names
            adapters = {name: pair for name, pair in adapters.items() if "attention" in name}
        tensors = written(layout, adapters)
    else:
        w2 = (
            {"lokr_w2": (32, 32)}
            if layout == "lokr"
            else {"lokr_w2_a": (32, 2), "lokr_w2_b": (2, 32)}
        )
        shapes = {"lokr_w1": (8, 8), **w2}
        factors = {**random_tensors(1, **shapes), "alpha": torch.tensor(3.0)}
        tensors = {f"diffusion_model.{ATTENTION}.to_k.{k}": v for k, v in factors.items()}
    file = save(loras, "file", tensors)
    pipeline = ZImagePipeline.from_pretrained(engine.weights.path, dtype=torch.float32)
    pipeline.load_lora_weights(str(tmp_path / "file.safetensors"), adapter_name="file")
    pipeline.set_adapters("file", 0.7)
    pipeline.fuse_lora()
    loras.apply([Lora(file.digest, 0.7)])
    theirs = dict(pipeline.transformer.named_parameters())
    for name, parameter in loras._transformer.named_parameters():
        module, _, kind = name.rpartition(".")
        their = theirs.get(f"{module}.base_layer.{kind}", theirs.get(name))
        assert their is not None
        assert torch.allclose(parameter, their, rtol=1e-5, atol=1e-6), name
