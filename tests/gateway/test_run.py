"""`POST /{endpoint}` over a real socket: a picture and a prompt in, a picture out."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import CAT, I2I, T2I, Server, encoded, opened

CAT_URI = "data:image/jpeg;base64," + base64.b64encode(CAT.read_bytes()).decode()
FAST = {"num_inference_steps": 2, "image_size": {"width": 64, "height": 48}, "seed": 5}


def run(server: Server, path: str = I2I, **body: Any) -> dict[str, Any]:
    answer = server.http.post(path, json={"prompt": "a cat", "image_url": CAT_URI, **FAST, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-fal-request-id"]
    return dict(answer.json())


def picture(server: Server, image: dict[str, Any]) -> Image.Image:
    if image["url"].startswith("data:"):
        return opened(base64.b64decode(image["url"].partition(",")[2]))
    answer = server.http.get(image["url"])
    assert answer.headers["content-type"] == image["content_type"]
    assert len(answer.content) == image["file_size"]
    return opened(answer.content)


def test_a_picture_and_a_prompt(server: Server) -> None:
    output = run(server)
    assert set(output) == {"images", "timings", "seed", "has_nsfw_concepts", "prompt"}
    (image,) = output["images"]
    assert set(image) == {"url", "content_type", "file_name", "file_size", "width", "height"}
    assert (image["width"], image["height"]) == (64, 48) == picture(server, image).size
    assert (output["seed"], output["prompt"]) == (5, "a cat")
    assert output["has_nsfw_concepts"] == [False]
    assert {"inference", "denoise", "input_fetch", "input_decode", "output_store"} <= set(
        output["timings"]
    )


def test_a_prompt_alone(server: Server) -> None:
    output = run(server, T2I)
    assert picture(server, output["images"][0]).size == (64, 48)


def test_strength_0_returns_the_photograph(server: Server, photo: Image.Image) -> None:
    output = run(server, strength=0, image_size="auto")
    original = np.asarray(photo, dtype=np.int16)
    returned = np.asarray(picture(server, output["images"][0]).convert("RGB"), dtype=np.int16)
    assert returned.shape == original.shape
    assert np.abs(returned - original).max() == 0


GUISES: dict[str, dict[str, Any]] = {
    "jpeg": {"format": "JPEG", "quality": 95},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "lossless": True},
    "gif": {"format": "GIF"},
    "avif": {"format": "AVIF", "quality": 95},
}


@pytest.mark.parametrize("name", [*GUISES, "exif", "alpha", "grey", "16 bit", "cmyk"])
def test_every_guise_of_a_photograph_comes_back_right(
    server: Server, photo: Image.Image, name: str
) -> None:
    """Through the whole house at strength 0: right way up, right colours, the size asked for."""
    expected, image, options = photo, photo, GUISES.get(name, {"format": "PNG"})
    if name == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6
        image = photo.transpose(Image.Transpose.ROTATE_90)
        options = {"format": "JPEG", "exif": exif, "quality": 95}
    elif name == "alpha":
        image = photo.convert("RGBA")
        image.paste((0, 0, 0, 0), (0, 0, 100, 300))
        expected = photo.copy()
        expected.paste("white", (0, 0, 100, 300))
    elif name == "grey":
        image = expected = photo.convert("L")
    elif name == "16 bit":
        expected = photo.convert("L")
        image = Image.fromarray(np.asarray(expected).astype(np.uint16) * 257)
    elif name == "cmyk":
        image, options = photo.convert("CMYK"), {"format": "JPEG", "quality": 95}
    uri = "data:;base64," + base64.b64encode(encoded(image, **options)).decode()
    output = run(server, image_url=uri, strength=0, image_size={"width": 451, "height": 300})
    returned = picture(server, output["images"][0])
    assert returned.size == (451, 300)
    difference = np.asarray(returned, np.int16) - np.asarray(expected.convert("RGB"), np.int16)
    assert np.abs(difference).mean() < 4


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_output_formats(server: Server, format: str) -> None:
    (image,) = run(server, output_format=format)["images"]
    assert image["content_type"] == f"image/{format}"
    assert picture(server, image).format == format.upper()


def test_four_pictures_are_four_requests(server: Server) -> None:
    together = run(server, num_images=4)
    assert together["has_nsfw_concepts"] == [False] * 4
    files = [server.http.get(image["url"]).content for image in together["images"]]
    for k, data in enumerate(files):
        alone = run(server, seed=5 + k)["images"][0]
        assert server.http.get(alone["url"]).content == data


def test_a_seed_is_drawn_and_returned(server: Server) -> None:
    first, second = run(server, seed=None), run(server, seed=None)
    assert first["seed"] != second["seed"]
    again = run(server, seed=first["seed"])["images"][0]
    data = server.http.get(first["images"][0]["url"]).content
    assert server.http.get(again["url"]).content == data


def test_sync_mode_returns_data_uris_and_stores_no_file(server: Server) -> None:
    before = set((server.home / "files").iterdir())
    output = run(server, sync_mode=True, output_format="webp")
    assert output["images"][0]["url"].startswith("data:image/webp;base64,")
    assert picture(server, output["images"][0]).size == (64, 48)
    assert set((server.home / "files").iterdir()) == before


def test_our_own_pictures_are_inputs(server: Server) -> None:
    """Read from storage: this server may not fetch from itself, its address is private."""
    url = run(server)["images"][0]["url"]
    again = run(server, image_url=url, strength=0)["images"][0]
    assert server.http.get(again["url"]).content == server.http.get(url).content
    missing = server.http.post(
        I2I, json={"prompt": "x", "image_url": server.url + "/files/nothing.png"}
    )
    assert missing.status_code == 422
    assert missing.json()["detail"][0]["type"] == "file_download_error"


def test_billable_units_are_megapixels(server: Server) -> None:
    body = {"prompt": "x", "image_url": CAT_URI, "strength": 0}
    sized = {"image_size": "square_hd", "num_images": 2}
    assert server.http.post(I2I, json={**body, **sized}).headers["x-fal-billable-units"] == "2"
    small = {"image_size": {"width": 64, "height": 48}}
    units = server.http.post(I2I, json={**body, **small}).headers["x-fal-billable-units"]
    assert float(units) == pytest.approx(64 * 48 / 1024**2, abs=1e-8)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("prompt", {"prompt": None}, "string_type"),
    ("image_url", {"image_url": "cat.jpg"}, "input_value_error"),
    ("image_url", {"image_url": "data:image/png;base64,AAAA"}, "unsupported_image_format"),
    ("image_url", {"image_url": "http://10.0.0.1/cat.png"}, "file_download_error"),
    ("image_size", {"image_size": "enormous"}, "literal_error"),
    ("image_size", {"image_size": {"width": 3000, "height": 3000}}, "less_than_equal"),
    ("strength", {"strength": 2}, "less_than_equal"),
    ("num_inference_steps", {"num_inference_steps": 50}, "less_than_equal"),
    ("seed", {"seed": "x"}, "int_parsing"),
    ("num_images", {"num_images": 10}, "less_than_equal"),
    ("enable_safety_checker", {"enable_safety_checker": "x"}, "bool_parsing"),
    ("sync_mode", {"sync_mode": 7}, "bool_parsing"),
    ("output_format", {"output_format": "bmp"}, "literal_error"),
    ("acceleration", {"acceleration": "max"}, "literal_error"),
]


@pytest.mark.parametrize(("field", "change", "type"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_a_422_naming_the_field_and_never_reaches_the_engine(
    server: Server, field: str, change: dict[str, Any], type: str
) -> None:
    before = len(server.engine.tasks)
    answer = server.http.post(I2I, json={"prompt": "a", "image_url": CAT_URI, **change})
    assert answer.status_code == 422
    assert answer.headers["x-fal-billable-units"] == "0"
    (detail,) = answer.json()["detail"]
    assert detail["loc"][:2] == ["body", field] and detail["type"] == type
    assert len(server.engine.tasks) == before


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{}"])
def test_bodies_that_are_no_request(server: Server, body: bytes) -> None:
    answer = server.http.post(I2I, content=body)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"][0] == "body"


def test_a_body_beyond_the_limit(server: Server) -> None:
    answer = server.http.post(I2I, content=io.BytesIO(bytes(33 << 20)))
    assert answer.status_code == 413
    assert answer.json()["detail"][0]["ctx"] == {"max_size": 32 << 20}


def test_a_broken_engine_is_a_500_that_says_nothing_of_why(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(server.engine, "engine", broken)
    answer = server.http.post(I2I, json={"prompt": "a", "image_url": CAT_URI, **FAST})
    assert (answer.status_code, answer.json()) == (
        500,
        {
            "detail": "Internal Server Error",
            "error_type": "internal_error",
            "message": "Internal Server Error",
        },
    )
    assert answer.headers["x-fal-error-type"] == "internal_error"
    assert answer.headers["x-fal-billable-units"] == "0"


@pytest.mark.parametrize("host", ["[::1", "a b", "a/b", "a@b", "a:123456", "<c>"])
def test_a_malformed_host_gets_no_urls(server: Server, host: str) -> None:
    answer = server.http.post(T2I, json={"prompt": "a"}, headers={"host": host})
    assert answer.status_code == 400


def test_head(server: Server) -> None:
    url = run(server)["images"][0]["url"]
    for path in (url, "/health", "/ready"):
        assert server.http.head(path).status_code == 200


def test_unknown_paths_and_methods(server: Server) -> None:
    missing = server.http.post("/fal-ai/z-image/nothing", json={})
    assert (missing.status_code, missing.json()) == (
        404,
        dict.fromkeys(("detail", "message"), "Path /fal-ai/z-image/nothing not found"),
    )
    assert missing.headers["x-fal-billable-units"] == "0"
    assert server.http.get(I2I).status_code == 405


def test_files_are_found_by_their_whole_name_only(server: Server) -> None:
    name = run(server)["images"][0]["url"].rsplit("/", 1)[1]
    for path in (name[:-1], name.lower() + "x", "../zimage.db", "..%2fzimage.db", f"./{name}x", ""):
        assert server.http.get(f"/files/{path}").status_code == 404


def test_health_and_ready(server: Server) -> None:
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/ready").json() == {"status": "ready"}
