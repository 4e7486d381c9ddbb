"""Cover and centre-crop: bring a picture to an exact size without ever stretching it."""

from __future__ import annotations

import numpy as np
from PIL import Image

from media.decode import to_image, to_picture
from schemas.sizes import generation_size
from schemas.task import Picture


def fit(picture: Picture, width: int, height: int) -> Picture:
    """The picture at `generation_size(width, height)`, its top-left width×height covered by it.

    Scales (Lanczos) so that the target is covered, crops the overhang equally on both sides, then
    repeats the last row and column up to the generation size. So an input that already has the
    requested size keeps every pixel.
    """
    covered = _cover(picture, width, height)
    full_width, full_height = generation_size(width, height)
    if (full_width, full_height) == (width, height):
        return to_picture(covered)
    padded = np.empty((full_height, full_width, 3), np.uint8)
    padded[:height, :width] = np.asarray(covered)
    padded[:height, width:] = padded[:height, width - 1 : width]
    padded[height:] = padded[height - 1]
    return Picture(full_width, full_height, padded.tobytes())


def _cover(picture: Picture, width: int, height: int) -> Image.Image:
    image = to_image(picture)
    if image.size == (width, height):
        return image
    scale = max(width / image.width, height / image.height)
    # Rounding must not push the box over the edge by a part in 10¹⁶.
    crop_width = min(float(image.width), width / scale)
    crop_height = min(float(image.height), height / scale)
    left, top = (image.width - crop_width) / 2, (image.height - crop_height) / 2
    box = (left, top, left + crop_width, top + crop_height)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
