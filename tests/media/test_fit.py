import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from media.decode import to_image, to_picture
from media.fit import fit
from schemas.sizes import generation_size
from schemas.task import Picture


def test_an_input_of_the_right_size_keeps_every_pixel(photo: Image.Image) -> None:
    fitted = to_image(fit(to_picture(photo), photo.width, photo.height))
    assert fitted.size == generation_size(*photo.size)
    assert fitted.crop((0, 0, *photo.size)).tobytes() == photo.tobytes()


def test_padding_repeats_the_edge(photo: Image.Image) -> None:
    fitted = np.asarray(to_image(fit(to_picture(photo), photo.width, photo.height)))
    right = fitted[: photo.height, photo.width - 1 : photo.width]
    assert (fitted[: photo.height, photo.width :] == right).all()
    assert (fitted[photo.height :] == fitted[photo.height - 1]).all()


@pytest.mark.parametrize("size", [(64, 256), (256, 64), (1, 1), (500, 333), (17, 800)])
def test_sizes_are_exact(photo: Image.Image, size: tuple[int, int]) -> None:
    fitted = fit(to_picture(photo), *size)
    assert (fitted.width, fitted.height) == generation_size(*size)
    assert len(fitted.rgb) == fitted.width * fitted.height * 3


def test_covers_and_crops_the_centre_without_stretching() -> None:
    """A disc in the middle stays a disc in the middle when the aspect changes."""
    grid = np.mgrid[0:120, 0:240]
    disc = (grid[0] - 59.5) ** 2 + (grid[1] - 119.5) ** 2 < 40**2
    image = np.repeat((disc * 255).astype(np.uint8)[..., None], 3, axis=2)
    fitted = fit(Picture(240, 120, image.tobytes()), 240, 240)
    seen = np.asarray(to_image(fitted))[..., 0] > 127
    rows, columns = np.nonzero(seen)
    for axis in (rows, columns):
        assert axis.mean() == pytest.approx(119.5, abs=1)
        assert np.ptp(axis) == pytest.approx(160, abs=3)  # radius 40, scaled by 2


@given(*[st.integers(1, 60)] * 4)
def test_every_pair_of_sizes(width: int, height: int, to_width: int, to_height: int) -> None:
    fitted = fit(Picture(width, height, bytes(width * height * 3)), to_width, to_height)
    assert (fitted.width, fitted.height) == generation_size(to_width, to_height)


@pytest.mark.parametrize("size", [(392, 392, 1024, 1024), (7, 5, 300, 150), (27, 54, 451, 451)])
def test_sizes_whose_box_rounds_over_the_edge(size: tuple[int, int, int, int]) -> None:
    width, height, to_width, to_height = size
    fit(Picture(width, height, bytes(width * height * 3)), to_width, to_height)
