"""What a LoRA file holds, read from its header alone: names and shapes, no numbers, no torch.

    safetensors.read_header → adapters

Trainers write the same thing under many names. Here every tensor of a file is given its place in
diffusers' ZImageTransformer2DModel, or the whole file is refused: half a LoRA is another LoRA.

Understood are LoRA, LoKr and LoHa, each with or without DoRA, and plain differences (`diff`,
`diff_b`, LyCORIS' `w_norm`, `b_norm`), under the names of diffusers, peft, kohya, ComfyUI, OneTrainer
and LyCORIS, on diffusers' modules or on those of the original checkpoint (fused `qkv`). Dots and
underscores in a module's name are the same to us: kohya writes one for the other, and no two modules
of the model differ in them only.

Does not know how large the model is: whether a module exists and a shape fits is the engine's to say.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

Shape = tuple[int, ...]
Kind = Literal["lora", "lokr", "loha", "diff"]


class LoraError(Exception):
    """A file that is not a LoRA for this model; the message says why, to whoever sent it."""

    digest: str | None = None
    """Which file, where that is known."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """What a file does to one parameter of the transformer.

        lora  ΔW = up @ down             loha  ΔW = (hada_w1_a @ hada_w1_b) * (hada_w2_a @ hada_w2_b)
        diff  ΔW = diff                  lokr  ΔW = kron(lokr_w1, lokr_w2), each perhaps w_a @ w_b

    parameter: diffusers' name, such as "layers.0.attention.to_q.weight"; shape: its and ΔW's.
    factors: tensor names by the roles above.
    third: 0…2, which third of ΔW's rows is meant when the file has q, k and v in one; else None.
    rank, alpha: ΔW is multiplied by tensor `alpha` / rank, when both are there, else by `factor`.
    dora: tensor of magnitudes m, one a row (out,) or (out, 1), or one a column (1, in):
      W' = m · (W + ΔW) / ‖W + ΔW‖ over that row or column.
    """

    parameter: str
    kind: Kind
    factors: Mapping[str, str]
    shape: Shape
    third: int | None = None
    rank: int | None = None
    alpha: str | None = None
    factor: float = 1.0
    dora: str | None = None


_KEY = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?P<down>lora_A(?:\.\w+)?\.weight|lora[._]down\.weight)"
    r"|(?P<up>lora_B(?:\.\w+)?\.weight|lora[._]up\.weight)"
    r"|(?P<factor>lokr_w[12](?:_[ab])?|hada_w[12]_[ab])(?:\.default)?"
    r"|(?P<diff>diff|w_norm)|(?P<bias>diff_b|b_norm)|(?P<alpha>alpha)"
    r"|(?P<dora>dora_scale|lora_magnitude_vector(?:\.\w+)?(?:\.weight)?))"
)
_PREFIXES = re.compile(
    "^(?:base_model_model_|model_diffusion_model_|diffusion_model_|transformer_"
    "|lora_unet_|lora_transformer_|lycoris_)+"
)
_BLOCK = re.compile("(layers|noise_refiner|context_refiner)_([0-9]{1,3})_(.+)")


def _by_underscores(*names: str) -> dict[str, str]:
    return {name.replace(".", "_"): name for name in names}


_IN_A_BLOCK = {
    **_by_underscores(*(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))),
    **_by_underscores(*(f"feed_forward.w{n}" for n in (1, 2, 3)), "adaLN_modulation.0"),
    **_by_underscores("attention.norm_q", "attention.norm_k"),
    **_by_underscores("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"),
    "attention_out": "attention.to_out.0",
    "attention_q_norm": "attention.norm_q",
    "attention_k_norm": "attention.norm_k",
}
_OUTSIDE = {
    **_by_underscores("all_x_embedder.2-1", "cap_embedder.0", "cap_embedder.1"),
    **_by_underscores("t_embedder.mlp.0", "t_embedder.mlp.2"),
    **_by_underscores("all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1"),
    "x_embedder": "all_x_embedder.2-1",
    "final_layer_linear": "all_final_layer.2-1.linear",
    "final_layer_adaLN_modulation_1": "all_final_layer.2-1.adaLN_modulation.1",
}


def adapters(
    shapes: Mapping[str, Shape], metadata: Mapping[str, str] | None = None
) -> list[Adapter]:
    """Every tensor's place in the model. Raises LoraError when one has none, or a pair is broken.

    A parameter may come up twice, as some trainers write fused and split projections into one file:
    whoever has the numbers must see that both say the same.
    """
    groups: dict[str, dict[str, str]] = {}
    strange = []
    for key in shapes:
        match = _KEY.fullmatch(key)
        if match is None or match.lastgroup is None or not _modules(match["module"]):
            strange.append(key)
            continue
        role = match["factor"] or match.lastgroup
        if groups.setdefault(match["module"], {}).setdefault(role, key) != key:
            raise LoraError(f"{match['module']}: more than one {role}")
    if strange:
        raise LoraError(
            f"{len(strange)} of {len(shapes)} tensors are not for this model or not understood: "
            + ", ".join(key[:120] for key in strange[:3])
            + (", …" if strange[3:] else "")
        )
    if not groups:
        raise LoraError("there are no adapters in this file")
    config = _peft_config(metadata or {})
    found = [a for name, roles in groups.items() for a in _group(name, roles, shapes, config)]
    ((parameter, times),) = Counter(adapter.parameter for adapter in found).most_common(1)
    if times > 2:
        raise LoraError(f"{parameter} is there {times} times")
    return found


def _modules(name: str) -> list[tuple[str, int | None]]:
    """Diffusers' modules for a file's module name, and which third of it each is; [] if unknown."""
    plain = _PREFIXES.sub("", name.replace(".", "_"))
    if (block := _BLOCK.fullmatch(plain)) is None:
        return [(_OUTSIDE[plain], None)] if plain in _OUTSIDE else []
    place = f"{block[1]}.{int(block[2])}"
    if block[3] == "attention_qkv":
        return [(f"{place}.attention.to_{letter}", third) for third, letter in enumerate("qkv")]
    return [(f"{place}.{_IN_A_BLOCK[block[3]]}", None)] if block[3] in _IN_A_BLOCK else []


def _group(
    name: str, roles: dict[str, str], shapes: Mapping[str, Shape], config: Mapping[str, Any]
) -> Iterator[Adapter]:
    """The adapters that one module name of the file stands for."""
    modules = _modules(name)
    if bias := roles.pop("bias", None):
        for module, third in modules:
            shape = _third(name, shapes[bias], third)
            yield Adapter(f"{module}.bias", "diff", {"diff": bias}, shape, third)
        if not roles:
            return
    alpha, dora = roles.pop("alpha", None), roles.pop("dora", None)
    kind, shape, rank = _delta(name, {role: shapes[key] for role, key in roles.items()})
    if alpha and math.prod(shapes[alpha]) != 1:
        raise LoraError(f"{name}: alpha is not one number")
    if dora:
        magnitudes = shapes[dora]
        by_row = magnitudes in (shape[:1], (*shape[:1], 1))
        # A column's norm runs over q, k and v together, and each is its own parameter here.
        by_column = magnitudes == (1, *shape[1:]) and len(modules) == 1
        if kind == "diff" or not (by_row or by_column):
            raise LoraError(f"{name}: DoRA magnitudes {magnitudes} do not suit {kind} {shape}")
    for module, third in modules:
        yield Adapter(
            f"{module}.weight",
            kind,
            roles,
            _third(name, shape, third),
            third,
            rank,
            alpha,
            1.0 if kind == "diff" else _factor(config, module, rank),
            dora,
        )


def _third(name: str, shape: Shape, third: int | None) -> Shape:
    if third is None:
        return shape
    if not shape or shape[0] % 3:
        raise LoraError(f"{name}: {shape} cannot be cut in three")
    return (shape[0] // 3, *shape[1:])


_LORA: Set[str] = {"up", "down"}
_LOHA: Set[str] = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_LOKR: list[Set[str]] = [
    w1 | w2
    for w1 in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
    for w2 in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})
]
"""The factors of an adapter of each kind; those of LoKr may be products, each of the two."""


def _delta(name: str, factors: Mapping[str, Shape]) -> tuple[Kind, Shape, int | None]:
    """Kind, shape and rank (None: alpha has no say) of the ΔW that these factors make."""

    def product(left: str, right: str) -> tuple[Shape, int]:
        a, b = factors[left], factors[right]
        if len(a) != 2 or len(b) != 2 or a[1] != b[0] or 0 in (*a, *b):
            raise LoraError(f"{name}: {left} {a} and {right} {b} do not multiply")
        return (a[0], b[1]), a[1]

    def side(w: str) -> tuple[Shape, int | None]:
        return (factors[w], None) if w in factors else product(f"{w}_a", f"{w}_b")

    given = factors.keys()
    if given == _LORA:
        return "lora", *product("up", "down")
    if given == {"diff"}:
        return "diff", factors["diff"], None
    if given == _LOHA:
        (one, rank), (two, second_rank) = side("hada_w1"), side("hada_w2")
        if one == two and rank == second_rank:
            return "loha", one, rank
    if given in _LOKR:
        (one, rank), (two, second_rank) = side("lokr_w1"), side("lokr_w2")
        ranks = {rank, second_rank} - {None}
        if len(one) == len(two) == 2 and 0 not in one + two and len(ranks) < 2:
            return "lokr", (one[0] * two[0], one[1] * two[1]), rank or second_rank
    raise LoraError(f"{name} {_fault(factors)}")


def _fault(factors: Mapping[str, Shape]) -> str:
    """What is wrong with a module's factors that make no adapter."""
    given = factors.keys()
    if not given:
        return "has an alpha or DoRA magnitudes only, and nothing that they are for"
    for whole in (_LORA, _LOHA, *_LOKR):
        if given < whole:
            return f"has {_spelled(given)}, but no {_spelled(whole - given)}"
        if given == whole:
            shapes = ", ".join(f"{role} {shape}" for role, shape in factors.items())
            return f"has tensors whose shapes do not go together: {shapes}"
    return f"has tensors that do not belong together: {_spelled(given)}"


def _spelled(roles: Set[str]) -> str:
    names = {"down": "lora_A (or lora_down)", "up": "lora_B (or lora_up)"}
    return " and ".join(names.get(role, role) for role in sorted(roles))


def _peft_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The LoraConfig that diffusers writes beside tensors saved without alpha; {} if there is none."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        return {key.removeprefix("transformer."): value for key, value in config.items()}
    except (ValueError, RecursionError, AttributeError):
        raise LoraError("lora_adapter_metadata of the file is not a JSON object") from None


def _factor(config: Mapping[str, Any], module: str, rank: int | None) -> float:
    """lora_alpha / rank as peft computes it. Patterns are module names or ends of them."""
    alpha = config.get("lora_alpha", config.get("alpha"))  # LoRA's name for it and LoKr's
    try:
        for pattern, its_alpha in (config.get("alpha_pattern") or {}).items():
            if f".{module}".endswith(f".{pattern}"):
                alpha = its_alpha
        if alpha is None:
            return 1.0
        size = float(rank or config["r"])
        factor = float(alpha) / (math.sqrt(size) if config.get("use_rslora") else size)
        if math.isfinite(factor):
            return factor
    except (TypeError, ValueError, ArithmeticError, AttributeError, KeyError):
        pass
    raise LoraError("lora_adapter_metadata of the file has no usable lora_alpha and r")
