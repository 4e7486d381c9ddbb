"""The header of a safetensors file, which may come from anyone: names, types, shapes, no numbers.

Layout: 8 bytes with the header's length, little-endian; the header, JSON; the tensors, end to end
(https://huggingface.co/docs/safetensors). What passes here, the safetensors library loads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from schemas.lora import LoraError, Shape

MAX_HEADER = 4 * 2**20
"""Bytes. The largest LoRA has some thousand tensors, of some hundred bytes each."""

_ITEM_SIZES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"I64": 8, "I32": 4},  # an alpha may be whole
}


class Header(NamedTuple):
    """Shapes by tensor name, and the file's own remarks."""

    shapes: dict[str, Shape]
    metadata: dict[str, str]


def read_header(data: bytes | memoryview) -> Header:
    """Of a whole file. Raises LoraError("not a safetensors file: …"). Copies no tensor."""
    try:
        return _header(data)
    except (ValueError, RecursionError, KeyError) as error:
        raise LoraError(f"not a safetensors file: {error}") from None


def _header(data: bytes | memoryview) -> Header:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, MAX_HEADER):
        raise ValueError(f"{len(data)} bytes cannot have a header of {length}")
    text = bytes(data[8 : 8 + length]).decode()
    if not text.startswith("{"):
        raise ValueError("the header is not an object")
    entries = json.loads(text, object_pairs_hook=_distinct)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ is not an object of strings")
    shapes = {}
    spans = []
    for name, entry in entries.items():
        shapes[name], span = _tensor(name[:120], entry)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"tensors do not lie end to end at byte {end}")
        end = stop
    if end != len(data) - 8 - length:
        raise ValueError(f"{len(data) - 8 - length} bytes of tensors, {end} accounted for")
    return Header(shapes, metadata)


def _tensor(name: str, entry: Any) -> tuple[Shape, tuple[int, int]]:
    """Shape, and first and last byte (exclusive) among the tensors."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name!r} is not a tensor's")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_SIZES:
        raise ValueError(f"{name!r} has a type other than {', '.join(_ITEM_SIZES)}")
    if not _naturals(shape) or len(shape) > 8 or not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} has no proper shape and offsets")
    if math.prod(shape) * _ITEM_SIZES[dtype] != offsets[1] - offsets[0]:
        raise ValueError(f"shape and bytes of {name!r} differ")
    return tuple(shape), (offsets[0], offsets[1])


def _naturals(value: Any) -> bool:
    """Sizes that 64 bits can hold."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _distinct(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, which must not say one thing twice: readers differ in which they believe."""
    items = list(pairs)
    if len(found := dict(items)) != len(items):
        raise ValueError("a name is there twice")
    return found
