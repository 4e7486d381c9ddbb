"""Seconds of functions that take turns, for measurements."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def alternate(
    functions: dict[str, Callable[[int], object]], rounds: int, warm_up: int = 2
) -> dict[str, float]:
    """Median seconds of each function; they take turns, so that the machine's moods hit all alike.

    Each is called with the number of the round, to vary its input.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(-warm_up, rounds):
        for name, function in functions.items():
            started = time.perf_counter()
            function(number)
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}
