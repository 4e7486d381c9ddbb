"""Uploads over a real socket: both clients' flows, limits, types, lifetimes, and use as inputs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gateway.files import NAME
from inference.engine import Engine
from tests.conftest import I2I, Server, encoded, serving

LIMIT = 200_000
KEY = {"Authorization": "Key alice:a-secret-of-sixteen"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    with serving(home, engine, keys="alice:a-secret-of-sixteen", upload_max=LIMIT) as server:
        yield server


@pytest.fixture(scope="module")
def picture(photo: Image.Image) -> bytes:
    return encoded(photo.resize((64, 48)))


def initiate(server: Server, kind: str = "initiate", **headers: str) -> dict[str, str]:
    answer = server.http.post(
        f"/rest/storage/upload/{kind}",
        params={"storage_type": "fal-cdn-v3"},
        json={"content_type": "image/png", "file_name": "cat.png"},
        headers={**KEY, **headers},
    )
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def error(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["detail"][0]["type"]


def test_initiate_put_and_use(server: Server, picture: bytes) -> None:
    urls = initiate(server)
    assert server.http.get(urls["file_url"]).status_code == 404  # not yet
    put = server.http.put(urls["upload_url"], content=picture)  # no key: the URL is the permission
    assert put.status_code == 200
    got = server.http.get(urls["file_url"])
    assert (got.content, got.headers["content-type"]) == (picture, "image/png")
    body = {"prompt": "x", "image_url": urls["file_url"], "strength": 0.0}
    answer = server.http.post(I2I, json=body, headers=KEY)
    assert answer.status_code == 200, answer.text


def test_parts_come_in_any_order(server: Server, picture: bytes) -> None:
    urls = initiate(server, "initiate-multipart")
    path, _, query = urls["upload_url"].partition("?")
    half = len(picture) // 2
    tags = {}
    for number, part in ((2, picture[half:]), (1, picture[:half])):
        answer = server.http.put(f"{path}/{number}?{query}", content=part)
        assert answer.json()["partNumber"] == number
        tags[number] = answer.json()["etag"]
    parts = [{"partNumber": number, "etag": tags[number]} for number in (1, 2)]
    done = server.http.post(f"{path}/complete?{query}", json={"parts": parts})
    assert done.status_code == 200, done.text
    assert server.http.get(urls["file_url"]).content == picture
    again = server.http.post(f"{path}/complete?{query}", json={"parts": parts})
    assert again.is_success  # its answer may have been lost


def test_a_missing_part(server: Server) -> None:
    path, _, query = initiate(server, "initiate-multipart")["upload_url"].partition("?")
    answer = server.http.post(f"{path}/complete?{query}", json={"parts": [{"partNumber": 1}]})
    assert error(answer) == (422, "value_error")


def test_the_cdn_flow(server: Server, picture: bytes) -> None:
    token = server.http.post("/rest/storage/auth/token", json={}, headers=KEY).json()
    assert token["base_url"] == server.url and token["expires_at"].endswith("+00:00")
    authorization = {"Authorization": f"{token['token_type']} {token['token']}"}
    answer = server.http.post(
        "/files/upload", content=picture, headers={**authorization, "Content-Type": "image/png"}
    )
    assert server.http.get(answer.json()["access_url"]).content == picture
    begun = server.http.post(
        "/files/upload/multipart", headers={**authorization, "Content-Type": "image/png"}
    ).json()
    base = f"{begun['access_url']}/multipart/{begun['uploadId']}"
    tag = server.http.put(f"{base}/1", content=picture, headers=authorization).headers["etag"]
    parts = {"parts": [{"partNumber": 1, "etag": tag}]}
    assert server.http.post(f"{base}/complete", json=parts, headers=authorization).is_success
    assert server.http.get(begun["access_url"]).content == picture


def test_an_upload_by_hand_needs_no_token(server: Server, picture: bytes) -> None:
    png = {"Content-Type": "image/png"}
    answer = server.http.post("/files/upload", content=picture, headers={**KEY, **png})
    assert server.http.get(answer.json()["access_url"]).content == picture
    for wrong in ({}, {"Authorization": f"{KEY['Authorization']}x"}, {"Authorization": "Bearer x"}):
        for path in ("/files/upload", "/files/upload/multipart"):
            refused = server.http.post(path, content=picture, headers={**wrong, **png})
            assert refused.status_code == 401


def test_an_upload_without_keys(tmp_path: Path, engine: Engine, picture: bytes) -> None:
    with serving(tmp_path, engine) as server:
        url = f"{server.url}/files/upload"
        for authorization in ({}, {"Authorization": "Key any:thing"}):
            headers = {"Content-Type": "image/png", **authorization}
            stored = server.http.post(url, content=picture, headers=headers).json()
            assert server.http.get(stored["access_url"]).content == picture
        form = server.http.post(url, files={"file": ("cat.png", picture, "image/png")})
        assert error(form) == (422, "unsupported_image_format")
        assert "--data-binary @FILE" in form.json()["detail"][0]["msg"]


def test_a_host_that_starts_with_rest_means_storage(server: Server) -> None:
    answer = server.http.post(
        "/storage/auth/token", headers={**KEY, "Host": f"rest.localhost:{server.port}"}
    )
    assert "token" in answer.json()


@pytest.mark.parametrize("path", ["upload/initiate", "upload/initiate-multipart", "auth/token"])
def test_a_key_is_needed(server: Server, path: str) -> None:
    assert server.http.post(f"/rest/storage/{path}", json={}).status_code == 401


def test_tokens_are_for_one_file_and_one_use(server: Server, picture: bytes) -> None:
    mine, other = initiate(server), initiate(server)
    query = mine["upload_url"].partition("?")[2]
    stolen = f"{other['upload_url'].partition('?')[0]}?{query}"
    assert server.http.put(stolen, content=picture).status_code == 403
    assert server.http.put(mine["upload_url"] + "x", content=picture).status_code == 401
    cdn = {"Authorization": f"Bearer {query.removeprefix('token=')}"}
    assert server.http.post("/files/upload", content=picture, headers=cdn).status_code == 401


def test_too_large(server: Server) -> None:
    urls = initiate(server)
    assert error(server.http.put(urls["upload_url"], content=b"x" * (LIMIT + 1))) == (
        413,
        "file_too_large",
    )

    def chunks() -> Iterator[bytes]:  # no Content-Length
        for _ in range(3):
            yield b"x" * (LIMIT // 2)

    assert error(server.http.put(urls["upload_url"], content=chunks())) == (413, "file_too_large")
    multipart = initiate(server, "initiate-multipart")
    path, _, query = multipart["upload_url"].partition("?")
    half = b"x" * (LIMIT // 2 + 1)
    for _ in range(2):  # the same part again takes the place of the first
        assert server.http.put(f"{path}/1?{query}", content=half).is_success
    second = server.http.put(f"{path}/2?{query}", content=half)
    assert error(second) == (413, "file_too_large")
    assert not [path for path in (server.home / "files").iterdir() if path.suffix == ".part"]


@pytest.mark.parametrize("kind", ["text/html", "image/svg+xml", "", "nonsense"])
def test_types_that_browsers_run_are_refused(server: Server, kind: str) -> None:
    body = {"content_type": kind, "file_name": "x"}
    answer = server.http.post("/rest/storage/upload/initiate", json=body, headers=KEY)
    assert error(answer) == (422, "unsupported_image_format")


def test_files_live_as_long_as_was_said(server: Server, picture: bytes) -> None:
    def lifetime(**headers: str) -> float:
        match = NAME.search(initiate(server, **headers)["file_url"])
        assert match is not None
        return int(match[1]) - time.time()

    name = "X-Fal-Object-Lifecycle-Preference"
    assert lifetime() == pytest.approx(86_400, abs=5)
    said = json.dumps({"expiration_duration_seconds": 60})
    assert lifetime(**{name: said}) == pytest.approx(60, abs=5)
    assert lifetime(**{"X-Fal-Object-Lifecycle": said}) == pytest.approx(60, abs=5)
    never = json.dumps({"expiration_duration_seconds": None})
    assert lifetime(**{name: never}) > 50 * 365 * 86_400
    brief = json.dumps({"expiration_duration_seconds": 1})
    urls = initiate(server, **{name: brief})
    server.http.put(urls["upload_url"], content=picture)
    time.sleep(1.1)
    assert server.http.get(urls["file_url"]).status_code == 404


@pytest.mark.parametrize(
    "value",
    [
        "soon",
        "[]",
        '{"expiration_duration_seconds": -1}',
        '{"initial_acl": {"default": "forbid"}}',
    ],
)
def test_lifetimes_that_cannot_be_honoured_are_refused(server: Server, value: str) -> None:
    headers = {**KEY, "X-Fal-Object-Lifecycle-Preference": value}
    answer = server.http.post("/rest/storage/upload/initiate", json={}, headers=headers)
    assert answer.status_code == 422
    loc = answer.json()["detail"][0]["loc"]
    assert loc[:2] == ["header", "X-Fal-Object-Lifecycle-Preference"]


def test_outputs_live_as_long_as_the_request_says(tmp_path: Path, engine: Engine) -> None:
    body = {"prompt": "x", "image_size": {"width": 64, "height": 64}}
    headers = {"X-Fal-Object-Lifecycle-Preference": '{"expiration_duration_seconds": 3600}'}
    with serving(tmp_path, engine) as server:
        answer = server.http.post("/fal-ai/z-image/turbo", json=body, headers=headers).json()
    match = NAME.search(answer["images"][0]["url"])
    assert match is not None and int(match[1]) - time.time() == pytest.approx(3600, abs=60)


def test_an_upload_is_ours_under_any_name_of_the_host(server: Server, picture: bytes) -> None:
    """A name is enough to read by, so it is enough here, and nothing is asked over the network."""
    urls = initiate(server)
    server.http.put(urls["upload_url"], content=picture)
    alias = f"https://zimage.invalid/files/{urls['file_url'].rpartition('/')[2]}"
    body = {"prompt": "x", "image_url": alias, "image_size": {"width": 64, "height": 64}}
    assert server.http.post(I2I, json=body, headers=KEY).status_code == 200
