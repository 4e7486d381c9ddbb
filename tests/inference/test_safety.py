import logging

import pytest
from PIL import Image

from inference.safety import THRESHOLD, OpenNSFW


def test_a_benign_photograph_passes(photo: Image.Image) -> None:
    assert not OpenNSFW()(photo)


def test_the_threshold_decides_and_the_score_is_logged(
    photo: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        assert OpenNSFW(threshold=1e-6)(photo)
    assert "nsfw score 0." in caplog.text


def test_the_default_threshold() -> None:
    assert OpenNSFW().threshold == THRESHOLD == 0.8
