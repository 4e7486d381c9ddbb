from __future__ import annotations

import json
import re
from typing import Any

import pytest

from schemas.lora import LoraError, Shape, adapters

PREFIXES = ["transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.", ""]
UNDERSCORED = ["lora_unet_", "lora_transformer_", "lycoris_"]
PAIRS = [
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
]
MODULES = {
    "layers.0.attention.to_q": None,
    "layers.29.attention.to_out.0": "layers.29.attention.out",
    "layers.0.feed_forward.w1": None,
    "layers.12.adaLN_modulation.0": None,
    "noise_refiner.1.attention.to_k": None,
    "context_refiner.0.feed_forward.w3": None,
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1.linear": "final_layer.linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    "cap_embedder.1": None,
    "t_embedder.mlp.0": None,
    "t_embedder.mlp.2": None,
}
"""Diffusers' names, and those of the original checkpoint where they differ."""


def pair(module: str, down: str = "lora_A.weight", up: str = "lora_B.weight") -> dict[str, Shape]:
    return {f"{module}.{down}": (4, 16), f"{module}.{up}": (24, 4)}


Q = "layers.0.attention.to_q"


@pytest.mark.parametrize("module", MODULES)
def test_every_name_of_a_module_is_the_same_module(module: str) -> None:
    for name in filter(None, (module, MODULES[module])):
        spelled = [f"{prefix}{name}" for prefix in PREFIXES]
        spelled += [prefix + name.replace(".", "_") for prefix in UNDERSCORED]
        for key in spelled:
            for down, up in PAIRS:
                (adapter,) = adapters({**pair(key, down, up), f"{key}.alpha": ()})
                assert adapter.parameter == f"{module}.weight"
                assert adapter.factors == {"down": f"{key}.{down}", "up": f"{key}.{up}"}
                assert (adapter.kind, adapter.shape, adapter.rank) == ("lora", (24, 16), 4)
                assert (adapter.alpha, adapter.third) == (f"{key}.alpha", None)


@pytest.mark.parametrize(
    "key", ["diffusion_model.layers.7.attention.qkv", "layers_7_attention_qkv"]
)
def test_a_fused_projection_is_three_modules(key: str) -> None:
    found = adapters({**pair(key), f"{key}.dora_scale": (24, 1)})
    assert [(a.parameter, a.third, a.shape) for a in found] == [
        (f"layers.7.attention.to_{letter}.weight", third, (8, 16))
        for third, letter in enumerate("qkv")
    ]
    assert {a.dora for a in found} == {f"{key}.dora_scale"}


@pytest.mark.parametrize(
    ("shapes", "kind", "shape", "rank"),
    [
        ({"lokr_w1": (2, 4), "lokr_w2": (8, 16)}, "lokr", (16, 64), None),
        ({"lokr_w1": (2, 4), "lokr_w2_a": (8, 3), "lokr_w2_b": (3, 16)}, "lokr", (16, 64), 3),
        ({"lokr_w1_a": (2, 3), "lokr_w1_b": (3, 4), "lokr_w2": (8, 16)}, "lokr", (16, 64), 3),
        (
            {"hada_w1_a": (8, 3), "hada_w1_b": (3, 4), "hada_w2_a": (8, 3), "hada_w2_b": (3, 4)},
            *("loha", (8, 4), 3),
        ),
        ({"diff": (8, 4)}, "diff", (8, 4), None),
        ({"w_norm": (8,)}, "diff", (8,), None),
    ],
)
def test_kinds(shapes: dict[str, Shape], kind: str, shape: Shape, rank: int | None) -> None:
    (adapter,) = adapters({f"{Q}.{role}": s for role, s in shapes.items()})
    assert (adapter.kind, adapter.shape, adapter.rank) == (kind, shape, rank)
    assert set(adapter.factors.values()) == {f"{Q}.{role}" for role in shapes}


def test_biases_and_norms_have_differences() -> None:
    found = adapters(
        {
            **pair("cap_embedder.1"),
            "cap_embedder.1.diff_b": (24,),
            "layers.0.attention.q_norm.diff": (8,),
            "lycoris_layers_0_ffn_norm2.w_norm": (16,),
        }
    )
    assert {a.parameter: (a.kind, a.shape) for a in found} == {
        "cap_embedder.1.bias": ("diff", (24,)),
        "cap_embedder.1.weight": ("lora", (24, 16)),
        "layers.0.attention.norm_q.weight": ("diff", (8,)),
        "layers.0.ffn_norm2.weight": ("diff", (16,)),
    }


@pytest.mark.parametrize("shape", [(24,), (24, 1), (1, 16)])
@pytest.mark.parametrize(
    "name", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"]
)
def test_dora(name: str, shape: Shape) -> None:
    (adapter,) = adapters({**pair(Q), f"{Q}.{name}": shape})
    assert adapter.dora == f"{Q}.{name}"


@pytest.mark.parametrize(
    "key",
    [
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "text_encoder.layers.0.q_proj.lora_A.weight",
        f"{Q}.lora_mid.weight",
        f"{Q}.lokr_t2",
        f"{Q}.lora_B.bias",
        f"{Q}.weight",
        "layers.0.attention.to_x.lora_A.weight",
        "layers.-1.attention.to_q.alpha",
        "layers.1000.attention.to_q.alpha",
        "layers.٣.attention.to_q.alpha",
        "single_blocks.0.linear1.lora_A.weight",
        "x_pad_token.diff",
        ".alpha",
        "",
    ],
)
def test_one_strange_tensor_refuses_the_file(key: str) -> None:
    with pytest.raises(LoraError, match=f"1 of 3 tensors .*: {re.escape(key)}"):
        adapters({**pair(Q), key: (1,)})


def test_many_strange_tensors_are_counted() -> None:
    with pytest.raises(LoraError, match=r"50 of 52 tensors .*: a0, a1, a2, …$"):
        adapters({**pair(Q), **{f"a{n}": (1,) for n in range(50)}})


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {A: (4, 16)},
        {B: (24, 4)},
        {f"{Q}.alpha": ()},
        {f"{Q}.dora_scale": (24, 1)},
        {A: (4, 16), B: (24, 8)},
        {A: (4, 16, 1), B: (24, 4)},
        {A: (0, 16), B: (24, 0)},
        {A: (4, 16), f"transformer.{B}": (24, 4)},
        {**pair(Q), f"{Q}.lora_down.weight": (4, 16)},
        {**pair(Q), f"{Q}.lokr_w1": (4, 16)},
        {**pair(Q), f"{Q}.alpha": (2,)},
        {**pair(Q), f"{Q}.dora_scale": (16,)},
        {**pair(Q), **pair(f"transformer.{Q}"), **pair(f"lycoris_{Q}")},
        {f"{Q}.diff": (24, 16), f"{Q}.dora_scale": (24, 1)},
        {f"{Q}.lokr_w1": (2, 4)},
        {f"{Q}.lokr_w1": (2,), f"{Q}.lokr_w2": (8, 16)},
        {f"{Q}.hada_w1_a": (8, 3), f"{Q}.hada_w1_b": (3, 4)},
        {"layers.0.attention.qkv.lora_A.weight": (4, 16), "layers.0.attention.qkv.lora_B.weight": (25, 4)},
        {**pair("layers.0.attention.qkv"), "layers.0.attention.qkv.dora_scale": (1, 16)},
        {"layers.0.attention.qkv.diff_b": ()},
    ],
)  # fmt: skip
def test_broken_files_are_refused(shapes: dict[str, Shape]) -> None:
    with pytest.raises(LoraError):
        adapters(shapes)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({A: (4, 16)}, f"{Q} has lora_A (or lora_down), but no lora_B (or lora_up)"),
        ({B: (24, 4)}, f"{Q} has lora_B (or lora_up), but no lora_A (or lora_down)"),
        ({f"{Q}.lokr_w1": (2, 4)}, f"{Q} has lokr_w1, but no lokr_w2"),
        (
            {f"{Q}.lokr_w1": (2, 4), f"{Q}.lokr_w2_a": (8, 3)},
            f"{Q} has lokr_w1 and lokr_w2_a, but no lokr_w2_b",
        ),
        (
            {f"{Q}.hada_w1_a": (8, 3), f"{Q}.hada_w1_b": (3, 4)},
            f"{Q} has hada_w1_a and hada_w1_b, but no hada_w2_a and hada_w2_b",
        ),
        (
            {f"{Q}.lokr_w1": (2,), f"{Q}.lokr_w2": (8, 16)},
            f"{Q} has tensors whose shapes do not go together: lokr_w1 (2,), lokr_w2 (8, 16)",
        ),
        (
            {A: (4, 16), f"{Q}.lokr_w1": (4, 16)},
            f"{Q} has tensors that do not belong together: lora_A (or lora_down) and lokr_w1",
        ),
        (
            {f"{Q}.alpha": ()},
            f"{Q} has an alpha or DoRA magnitudes only, and nothing that they are for",
        ),
    ],
)
def test_what_is_broken_is_said(shapes: dict[str, Shape], message: str) -> None:
    with pytest.raises(LoraError) as raised:
        adapters(shapes)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({}, 1.0),
        ({"transformer.lora_alpha": 8, "transformer.r": 4}, 2.0),
        ({"lora_alpha": 8, "r": 4, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "r": 8, "alpha_pattern": {"to_q": 2, "to_k": 3, "o_q": 5}}, 0.5),
    ],
)
def test_the_scale_that_diffusers_writes_beside_the_tensors(
    config: dict[str, Any], factor: float
) -> None:
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    (adapter,) = adapters(pair(f"transformer.{Q}"), metadata)
    assert adapter.factor == factor


@pytest.mark.parametrize(
    "config", ["x", "[]", '{"lora_alpha": "x"}', '{"lora_alpha": NaN}', "[" * 99999]
)
def test_a_scale_that_cannot_be_read_refuses_the_file(config: str) -> None:
    with pytest.raises(LoraError, match="lora_adapter_metadata"):
        adapters(pair(Q), {"lora_adapter_metadata": config})
