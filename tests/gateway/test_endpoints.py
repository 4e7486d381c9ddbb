"""What each endpoint adds to the first two, over a real socket with a real engine."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save as save_tensors

from inference.engine import Engine
from media.decode import to_image, to_picture
from media.fit import fit
from schemas.endpoints import ENDPOINTS
from schemas.sizes import generation_size
from schemas.task import Tiling
from tests.conftest import Server, encoded, opened, serving
from tests.gateway.test_run import CAT_URI
from tests.inference.lora_files import pairs, weights, written

Z = "/fal-ai/z-image/"
SMALL: dict[str, Any] = {
    "prompt": "a ginger cat", "image_size": {"width": 64, "height": 64}, "seed": 5,
    "num_inference_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def lora_file(engine: Engine) -> bytes:
    changes = pairs(weights(engine.models.transformer), seed=3)
    return save_tensors({k: v.clone() for k, v in written("fused", changes).items()})


def made(server: Server, endpoint: str, **fields: Any) -> tuple[dict[str, Any], bytes]:
    answer = server.http.post(Z + endpoint, json=SMALL | fields)
    assert answer.status_code == 200, answer.text
    (image,) = answer.json()["images"]
    return answer.json(), server.http.get(image["url"]).content


def refused(server: Server, endpoint: str, **fields: Any) -> dict[str, Any]:
    """The one entry of a 422's detail; the engine has not heard of it."""
    before = len(server.engine.tasks)
    answer = server.http.post(Z + endpoint, json=SMALL | fields)
    assert answer.status_code == 422 and len(server.engine.tasks) == before, answer.text
    (detail,) = answer.json()["detail"]
    return dict(detail)


@pytest.mark.parametrize("endpoint", [each.removeprefix("fal-ai/z-image/") for each in ENDPOINTS])
def test_every_endpoint_makes_pictures(server: Server, endpoint: str) -> None:
    fields = {"image_url": CAT_URI} if "image-to-image" in endpoint else {}
    body, picture = made(server, endpoint, **fields)
    assert opened(picture).size == (64, 64) and body["seed"] == 5
    assert server.engine.tasks[-1].variant == ("base" if "base" in endpoint else "turbo")


def test_base_has_guidance_and_a_negative_prompt(server: Server) -> None:
    _, plain = made(server, "base")
    assert server.engine.tasks[-1].guidance_scale == 4.0
    assert made(server, "base", guidance_scale=2)[1] != plain
    assert made(server, "base", negative_prompt="a dog")[1] != plain
    assert made(server, "turbo", negative_prompt="a dog")[1] == made(server, "turbo")[1]


def test_a_variant_without_weights_is_not_there(tmp_path: Path, engine: Engine) -> None:
    with serving(tmp_path, engine, weights="some/where") as server:
        answer = server.http.post(Z + "base", json=SMALL)
        assert answer.status_code == 404
        assert "ZIMAGE_BASE_WEIGHTS" in answer.json()["detail"]
        assert server.http.post(Z + "turbo", json=SMALL).status_code == 200


def test_expansion_that_the_weights_cannot_do(server: Server) -> None:
    answer = server.http.post(Z + "turbo", json=SMALL | {"enable_prompt_expansion": True})
    (detail,) = answer.json()["detail"]
    assert answer.status_code == 422 and detail["type"] == "feature_not_supported"
    assert detail["loc"] == ["body", "enable_prompt_expansion"]


def test_expansion_is_in_the_answer_and_on_the_bill(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference.weights.Weights.language_model", True)
    monkeypatch.setattr("inference.expansion.MAX_TOKENS", 6)
    answer = server.http.post(Z + "turbo", json=SMALL | {"enable_prompt_expansion": True})
    assert answer.json()["prompt"] not in ("", SMALL["prompt"])
    plain = server.http.post(Z + "turbo", json=SMALL)
    units = [float(each.headers["x-fal-billable-units"]) for each in (plain, answer)]
    assert units[1] - units[0] == pytest.approx(0.0025 / 0.005)


# ## Tiling


def mask_of(width: int, height: int, white: tuple[int, int, int, int]) -> str:
    """A data URI: white within a box, black around."""
    mask = Image.new("L", (width, height))
    mask.paste(255, white)
    return "data:image/png;base64," + base64.b64encode(encoded(mask)).decode()


def test_a_tile_too_large_once_it_is_rounded_up(server: Server) -> None:
    size = {"width": 2040, "height": 2050}  # within 4 megapixels; 2048 × 2064 are not
    body = SMALL | {"image_url": CAT_URI, "image_size": size}
    answer = server.http.post(Z + "turbo/tiling", json=body)
    (detail,) = answer.json()["detail"]
    assert answer.status_code == 422 and detail["loc"] == ["body", "image_size"]
    assert "2048×2064" in detail["msg"]


@pytest.mark.parametrize("size", [(192, 160), (200, 150)])
def test_what_a_mask_keeps(server: Server, photo: Image.Image, size: tuple[int, int]) -> None:
    width, height = size
    cat = "data:image/png;base64," + base64.b64encode(encoded(photo)).decode()
    fields = {"image_url": cat, "image_size": {"width": width, "height": height}, "strength": 0.9}
    mask = mask_of(width, height, (0, 0, width // 2, height))
    _, picture = made(server, "turbo/tiling", **fields, mask_image_url=mask)
    whole = generation_size(width, height)
    kept = to_image(fit(to_picture(photo), *whole)).resize(size, Image.Resampling.LANCZOS)
    got, wanted = (np.asarray(each, np.int16) for each in (opened(picture), kept))
    assert opened(picture).size == size
    difference = np.abs(got - wanted)
    right = difference[8:-8, width // 2 + 8 : -8]
    assert right.max() <= (0 if whole == size else 12)  # byte for byte, or after one resize
    assert difference[:, : width // 2 - 8].mean() > 5


def test_auto_is_the_input_s_size_or_a_megapixel(server: Server, photo: Image.Image) -> None:
    cat = "data:image/png;base64," + base64.b64encode(encoded(photo)).decode()
    _, picture = made(server, "turbo/tiling", image_size="auto", image_url=cat)
    assert opened(picture).size == photo.size
    before = len(server.engine.tasks)
    with server.ending("failed", "none"):
        server.http.post(Z + "turbo/tiling", json=SMALL | {"image_size": "auto"})
    (task,) = server.engine.tasks[before:]
    assert (task.width, task.height) == (1024, 1024) and task.image is None
    assert task.tiling == Tiling("both", 128, 64)


def test_strength_0_returns_the_input(server: Server, photo: Image.Image) -> None:
    cat = "data:image/png;base64," + base64.b64encode(encoded(photo)).decode()
    size = {"width": 192, "height": 160}
    _, picture = made(server, "turbo/tiling", image_url=cat, image_size=size, strength=0)
    assert opened(picture).tobytes() == fit(to_picture(photo), 192, 160).rgb


# ## LoRAs


class Hub(SimpleHTTPRequestHandler):
    """A website with files, which is a hub, too."""

    files: dict[str, bytes]
    moved: dict[str, str]
    asked: list[str]
    shown: list[str | None]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.shown.append(self.headers["Authorization"])
        content = self.files.get(self.path)
        if self.path in self.moved:
            self.send_response(302)
            self.send_header("Location", self.moved[self.path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def hub() -> Iterator[tuple[str, type[Hub]]]:
    handler = type("Handler", (Hub,), {"files": {}, "moved": {}, "asked": [], "shown": []})
    website = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=website.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{website.server_address[1]}", handler
    finally:
        website.shutdown()
        website.server_close()


def test_a_lora_from_everywhere(
    tmp_path: Path, engine: Engine, lora_file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A URL, one that redirects, an upload, a repository, a name: the same picture."""
    directory = engine.models.loras._directory
    with hub() as (url, site):
        site.files |= {
            "/lora.safetensors": lora_file,
            "/api/models/someone/style": json.dumps(
                {"siblings": [{"rfilename": "README.md"}, {"rfilename": "a b.safetensors"}]}
            ).encode(),
            "/someone/style/resolve/main/a%20b.safetensors": lora_file,
            "/someone/two/resolve/main/x/one.safetensors": lora_file,
        }
        site.moved["/moved.safetensors"] = "/lora.safetensors"
        monkeypatch.setenv("HF_ENDPOINT", url)
        (directory / "mine.safetensors").write_bytes(lora_file)
        with serving(tmp_path, engine, loras=directory) as server:
            begun = server.http.post(
                "/rest/storage/upload/initiate",
                json={"content_type": "application/octet-stream", "file_name": "l.safetensors"},
            ).json()
            server.http.put(begun["upload_url"], content=lora_file)
            _, plain = made(server, "turbo/lora")
            assert plain == made(server, "turbo")[1]
            pictures = {
                path: made(server, "turbo/lora", loras=[{"path": path, "scale": 0.8}])[1]
                for path in (
                    f"{url}/lora.safetensors",
                    f"{url}/moved.safetensors",
                    begun["file_url"],
                    "someone/style",
                    "someone/two/x/one.safetensors",
                    "mine",
                )
            }
            assert len(set(pictures.values())) == 1 and plain not in pictures.values()
            asked = len(site.asked)
            made(server, "turbo/lora", loras=[{"path": "someone/style"}])
            made(server, "turbo/lora", loras=[{"path": f"{url}/lora.safetensors"}])
            assert len(site.asked) == asked  # believed for an hour
            assert made(server, "turbo")[1] == plain
            (digest,) = {lora.digest for task in server.engine.tasks for lora in task.loras}
            assert digest == hashlib.sha256(lora_file).hexdigest()


def test_servers_that_do_not_answer_hold_up_their_own_requests_only(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=32) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/x"
        waiting = [
            server.http.post(f"/queue{Z}{endpoint}", json=SMALL | fields).json()
            for endpoint, fields in (
                ("turbo/image-to-image", {"image_url": url}),
                ("turbo/lora", {"loras": [{"path": url}]}),
            )
            for _ in range(5)
        ]
        assert server.http.post(Z + "turbo", json=SMALL).status_code == 200
        states = {server.http.get(each["status_url"]).json()["status"] for each in waiting}
        assert states == {"IN_PROGRESS"}
        for each in waiting:
            assert server.http.put(each["cancel_url"]).status_code == 202
        for each in waiting:
            assert server.wait(each["status_url"])["error_type"] == "client_cancelled"
    assert server.http.post(Z + "turbo", json=SMALL).status_code == 200


def test_loras_that_are_refused_before_the_engine_hears_of_them(
    tmp_path: Path, engine: Engine, lora_file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = save_tensors(
        {
            f"unet.down_blocks.0.attn.{name}.weight": tensor
            for name, tensor in zip(
                ("lora_A", "lora_B"),
                pairs(weights(engine.models.transformer))["cap_embedder.1"],
                strict=True,
            )
        }
    )
    monkeypatch.setattr("gateway.loras.MAX_BYTES", len(lora_file))
    with hub() as (url, site), serving(tmp_path, engine) as server:
        monkeypatch.setenv("HF_ENDPOINT", url)
        site.files |= {
            "/foreign": foreign,
            "/cut": lora_file[:-1],
            "/long": lora_file + b"x",
            "/page": b"<html>",
            "/empty": b"",
            "/api/models/someone/many": json.dumps(
                {"siblings": [{"rfilename": "a.safetensors"}, {"rfilename": "b.safetensors"}]}
            ).encode(),
        }
        for path, type, words in (
            (f"{url}/foreign", "value_error", "unet.down_blocks"),
            (f"{url}/cut", "value_error", "not a safetensors file"),
            (f"{url}/long", "file_too_large", "maximum"),
            (f"{url}/page", "value_error", "not a safetensors file"),
            (f"{url}/empty", "value_error", "not a safetensors file"),
            (f"{url}/gone", "file_download_error", "File download error"),
            ("http://10.1.2.3/lora", "file_download_error", "File download error"),
            ("someone/gone", "file_download_error", "File download error"),
            ("../../passwd.safetensors", "value_error", "no LoRA of this name"),
            ("/etc/passwd", "value_error", "no LoRA of this name"),
            ("unheard-of", "value_error", "no LoRA of this name"),
        ):
            detail = refused(server, "turbo/lora", loras=[{"path": path}])
            assert detail["loc"] == ["body", "loras", 0, "path"], path
            assert detail["type"] == type and words in detail["msg"], (path, detail)
        assert not [each for each in (tmp_path / "loras").iterdir() if each.is_file()]
