from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.lora import LoraError
from schemas.safetensors import MAX_HEADER, read_header

GOOD = safetensors.torch.save(
    {
        "a": torch.zeros(2, 3, dtype=torch.bfloat16),
        "alpha": torch.tensor(1.0),
        "whole": torch.tensor(4),
        "none": torch.zeros(0, 4),
    },
    {"format": "pt"},
)


def made(header: Any, tensors: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("data", [GOOD, memoryview(GOOD)])
def test_names_shapes_and_remarks(data: bytes | memoryview) -> None:
    header = read_header(data)
    assert header.shapes == {"a": (2, 3), "alpha": (), "whole": (), "none": (0, 4)}
    assert header.metadata == {"format": "pt"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"\xff" * 100,
        b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
        GOOD[:-1],
        GOOD + b"\0",
        (MAX_HEADER + 1).to_bytes(8, "little") + b" " * (MAX_HEADER + 1),
        made(b"{"),
        made(b"\xff"),
        made(b"[" * 100_000),
        made(b'{"a":' * 100_000),
        made(b'{"a": ' + b"9" * 10_000 + b"}"),
        made([]),
        made("a"),
        made(b" {}"),
        made({"a": 1}),
        made({"a": {}}),
        made({"__metadata__": 1}),
        made({"__metadata__": {"a": 1}}),
        made({"a": {**entry(), "more": 1}}, b"1234"),
        made({"a": entry("F33")}, b"1234"),
        made({"a": entry([])}, b"1234"),
        made({"a": entry(shape=[1.0])}, b"1234"),
        made({"a": entry(shape=[True])}, b"1234"),
        made({"a": entry(shape=[-1, -1])}, b"1234"),
        made({"a": entry(shape=[2])}, b"1234"),
        made({"a": entry(shape=[1] * 9)}, b"1234"),
        made({"a": entry(shape=[2**63, 0], offsets=[0, 0])}),
        made({"a": entry(shape=7)}, b"1234"),
        made({"a": entry(offsets=[0])}, b"1234"),
        made({"a": entry(offsets=[4, 0])}, b"1234"),
        made({"a": entry(offsets=[4, 8])}, b"1234"),
        made({"a": entry(offsets=[4, 8])}, b"12345678"),
        made({"a": entry(), "b": entry()}, b"1234"),
        made(b'{"a": %s, "a": %s}' % (2 * (json.dumps(entry()).encode(),)), b"1234"),
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(LoraError, match=r"^not a safetensors file: "):
        read_header(data)


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(LoraError):
        read_header(data)


@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=3))
def test_what_passes_the_library_loads(place: int, change: bytes) -> None:
    data = GOOD[:place] + change + GOOD[place + len(change) :]
    try:
        header = read_header(data)
    except LoraError:
        return
    loaded = safetensors.torch.load(data)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == header.shapes
