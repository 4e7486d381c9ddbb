"""Loading an engine around a container snapshot, in one of three modes.

    gpu   everything on the GPU and warm before the snapshot is taken; restore does nothing
    cpu   weights in memory before, moved to the GPU after; CUDA untouched until then
    off   no snapshot; everything happens when the container starts

Which is fastest depends on the platform's mood (facts: GPU restores have crashed for some, CPU
snapshots of many gigabytes gained nothing for others); hence a switch, and a picture drawn after every
restore: if that fails, the weights are loaded anew. Knows no platform.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from inference.engine import Engine
from inference.safety import THRESHOLD
from schemas.task import Lora

Mode = Literal["gpu", "cpu", "off"]

HEALTH_CHECK = (256, 256)
"""Size of the picture that shows whether a restored GPU works."""

logger = logging.getLogger(__name__)


class SnapshotEngine:
    """Call `before_snapshot`, then, in the same or a restored process, `after_restore`."""

    engine: Engine

    def __init__(
        self,
        spec: str,
        mode: Mode,
        device: str = "cuda",
        warm_up: Sequence[tuple[int, int]] = ((1024, 1024),),
        safety_threshold: float = THRESHOLD,
        loras: Path = Path("loras"),
    ) -> None:
        self._spec, self._mode, self._device = spec, mode, device
        self._warm_up, self._threshold, self._loras = warm_up, safety_threshold, loras

    def before_snapshot(self) -> None:
        # Naming the device keeps diffusers and us from asking CUDA whether it is there.
        self._load("cpu" if self._mode == "cpu" else self._device)
        if self._mode == "gpu":
            self._warm()

    def after_restore(self) -> bool:
        """Ready for requests. False if the snapshot was no good and everything was loaded anew.

        Raises what loading raises.
        """
        try:
            if self._mode == "cpu":
                self.engine.to(self._device)
            if self._mode == "gpu":
                self.engine.warm_up(*HEALTH_CHECK)
            else:
                self._warm()
            return True
        except Exception:
            if self._mode == "off":  # there was no snapshot to blame
                raise
            logger.exception("the snapshot cannot be used, loading anew")
        self._load(self._device)
        self._warm()
        return False

    def lacks(self, loras: Sequence[Lora]) -> bool:
        """Whether a file of these is not there, as far as this machine's view of the directory goes."""
        return not all((self._loras / f"{lora.digest}.safetensors").is_file() for lora in loras)

    def healthy(self) -> bool:
        """Whether a picture can still be drawn: after some errors a GPU does nothing any more."""
        try:
            self.engine.warm_up(*HEALTH_CHECK)
        except Exception:
            logger.exception("the engine is broken")
            return False
        return True

    def _load(self, device: str) -> None:
        self.engine = Engine.load(
            self._spec,
            device=device,
            dtype=torch.bfloat16 if self._device.startswith("cuda") else None,
            safety_threshold=self._threshold,
            loras=self._loras,
        )

    def _warm(self) -> None:
        started = time.perf_counter()
        for width, height in self._warm_up:
            self.engine.warm_up(width, height)
        logger.info("warm after %.1f s", time.perf_counter() - started)
