import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import InputError
from schemas.sizes import (
    AUTO_MIN_PIXELS,
    MAX_PIXELS,
    MAX_SIDE,
    ImageSize,
    Size,
    auto_size,
    generation_size,
    megapixels,
    requested_size,
)


@pytest.mark.parametrize(
    ("preset", "size"),
    [
        ("square_hd", (1024, 1024)),
        ("square", (512, 512)),
        ("portrait_4_3", (768, 1024)),
        ("portrait_16_9", (576, 1024)),
        ("landscape_4_3", (1024, 768)),
        ("landscape_16_9", (1024, 576)),
    ],
)
def test_presets(preset: str, size: tuple[int, int]) -> None:
    assert requested_size(preset) == size


def test_custom_sizes_are_exact() -> None:
    assert requested_size(ImageSize(width=451, height=300)) == (451, 300)
    assert requested_size(ImageSize()) == (512, 512)


def test_too_many_pixels_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        requested_size(ImageSize(width=2049, height=2048))
    assert caught.value.detail[0]["ctx"] == {"le": MAX_PIXELS}


def test_auto_keeps_a_size_inside_the_range() -> None:
    assert auto_size(Size(451, 300)) == (451, 300)


sides = st.integers(1, 8192)


@given(sides, sides)
def test_auto_size_keeps_aspect_and_limits(width: int, height: int) -> None:
    size = auto_size(Size(width, height))
    assert min(size) >= 1 and max(size) <= MAX_SIDE
    assert size.width * size.height <= MAX_PIXELS
    if max(size) < MAX_SIDE and min(size) > 16:
        assert size.width * size.height >= AUTO_MIN_PIXELS * 0.9
    if min(size) > 64:
        assert size.width / size.height == pytest.approx(width / height, rel=0.02)


@given(sides, sides)
def test_generation_size_is_the_next_multiple_of_16(width: int, height: int) -> None:
    generated = generation_size(width, height)
    for asked, got in zip((width, height), generated, strict=True):
        assert got % 16 == 0 and 0 <= got - asked < 16


def test_a_megapixel_is_1024_squared() -> None:
    assert megapixels(1024, 1024) == 1
    assert megapixels(512, 512) == 0.25
