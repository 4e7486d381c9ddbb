"""A short prompt made into a detailed one by the language model that encodes prompts.

Z-Image's text encoder is a whole Qwen3 without its last matrix, which is tied to the first: so the model
that writes shares every weight with the encoder and takes no memory of its own. What it writes is a
function of the prompt alone: the seed decides over the picture only.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from schemas.task import TaskCancelled

logger = logging.getLogger(__name__)

INSTRUCTION = (
    "You write prompts for an image generator. Rewrite the user's prompt as one paragraph of at most "
    "90 words, in the user's language. Keep every subject, number, name and quoted text of it. Add what "
    "a photographer or painter would have to know: setting, composition, light, colours, materials, "
    "mood. No lists, no explanations, nothing but the new prompt."
)

MAX_TOKENS = 160
SECONDS = 4.0
"""After so many tokens or seconds the text ends with its last whole sentence."""

CACHED = 256


class PromptExpander:
    """Not safe for concurrent use; the engine holds its lock."""

    def __init__(self, tokenizer: Any, text_encoder: Any, seconds: float = SECONDS) -> None:
        self._tokenizer = tokenizer
        self._model = as_language_model(text_encoder)
        self._seconds = seconds
        self._cache: OrderedDict[str, str] = OrderedDict()

    def __call__(self, prompt: str, cancelled: Callable[[], bool] = lambda: False) -> str:
        """The expanded prompt; the prompt itself if nothing usable was written.

        Raises TaskCancelled between two tokens.
        """
        if prompt in self._cache:
            self._cache.move_to_end(prompt)
            return self._cache[prompt]
        text, in_time = self._write(prompt, cancelled)
        expanded = text or prompt
        if in_time:  # a slow moment must not be remembered
            self._cache[prompt] = expanded
            if len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        return expanded

    def _write(self, prompt: str, cancelled: Callable[[], bool]) -> tuple[str, bool]:
        """What the model says, and whether it was done or had said MAX_TOKENS in time."""
        deadline = time.monotonic() + self._seconds

        def stop(tokens: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
            if cancelled():
                raise TaskCancelled
            late = time.monotonic() > deadline
            return torch.full((len(tokens),), late, device=tokens.device)

        inputs = self._tokenizer.apply_chat_template(
            [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": prompt}],
            add_generation_prompt=True,
            enable_thinking=False,
            return_tensors="pt",
            return_dict=True,
        ).to(self._model.device)
        tokens = self._model.generate(
            **inputs,
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=self._tokenizer.eos_token_id,
            stopping_criteria=[stop],
        )[0, inputs["input_ids"].shape[1] :]
        ended = bool(tokens[-1] == self._tokenizer.eos_token_id)
        in_time = ended or len(tokens) == MAX_TOKENS
        if not in_time:
            logger.warning("prompt expansion was cut after %.1f s", self._seconds)
        text = self._tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return text if ended else whole_sentences(text), in_time


def as_language_model(text_encoder: Any) -> Any:
    """A causal language model with the encoder's own tensors. No memory is taken."""
    from transformers import GenerationConfig, Qwen3ForCausalLM

    with torch.device("meta"):
        model = Qwen3ForCausalLM(text_encoder.config)
    model.model = text_encoder
    model.lm_head.weight = text_encoder.embed_tokens.weight
    model.generation_config = GenerationConfig()
    return model.eval()


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence; all of it if there is none."""
    end = max(text.rfind(mark) for mark in (".", "!", "?", "。", "！", "？"))
    return text[: end + 1] if end > 0 else text
