"""Requests to an engine in a line, and what came of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from schemas.task import Acceleration, Result, Task
from tests.conftest import opened

LEVELS: tuple[Acceleration, ...] = ("none", "regular", "high")


def change(task: Task, **fields: Any) -> Task:
    return dataclasses.replace(task, **fields)


def only(result: Result) -> bytes:
    (image,) = result.images
    return image.data


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(opened(data).convert("RGB"), dtype=np.int16)


def psnr(one: bytes, other: bytes) -> float:
    """Peak signal-to-noise ratio in dB."""
    error = np.square((pixels(one) - pixels(other)).astype(float)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))
