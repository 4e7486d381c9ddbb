"""Generate the placeholder demo weights: Z-Image's own architecture, a few megabytes, untrained.

    python scripts/make_demo_weights.py [DIRECTORY]

The same classes, configuration keys and file layout as the real weights, so that every code path is
the real one; the pictures are noise. Deterministic: the same file bytes on every run of the same
library versions.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from inference.weights import DEMO_DIRECTORY

REVISION = "placeholder-1"

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif -%}
{%- endif -%}"""
"""Qwen3's template, as far as a single text message goes."""

CORPUS = """
a photograph of a cat on a sofa, a red apple on a blue table, a small green house under a large tree,
a watercolor painting of mountains at sunset, a portrait of an old man, a close-up of a yellow flower,
black and white drawing of a city street at night, a white dog running in the snow, an orange fox,
a purple car in front of a pink wall, a brown horse on the beach, a bowl of fruit, studio lighting
user assistant
"""


def tokenizer(corpus: str = CORPUS, vocabulary: int = 512) -> Qwen2Tokenizer:
    """Byte-level BPE trained on a corpus: any text has tokens, common words have short ones."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
    )
    bpe.train_from_iterator(corpus.strip().splitlines(), trainer)
    return Qwen2Tokenizer(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )


def pipeline() -> ZImagePipeline:
    """The five components, random but with the scales that keep activations of order one."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    transformer = ZImageTransformer2DModel(
        dim=64,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 12, 12],
        axes_lens=[1536, 512, 512],
    )
    with torch.no_grad():  # zeros by default, which would hide a wrong padding
        transformer.x_pad_token.normal_(std=0.02)
        transformer.cap_pad_token.normal_(std=0.02)
    words = tokenizer()
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
        )
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=words,
        transformer=transformer,
    )


def main(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    pipeline().to(dtype=torch.bfloat16).save_pretrained(directory)
    (directory / "revision.txt").write_text(REVISION + "\n")
    total = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    print(f"{directory}: {total / 1e6:.1f} MB, revision {REVISION}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO_DIRECTORY)
