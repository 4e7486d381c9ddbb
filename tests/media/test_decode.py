"""The same photograph in every guise comes out right way up, in the right colours."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from media import decode as module
from media.decode import decode, to_image
from schemas.errors import InputError
from tests.conftest import encoded


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.int16)


def distance(data: bytes, expected: Image.Image) -> float:
    """Mean absolute difference of a decoded picture to the expected one, 0…255."""
    got = to_image(decode(data))
    assert got.size == expected.size
    return float(np.abs(pixels(got) - pixels(expected)).mean())


@pytest.mark.parametrize(
    ("format", "tolerance"), [("PNG", 0), ("JPEG", 4), ("WEBP", 4), ("AVIF", 4), ("GIF", 4)]
)
def test_formats(photo: Image.Image, format: str, tolerance: float) -> None:
    assert distance(encoded(photo, format), photo) <= tolerance


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(photo: Image.Image, format: str, orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = photo.transpose(undo[orientation]) if orientation in undo else photo
    assert distance(encoded(stored, format, exif=exif), photo) < 5


@pytest.mark.parametrize("format", ["PNG", "WEBP", "AVIF"])
def test_alpha_is_laid_over_white(photo: Image.Image, format: str) -> None:
    mask = Image.linear_gradient("L").resize(photo.size)
    transparent = photo.convert("RGBA")
    transparent.putalpha(mask)
    over_white = Image.composite(photo, Image.new("RGB", photo.size, "white"), mask)
    assert distance(encoded(transparent, format), over_white) < 5


def test_palette_with_transparency() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    decoded = to_image(decode(encoded(image, "GIF", transparency=0)))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((4, 4)) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P"])
def test_grey_and_palette_modes(photo: Image.Image, mode: str) -> None:
    stored = photo.convert(mode)
    assert distance(encoded(stored), stored.convert("RGB")) == 0


def test_16_bit_grey_is_scaled_not_clipped(photo: Image.Image) -> None:
    grey = np.asarray(photo.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    assert distance(encoded(deep), photo.convert("L")) == 0


def test_cmyk_jpeg(photo: Image.Image) -> None:
    assert distance(encoded(photo.convert("CMYK"), "JPEG", quality=95), photo) < 4


def test_a_colour_profile_is_applied() -> None:
    """Lab's D50 white and a mid grey in an sRGB profile stay; a linear profile brightens."""
    linear = ImageCms.ImageCmsProfile(io.BytesIO(_linear_rgb_profile())).tobytes()
    image = Image.new("RGB", (8, 8), (64, 64, 64))
    plain = to_image(decode(encoded(image))).getpixel((0, 0))
    converted = to_image(decode(encoded(image, icc_profile=linear))).getpixel((0, 0))
    assert plain == (64, 64, 64)
    # linear 0.251 is 0.537 in sRGB's transfer function: 137
    assert isinstance(converted, tuple) and all(abs(value - 137) <= 2 for value in converted)


def _linear_rgb_profile() -> bytes:
    """sRGB's own profile with its three transfer curves replaced by the identity."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(data[128:132], "big")
    for i in range(count):
        entry = 132 + 12 * i
        if data[entry : entry + 4] in (b"rTRC", b"gTRC", b"bTRC"):
            offset = int.from_bytes(data[entry + 4 : entry + 8], "big")
            identity = b"curv" + bytes(8)  # a curve of no entries is the identity
            data[offset : offset + len(identity)] = identity
    return bytes(data)


def test_a_broken_profile_is_ignored(photo: Image.Image) -> None:
    assert distance(encoded(photo, icc_profile=b"nonsense" * 40), photo) == 0


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
        red, _, blue = to_image(decode(data)).getpixel((4, 4))  # type: ignore[misc]
        assert red > 250 and blue < 5


def error(data: bytes) -> dict[str, object]:
    with pytest.raises(InputError) as caught:
        decode(data)
    (detail,) = caught.value.detail
    assert detail["loc"] == ["body", "image_url"]
    return detail


def test_what_is_not_a_picture_is_refused() -> None:
    assert error(b"")["type"] == "unsupported_image_format"
    detail = error(b"<html>hello</html>")
    assert detail["type"] == "unsupported_image_format"
    assert ".png" in detail["ctx"]["supported_formats"]  # type: ignore[index]


def test_other_formats_are_refused(photo: Image.Image) -> None:
    for format in ("BMP", "TIFF", "ICO", "PPM", "TGA"):
        assert error(encoded(photo, format))["type"] == "unsupported_image_format"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "AVIF"])
def test_truncated_pictures_are_refused(photo: Image.Image, format: str) -> None:
    data = encoded(photo, format)
    assert error(data[: len(data) // 2])["type"] in ("image_load_error", "unsupported_image_format")


def test_size_limits_are_read_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture over the limit is refused before a single pixel is unpacked."""
    monkeypatch.setattr(
        Image.Image, "load", lambda self: pytest.fail("pixels were unpacked before the check")
    )
    assert error(encoded_header(8193, 1))["type"] == "image_too_large"
    detail = error(encoded_header(8000, 8000))
    assert detail["type"] == "image_too_large"
    assert detail["ctx"] == {
        "max_width": module.MAX_SIDE,
        "max_height": module.MAX_SIDE,
        "max_pixels": module.MAX_PIXELS,
    }
    assert error(encoded_header(20_000, 20_000))["type"] == "image_too_large"  # Pillow's own limit


def encoded_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds one compressed byte."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


def test_too_many_bytes_are_refused() -> None:
    detail = error(b"\x89PNG" + bytes(module.MAX_BYTES))
    assert detail["type"] == "file_too_large"
    assert detail["ctx"] == {"max_size": module.MAX_BYTES}
