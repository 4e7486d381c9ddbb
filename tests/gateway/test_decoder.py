"""Pictures that ask for minutes or gigabytes, against the decoder's processes."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
import uvloop
from PIL import Image, ImageCms

from gateway.decoder import Decoder
from schemas.errors import InputError
from schemas.sizes import ImageSize
from tests.conftest import CAT, encoded

T = TypeVar("T")
CAT_BYTES = CAT.read_bytes()
CAT_GIF = encoded(Image.open(CAT), "GIF")


def with_decoder(scenario: Callable[[Decoder], Awaitable[T]], seconds: float = 5.0) -> T:
    async def run() -> T:
        decoder = Decoder(seconds=seconds)
        try:
            return await scenario(decoder)
        finally:
            await decoder.close()

    return asyncio.run(run())


def error_type(data: bytes, seconds: float = 5.0) -> str:
    async def scenario(decoder: Decoder) -> str:
        with pytest.raises(InputError) as caught:
            await decoder(data, "auto")
        picture, _ = await decoder(CAT_BYTES, "auto")  # and the next one is well
        assert picture.width == 464
        return str(caught.value.detail[0]["type"])

    return with_decoder(scenario, seconds)


def test_sizes() -> None:
    async def scenario(decoder: Decoder) -> list[object]:
        results = []
        for size in ("auto", "square", ImageSize(width=100, height=50)):
            picture, exact = await decoder(CAT_BYTES, size)
            assert len(picture.rgb) == picture.width * picture.height * 3
            results.append((picture.width, picture.height, *exact))
        return results

    assert with_decoder(scenario) == [
        (464, 304, 451, 300),
        (512, 512, 512, 512),
        (112, 64, 100, 50),
    ]


def test_what_is_not_a_picture() -> None:
    assert error_type(b"hello") == "unsupported_image_format"


def test_a_progressive_jpeg_with_endless_scans_is_cut_off() -> None:
    data = encoded(Image.new("L", (3000, 3000), 7), "JPEG", progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    bomb = data[:-2] + last_scan * 4000 + data[-2:]
    started = time.monotonic()
    assert error_type(bomb, seconds=1.0) == "image_load_error"
    assert time.monotonic() - started < 10


def test_a_picture_that_takes_more_memory_than_it_may_is_refused() -> None:
    """A GIF comment of nine million one-byte blocks takes 768 MB, before there is a size to check."""
    header, rest = CAT_GIF[:13], CAT_GIF[13:]
    palette, rest = rest[: 3 * 256], rest[3 * 256 :]
    comment = b"\x21\xfe" + b"\x01x" * 9_000_000 + b"\x00"
    assert error_type(header + palette + comment + rest, seconds=20) == "image_load_error"


def test_the_largest_honest_pictures_fit() -> None:
    side = 4000
    image = Image.linear_gradient("L").resize((side, side)).convert("RGBA")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for data in (
        encoded(image, "WEBP", icc_profile=profile, method=0),
        encoded(image, "PNG", icc_profile=profile, compress_level=1),
    ):
        picture, size = with_decoder(lambda decoder, data=data: decoder(data, "auto"), 30)
        assert size == (2048, 2048) == (picture.width, picture.height)


def test_a_cancelled_caller_leaves_no_process_working() -> None:
    data = encoded(Image.new("L", (3000, 3000), 7), "JPEG", progressive=True)
    bomb = data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 4000 + data[-2:]

    others = _children()

    async def scenario(decoder: Decoder) -> None:
        decoding = asyncio.create_task(decoder(bomb, "auto"))
        while not (children := _children() - others):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        decoding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await decoding
        assert not children & _children()

    with_decoder(scenario, seconds=60)


def _children() -> set[str]:
    tasks = Path(f"/proc/{os.getpid()}/task")
    return {pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()}


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_process_that_was_killed_is_replaced_unnoticed(loop: str) -> None:
    async def scenario() -> None:
        decoder = Decoder()
        await decoder.warm_up()
        decoder._idle[0].kill()
        await decoder._idle[0].wait()
        picture, _ = await decoder(CAT_BYTES, "auto")
        assert picture.width == 464
        await decoder.close()

    factory = uvloop.new_event_loop if loop == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(scenario())


def test_the_directory_of_the_server_is_not_imported_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "schemas.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    with_decoder(lambda decoder: decoder(CAT_BYTES, "auto"))


def test_a_process_that_does_not_start_is_not_the_pictures_fault(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="does not start"):
        with_decoder(lambda decoder: decoder(CAT_BYTES, "auto"))
    with_decoder(lambda decoder: decoder.warm_up())
    assert "pictures cannot be decoded" in caplog.text
