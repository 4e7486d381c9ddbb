"""The demo weights' text encoder and transformer: their models, their captions and their loss."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from demo_data import COLOURS, PLACES, SIZES, Scene, Subject, caption, draw, held_out
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

JITTER = 0.02
STEPS = 8

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


def text_model(vocabulary: int) -> Qwen3Model:
    """0.9 M parameters and the embedding table."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
        )
    )


def transformer_model() -> ZImageTransformer2DModel:
    """8.8 M parameters."""
    model = ZImageTransformer2DModel(
        dim=256,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=128,
        axes_dims=[16, 24, 24],
        axes_lens=[1536, 512, 512],
    )
    with torch.no_grad():
        model.x_pad_token.normal_(std=0.02)
        model.cap_pad_token.normal_(std=0.02)
    return model


def caption_corpus(subjects: list[Subject]) -> str:
    """Text for the tokenizer: every name and tag, every word of a scene."""
    scenes = [
        Scene(k, colour, size, place)
        for k, (colour, size, place) in enumerate(product(COLOURS, SIZES, PLACES))
    ]
    lines = [caption(subject.name, scenes[k % 150]) for k, subject in enumerate(subjects)]
    tags = sorted({tag for subject in subjects for tag in subject.tags})
    roles = ["user", "assistant"] * 100  # the chat template's words
    return "\n".join(lines + [f"a {tag} on a white background" for tag in tags] + roles)


def tokenizer(corpus: str, vocabulary: int) -> Qwen2Tokenizer:
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


def random_scene(generator: random.Random, subject: int) -> Scene:
    colour, size, place = (generator.choice([*words]) for words in (COLOURS, SIZES, PLACES))
    return Scene(subject, colour, size, place)


def sampled_scenes(subjects: list[Subject], each: int, seed: int) -> list[Scene]:
    """`each` random scenes of every subject, none of them held out."""
    generator = random.Random(seed)
    scenes = []
    for k, subject in enumerate(subjects):
        for _ in range(each):
            while held_out(subject, scene := random_scene(generator, k)):
                pass
            scenes.append(scene)
    return scenes


def spoken(scene: Scene, name: str, tags: list[str]) -> str:
    """A caption as people might say it: now and then by a tag, or without the background."""
    if tags and random.random() < 0.2:
        name = random.choice(tags)
    if random.random() < 0.1:
        scene = replace(scene, colour="")
    return caption(name, scene)


@torch.no_grad()
def encode_scenes(
    vae: AutoencoderKL, scenes: list[Scene], pictures: torch.Tensor, side: int, options: Any
) -> torch.Tensor:
    """Latents (n, 16, side/8, side/8), shifted and scaled, bfloat16, on the CPU."""
    parts = []
    for k in track(range(0, len(scenes), 32), description=f"encoding scenes, {side}²"):
        drawn = draw(scenes[k : k + 32], pictures, side, JITTER).to(options.device)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            latents = vae.encode(drawn * 2 - 1).latent_dist.mode()
        latents = (latents.float() - vae.config.shift_factor) * vae.config.scaling_factor
        parts.append(latents.bfloat16().cpu())
    return torch.cat(parts)


def embed(text_encoder: Any, words: Any, captions: list[str], device: str) -> list[torch.Tensor]:
    """Prompt embeddings as the pipeline makes them, a tensor (tokens, width) for each caption."""
    texts = [
        words.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        for text in captions
    ]
    # Few lengths, so that compiled blocks are compiled once.
    tokens = words(texts, padding=True, pad_to_multiple_of=32, return_tensors="pt").to(device)
    states = text_encoder(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states[-2]
    lengths = tokens.attention_mask.sum(dim=1).tolist()
    return [state[:length] for state, length in zip(states, lengths, strict=True)]


def flow_loss(transformer: Any, latents: torch.Tensor, embeds: list[torch.Tensor]) -> torch.Tensor:
    """Mean squared error of the velocity at σ = 3u / (1 + 2u), the scheduler's shift 3.

    u is uniform for one half of the batch and one of the eight steps' own for the other. The model
    is asked for z − noise at time 1 − σ, as in the pipeline.
    """
    uniform = torch.rand(len(latents), device=latents.device)
    uniform[::2] = (uniform[::2] * STEPS).ceil() / STEPS
    sigma = 3 * uniform / (1 + 2 * uniform)
    noise = torch.randn_like(latents)
    weight = sigma[:, None, None, None]
    noisy = weight * noise + (1 - weight) * latents
    outputs = transformer(list(noisy.unsqueeze(2)), 1 - sigma, embeds, return_dict=False)[0]
    predicted = torch.stack(outputs).squeeze(2).float()
    return F.mse_loss(predicted, latents - noise)


def optimizers(models: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for all else, on one scale of learning rates."""
    inner: list[torch.nn.Parameter] = []
    outer: list[torch.nn.Parameter] = []
    for name, parameter in models.named_parameters():
        matrix = parameter.ndim == 2 and any(part in name for part in ("layers.", "refiner."))
        (inner if matrix else outer).append(parameter)
    return [
        torch.optim.Muon(inner, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def compile_blocks(text: Any, image: Any) -> None:
    """Compile block by block: twice as fast on a CPU, and a minute to start."""
    for block in (*text.layers, *image.layers, *image.noise_refiner, *image.context_refiner):
        block.compile()
