"""Where the time of a task goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class StageClock:
    """Seconds per stage of one task, added up over pictures and threads."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._stages: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        with self._lock:
            self._stages[name] = self._stages.get(name, 0.0) + elapsed

    def timings(self) -> dict[str, float]:
        """`inference`: wall-clock seconds since the task began; and the stages."""
        return {"inference": time.perf_counter() - self._started, **self._stages}
