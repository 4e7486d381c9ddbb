"""Several sets of weights in one process, one engine for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from inference.engine import Engine
from schemas.task import Progress, Result, Task


class Engines:
    """An engine for each variant; variants of the same weights share one. A `Generate`."""

    def __init__(self, specs: Mapping[str, str], **options: Any) -> None:
        """specs: weights of each variant; options: those of `Engine.load`. Raises WeightsError."""
        self._loaded: dict[str, Engine] = {}
        try:
            for spec in specs.values():
                if spec not in self._loaded:
                    self._loaded[spec] = Engine.load(spec, **options)
        except BaseException:
            self.close()
            raise
        self._of = {variant: self._loaded[spec] for variant, spec in specs.items()}

    def __getitem__(self, variant: str) -> Engine:
        return self._of[variant]

    def __call__(
        self,
        task: Task,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Result:
        return self._of[task.variant](task, on_progress, cancelled)

    def close(self) -> None:
        for engine in self._loaded.values():
            engine.close()
