"""Bytes of unknown origin → 8-bit sRGB pixels, right way up, or a clear 422.

Accepts JPEG, PNG, WebP, GIF and AVIF (the formats fal's page names); of an animation, the first
frame. Limits are read from the header before any pixel is decompressed. The order matters:
open → size check → load → EXIF rotation → 16-bit scaling → ICC to sRGB → alpha over white → RGB.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from schemas.errors import InputError, Loc
from schemas.task import Picture

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF")
SUFFIXES = [".jpg", ".jpeg", ".png", ".webp", ".gif", ".avif"]

MAX_BYTES = 20 * 1024 * 1024
MAX_PIXELS = 16_000_000
MAX_SIDE = 8192
MAX_ICC_BYTES = 4 * 1024 * 1024

_SRGB = ImageCms.createProfile("sRGB")
_ICC_MODES = {"RGB", "RGBA", "L", "CMYK"}


def decode(data: bytes, loc: Loc = ("body", "image_url")) -> Picture:
    """Decode one picture. `loc` names the request field in errors.

    Raises InputError: file_too_large (ctx max_size), unsupported_image_format (ctx
    supported_formats), image_too_large (ctx max_width, max_height, max_pixels), image_load_error.
    """
    if len(data) > MAX_BYTES:
        raise file_too_large(loc)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.size, loc)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return to_picture(_to_rgb(image))
    except UnidentifiedImageError:
        raise InputError(
            loc,
            "Unsupported or unrecognized image format",
            "unsupported_image_format",
            ctx={"supported_formats": SUFFIXES},
        ) from None
    except Image.DecompressionBombError:  # Pillow's own limit, before ours is asked
        raise _too_large("The image", loc) from None
    except InputError:
        raise
    except Exception as error:  # decoders raise whatever they like on broken files
        raise InputError(loc, "Image load error", "image_load_error") from error


def file_too_large(loc: Loc) -> InputError:
    """The error for more than MAX_BYTES, wherever they are noticed first."""
    return InputError(
        loc,
        f"File size exceeds the maximum of {MAX_BYTES} bytes",
        "file_too_large",
        ctx={"max_size": MAX_BYTES},
    )


def _check_size(size: tuple[int, int], loc: Loc) -> None:
    width, height = size
    if max(size) > MAX_SIDE or width * height > MAX_PIXELS:
        raise _too_large(f"An image of {width}×{height}", loc)


def _too_large(what: str, loc: Loc) -> InputError:
    return InputError(
        loc,
        f"{what} exceeds {MAX_PIXELS} pixels or a side of {MAX_SIDE}",
        "image_too_large",
        ctx={"max_width": MAX_SIDE, "max_height": MAX_SIDE, "max_pixels": MAX_PIXELS},
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16L", "I;16B", "I"):
        # Pillow's own conversion clips 16-bit grey to white; 65535 / 257 = 255 exactly.
        grey = np.asarray(image, dtype=np.float32)
        image = Image.fromarray(np.clip(np.rint(grey / 257), 0, 255).astype(np.uint8), "L")
    elif image.mode in ("P", "PA", "LA", "La", "RGBa", "1"):
        transparent = image.mode != "1" and image.has_transparency_data
        image = image.convert("RGBA" if transparent else "RGB")
    elif image.mode in ("L", "RGB") and "transparency" in image.info:
        image = image.convert("RGBA")
    image = _to_srgb(image)
    if image.mode == "RGBA":
        opaque = Image.new("RGB", image.size, "white")
        opaque.paste(image, mask=image.getchannel("A"))
        return opaque
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_srgb(image: Image.Image) -> Image.Image:
    """Apply the embedded colour profile; a broken, foreign or huge one is ignored."""
    icc = image.info.get("icc_profile")
    if not icc or len(icc) > MAX_ICC_BYTES or image.mode not in _ICC_MODES:
        return image
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        opaque = image.convert("RGB") if alpha else image
        converted = ImageCms.profileToProfile(opaque, profile, _SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    assert converted is not None  # only inPlace=True returns None
    if alpha:
        converted.putalpha(alpha)
    return converted


def to_picture(image: Image.Image) -> Picture:
    """An RGB Pillow image as plain data."""
    return Picture(image.width, image.height, image.tobytes())


def to_image(picture: Picture) -> Image.Image:
    """The inverse of `to_picture`."""
    return Image.frombytes("RGB", (picture.width, picture.height), picture.rgb)
