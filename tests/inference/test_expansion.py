"""Prompt expansion on the demo text encoder: it writes nonsense, by the arithmetic of a real one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from inference import expansion
from inference.engine import Engine
from inference.expansion import INSTRUCTION, PromptExpander, as_language_model, whole_sentences
from inference.weights import DEMO_DIRECTORY
from schemas.task import Task, TaskCancelled


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_DIRECTORY / "tokenizer")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expansion, "MAX_TOKENS", 12)


def test_promise_6_the_encoder_is_the_language_model(engine: Engine, tokenizer: Any) -> None:
    """No tensor of its own, and the words of transformers' own model of the same weights."""
    encoder = engine.models.text_encoder
    model = as_language_model(encoder)
    storages = {tensor.data_ptr() for tensor in encoder.parameters()}
    assert {tensor.data_ptr() for tensor in model.parameters()} == storages

    whole = Qwen3ForCausalLM.from_pretrained(DEMO_DIRECTORY / "text_encoder", dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": "a cat"}],
        add_generation_prompt=True,
        enable_thinking=False,
        return_tensors="pt",
        return_dict=True,
    )
    tokens = whole.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=-1)
    said = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert PromptExpander(tokenizer, encoder)("a cat") == whole_sentences(said.strip())


def test_expanded_once(engine: Engine, tokenizer: Any) -> None:
    expander = PromptExpander(tokenizer, engine.models.text_encoder)
    calls: list[int] = []
    hook = engine.models.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        first = expander("a cat")
        assert len(calls) == 12  # the key-value cache: one forward a token, no more
        assert expander("a cat") == first and len(calls) == 12
    finally:
        hook.remove()


def test_late_is_short_and_not_remembered(engine: Engine, tokenizer: Any) -> None:
    expander = PromptExpander(tokenizer, engine.models.text_encoder, seconds=0.0)
    assert expander("a cat") and not expander._cache


def test_cancelled_between_two_tokens(engine: Engine, tokenizer: Any) -> None:
    asked: list[int] = []
    with pytest.raises(TaskCancelled):
        PromptExpander(tokenizer, engine.models.text_encoder)(
            "a cat", lambda: asked.append(1) or len(asked) > 3
        )
    assert len(asked) == 4


def test_a_task_is_drawn_from_what_was_written(tmp_path: Path) -> None:
    shutil.copytree(DEMO_DIRECTORY, tmp_path / "weights")
    config = tmp_path / "weights" / "text_encoder" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"architectures": ["Qwen3ForCausalLM"]})
    )
    engine = Engine.load(str(tmp_path / "weights"), device="cpu", dtype=torch.float32)
    task = Task("a cat", 64, 64, steps=2, strength=1.0, seed=5, num_images=1, expand_prompt=True)
    result = engine(task)
    assert result.prompt != "a cat" and result.timings["prompt_expansion"] > 0
    plain = Task(result.prompt, 64, 64, steps=2, strength=1.0, seed=5, num_images=1)
    assert engine(plain).images == result.images  # the seed does not notice
    engine.close()


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("A cat. It sits on a", "A cat."),
        ("Un chat ! Il est", "Un chat !"),
        ("一只猫。它", "一只猫。"),
        ("no end", "no end"),
    ],
)
def test_whole_sentences(text: str, kept: str) -> None:
    assert whole_sentences(text) == kept
