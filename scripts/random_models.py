"""Z-Image's classes at its published sizes, or at the demo's, with weights that mean nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

from inference.models import Models
from inference.weights import DEMO_DIRECTORY, Weights


def transformer(small: bool) -> Any:
    config = ZImageTransformer2DModel.load_config(DEMO_DIRECTORY / "transformer") if small else {}
    return ZImageTransformer2DModel.from_config(config)


def vae(small: bool) -> Any:
    if small:
        return AutoencoderKL.from_config(AutoencoderKL.load_config(DEMO_DIRECTORY / "vae"))
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def text_encoder(small: bool) -> Any:
    if small:
        return Qwen3Model(Qwen3Config.from_pretrained(DEMO_DIRECTORY / "text_encoder"))
    return Qwen3Model(
        Qwen3Config(
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        )
    )


@contextmanager
def in_bfloat16() -> Iterator[None]:
    """New parameters are bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_models(device: str, small: bool) -> Models:
    torch.manual_seed(0)
    components = {
        "tokenizer": AutoTokenizer.from_pretrained(DEMO_DIRECTORY / "tokenizer"),
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(DEMO_DIRECTORY / "scheduler"),
    }
    for make in (transformer, vae, text_encoder):
        with in_bfloat16(), torch.device(device):
            model = make(small)
        components[make.__name__] = model.to(device).eval().requires_grad_(False)
    for token in ("x_pad_token", "cap_pad_token"):
        torch.nn.init.normal_(getattr(components["transformer"], token), std=0.02)
    directory = Path(tempfile.mkdtemp(prefix="zimage-bench-"))
    return Models(components, Weights("random", directory, "none"), directory)
