"""LoRA files as trainers write them: the same changes of the weights in every layout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors.torch import save_file
from torch import Tensor

from inference.lora import Loras
from schemas.task import Lora

RANK = 4
ATTENTION = "layers.0.attention"
MODULES = [
    *(f"{ATTENTION}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    "layers.5.feed_forward.w2",
    "noise_refiner.0.adaLN_modulation.0",
    "context_refiner.0.feed_forward.w1",
    "all_x_embedder.2-1",
    "all_final_layer.2-1.linear",
    "all_final_layer.2-1.adaLN_modulation.1",
    "cap_embedder.1",
    "t_embedder.mlp.0",
]
Tensors = dict[str, Tensor]


def same_bytes(one: Tensor, other: Tensor) -> bool:
    kind = torch.int32 if one.dtype == torch.float32 else torch.int16
    return torch.equal(one.detach().view(kind), other.detach().view(kind))


def weights(transformer: torch.nn.Module) -> Tensors:
    return {name: p.detach().clone() for name, p in transformer.named_parameters()}


def random_tensors(seed: int, **shapes: tuple[int, ...]) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        role: 0.3 * torch.randn(shape, generator=generator)
        for role, shape in sorted(shapes.items())
    }


def pairs(base: Tensors, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """(up, down) for each of MODULES; q, k and v share `down`, so that they can be fused."""
    made = {}
    for n, module in enumerate(MODULES):
        out, width = base[f"{module}.weight"].shape
        down = random_tensors(seed + (0 if n < 3 else n), t=(RANK, width))["t"]
        made[module] = random_tensors(seed + 100 + n, t=(out, RANK))["t"], down
    return made


def merged(base: Tensor, *changes: Tensor) -> Tensor:
    return (base.float() + sum(changes)).to(base.dtype)


def near(one: Tensor, other: Tensor) -> bool:
    """Equal up to the last bit, and to the rounding of float32 sums where they come out near 0."""
    eps = torch.finfo(one.dtype).eps
    return torch.allclose(one.float(), other.float(), rtol=eps, atol=1e-6)


def split(module: str) -> str:
    return module


def kohya(name: str) -> str:
    return name.replace(".", "_")


def original(module: str) -> str:
    """The name in the original checkpoint."""
    for ours, theirs in [
        ("attention.to_out.0", "attention.out"),
        ("all_x_embedder.2-1", "x_embedder"),
        ("all_final_layer.2-1", "final_layer"),
    ]:
        module = module.replace(ours, theirs)
    return module


AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
LAYOUTS: dict[str, tuple[str, Callable[[str], str], tuple[str, str], bool, bool]] = {
    # name: prefix, module's name, suffixes, with alpha, q k v fused
    "diffusers": ("transformer.", split, AB, False, False),
    "diffusers with lora.down": ("transformer.", split, ("lora.down.weight", "lora.up.weight"), False, False),
    "ai-toolkit": ("diffusion_model.", split, AB, False, False),
    "comfyui": ("diffusion_model.", split, DOWN_UP, True, False),
    "checkpoint": ("model.diffusion_model.", split, DOWN_UP, True, False),
    "peft": ("base_model.model.", split, AB, False, False),
    "bare": ("", split, AB, False, False),
    "diffsynth": ("", split, ("lora_A.default.weight", "lora_B.default.weight"), False, False),
    "kohya": ("lora_unet_", kohya, DOWN_UP, True, False),
    "onetrainer": ("lora_transformer_", kohya, DOWN_UP, True, False),
    "lycoris": ("lycoris_", kohya, DOWN_UP, True, False),
    "fused": ("diffusion_model.", original, AB, False, True),
    "fused with alpha": ("diffusion_model.", original, DOWN_UP, True, True),
    "fused bare": ("", original, AB, False, True),
    "fused kohya": ("lora_unet_", lambda m: kohya(original(m)), DOWN_UP, True, True),
}  # fmt: skip


def written(layout: str, adapters: dict[str, tuple[Tensor, Tensor]]) -> Tensors:
    """A file's tensors. Alpha is half the rank and `up` twice as large: the same ΔW, exactly."""
    prefix, name, (down_suffix, up_suffix), alpha, fused = LAYOUTS[layout]
    adapters = dict(adapters)
    if fused:
        qkv = [adapters.pop(f"{ATTENTION}.to_{letter}") for letter in "qkv"]
        adapters[f"{ATTENTION}.qkv"] = torch.cat([up for up, _ in qkv]), qkv[0][1]
    tensors = {}
    for module, (up, down) in adapters.items():
        key = prefix + name(module)
        tensors[f"{key}.{down_suffix}"] = down
        tensors[f"{key}.{up_suffix}"] = 2 * up if alpha else up
        if alpha:
            tensors[f"{key}.alpha"] = torch.tensor(RANK / 2)
    return tensors


def save(loras: Loras, digest: str, tensors: Tensors, **metadata: str) -> Lora:
    own = {key: tensor.clone() for key, tensor in tensors.items()}
    save_file(own, loras._directory / f"{digest}.safetensors", metadata)
    return Lora(digest, 1.0)
