import numpy as np
import pytest
from PIL import Image

from media.encode import CONTENT_TYPES, encode
from schemas.task import Format
from tests.conftest import opened


@pytest.mark.parametrize("format", list(CONTENT_TYPES))
def test_formats_keep_the_picture(photo: Image.Image, format: Format) -> None:
    data = encode(photo, format)
    image = opened(data)
    assert image.get_format_mimetype() == CONTENT_TYPES[format]
    difference = np.asarray(image.convert("RGB"), np.int16) - np.asarray(photo, np.int16)
    assert np.abs(difference).mean() <= (0 if format == "png" else 3)


def test_png_is_hardly_larger_than_pillow_makes_it(photo: Image.Image) -> None:
    import io

    default = io.BytesIO()
    photo.save(default, "PNG")
    assert len(encode(photo, "png")) < 1.1 * len(default.getvalue())


def test_a_black_picture_stays_small() -> None:
    assert len(encode(Image.new("RGB", (1024, 1024)), "png")) < 30_000
