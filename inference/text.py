"""Prompt → embeddings, as Z-Image's pipeline makes them, with a small cache of repeated prompts."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

MAX_TOKENS = 512
"""Prompts are cut here, as the pipeline cuts them."""


class PromptEncoder:
    """The chat template, the tokenizer and the second-to-last hidden state of the text encoder.

    Not padded to MAX_TOKENS as the pipeline does: attention is causal, so the padding behind the
    prompt changes nothing but the time. Not safe for concurrent use; the engine holds its lock.
    """

    def __init__(self, tokenizer: Any, text_encoder: Any, cached_prompts: int = 32) -> None:
        self._tokenizer, self._text_encoder = tokenizer, text_encoder
        self._cached_prompts = cached_prompts
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()

    def __call__(self, prompt: str) -> torch.Tensor:
        """Embeddings of shape (tokens, width), 1 ≤ tokens ≤ 512, on the encoder's device."""
        if prompt in self._cache:
            self._cache.move_to_end(prompt)
            return self._cache[prompt]
        embeds = self._encode(prompt)
        self._cache[prompt] = embeds
        if len(self._cache) > self._cached_prompts:
            self._cache.popitem(last=False)
        return embeds

    def forget(self) -> None:
        """Empty the cache, because weights or device have changed."""
        self._cache.clear()

    def _encode(self, prompt: str) -> torch.Tensor:
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        tokens = self._tokenizer(
            text, max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        output = self._text_encoder(
            input_ids=tokens.to(self._text_encoder.device), output_hidden_states=True
        )
        embeds: torch.Tensor = output.hidden_states[-2][0]
        return embeds
