"""The fetcher against a table of hostile URLs, a fake resolver and a misbehaving server."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import httpcore2
import pytest

from gateway.addresses import Address, Network, is_public
from gateway.fetch import Fetcher
from gateway.guarded import GuardedBackend, resolve
from media.decode import MAX_BYTES, decode
from schemas.errors import InputError

CASES = json.loads((Path(__file__).parent.parent / "cases" / "ssrf.json").read_text())
LOOPBACK = (ip_network("127.0.0.0/8"),)


class Reached(Exception):
    """The guard let a connection through to here."""


class Fake:
    """A resolver that answers from a table, and literals as the system does."""

    def __init__(self, answers: Sequence[str] | None) -> None:
        self._answers = answers

    async def __call__(self, host: str, port: int) -> list[Address]:
        if self._answers is not None:
            return [ip_address(answer) for answer in self._answers]
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        return [ip_address(sockaddr[0]) for *_, sockaddr in infos]


def fetch(url: str, answers: Sequence[str] | None = None) -> str:
    """'block' if the fetcher refused, 'allow' if it would have connected."""

    async def connect(*args: Any, **kwargs: Any) -> httpcore2.AsyncNetworkStream:
        raise Reached

    async def attempt() -> str:
        fetcher = Fetcher(resolve=Fake(answers), seconds=2)
        backend = fetcher._pool._network_backend
        assert isinstance(backend, GuardedBackend)
        backend._inner.connect_tcp = connect  # type: ignore[method-assign]
        try:
            await fetcher(url)
        except Reached:
            return "allow"
        except InputError as error:
            (detail,) = error.detail
            if detail["type"] == "file_download_error":
                assert detail["msg"] == "File download error"  # and nothing about why
                return "block"
            return "decode_error"
        finally:
            await fetcher.close()
        return "fetched"

    return asyncio.run(attempt())


PLAIN = [case for case in CASES if "kind" not in case and "build" not in case]


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case["why"])
def test_table(case: dict[str, Any]) -> None:
    outcome = fetch(case["url"], case.get("dns"))
    if case["expect"] == "decode_error" and outcome == "fetched":
        with pytest.raises(InputError):  # a well-formed data URI of something else
            decode(asyncio.run(Fetcher()(case["url"])))
        return
    if case["expect"] == "either":
        assert outcome in ("allow", "block")
    else:
        assert outcome == case["expect"]


def test_a_huge_data_uri_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base64, "b64decode", lambda *a, **k: pytest.fail("decoded"))
    assert fetch("data:image/png;base64," + "A" * (64 << 20)) == "decode_error"


@pytest.mark.parametrize("payload", [b"", b"hello", bytes(range(256))])
def test_data_uris(payload: bytes) -> None:
    async def read(uri: str) -> bytes:
        return await Fetcher()(uri)

    encoded = base64.b64encode(payload).decode()
    assert asyncio.run(read(f"data:image/png;base64,{encoded}")) == payload
    assert asyncio.run(read(f"DATA:;BASE64,{encoded.rstrip('=')}")) == payload
    quoted = "".join(f"%{byte:02x}" for byte in payload)
    assert asyncio.run(read(f"data:image/png,{quoted}")) == payload


@pytest.mark.parametrize("payload", ["ä", "@@@", "A", "AA=A", "AAAA!"])
def test_what_is_not_base64_is_refused(payload: str) -> None:
    assert fetch(f"data:image/png;base64,{payload}") == "decode_error"


def test_base64_of_every_kind() -> None:
    async def read(uri: str) -> bytes:
        return await Fetcher()(uri)

    data = bytes(range(256))
    for text in (
        base64.urlsafe_b64encode(data).decode(),
        base64.encodebytes(data).decode(),
        base64.b64encode(data).decode().replace("+", "%2B"),
    ):
        assert asyncio.run(read(f"data:;base64,{text}")) == data


class Misbehaving(BaseHTTPRequestHandler):
    """One path per misdeed."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        location = next((c["location"] for c in REDIRECTS if c["url"].endswith(self.path)), None)
        if self.path == "/once":
            self.redirect("/picture")
        elif self.path.startswith("/hops/"):
            hops = int(self.path.removeprefix("/hops/"))
            self.redirect(f"/hops/{hops - 1}" if hops > 1 else "/picture")
        elif location is not None:
            self.redirect(location.replace("http://redirector.test", ""))
        elif self.path == "/endless":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
            for _ in range(2 * MAX_BYTES // 0x10000):
                self.wfile.write(chunk)
        elif self.path == "/lying-length":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"short")
            self.close_connection = True
        elif self.path == "/gzip-bomb":
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path == "/slow-headers":
            for _ in range(40):
                self.wfile.write(b"x")
                self.wfile.flush()
                threading.Event().wait(0.1)
        elif self.path == "/many-headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            for k in range(100_000):
                self.wfile.write(b"X-%d: y\r\n" % k)
            self.end_headers()
        elif self.path == "/html":
            self.answer(b"<html>", "text/html")
        elif self.path == "/gone":
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.answer(b"picture", "image/png")

    def redirect(self, location: str) -> None:
        self.send_response(302)
        self.send_header("Location", location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, body: bytes, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            super().handle()


REDIRECTS = [case for case in CASES if case.get("kind") == "redirect"]
BODIES = [case for case in CASES if case.get("kind") == "body"]


@contextmanager
def listening() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def origin() -> Iterator[str]:
    with listening() as origin:
        yield origin


def fetched(
    url: str, allow: Sequence[Network] = LOOPBACK, seconds: float = 2.0
) -> bytes | dict[str, Any]:
    """The bytes, or the error's detail."""

    async def attempt() -> bytes | dict[str, Any]:
        fetcher = Fetcher(allow, seconds=seconds)
        try:
            return await fetcher(url)
        except InputError as error:
            return dict(error.detail[0])
        finally:
            await fetcher.close()

    return asyncio.run(attempt())


def test_networks_the_operator_named_are_reached_on_any_port(origin: str) -> None:
    assert fetched(f"{origin}/picture") == b"picture"
    assert fetched(f"{origin}/picture", allow=())["type"] == "file_download_error"  # type: ignore[index,call-overload]


def test_redirects_are_followed_up_to_five(origin: str) -> None:
    assert fetched(f"{origin}/once") == b"picture"
    assert fetched(f"{origin}/hops/5") == b"picture"
    assert fetched(f"{origin}/hops/6")["type"] == "file_download_error"  # type: ignore[index,call-overload]


@pytest.mark.parametrize("case", REDIRECTS, ids=lambda case: case["why"])
def test_every_redirect_is_checked_again(case: dict[str, Any], origin: str) -> None:
    """The first hop is allowed by its exact address; what it points to is not."""
    path = case["url"].removeprefix("http://redirector.test")

    async def first_hop_only(host: str, port: int) -> Sequence[Address]:
        if host == "redirector.test":
            return [ip_address("127.0.0.1")]
        if host == "rebind.example.test":
            return [ip_address("127.0.0.2")]
        return await resolve(host, port)

    async def attempt() -> dict[str, Any]:
        fetcher = Fetcher((ip_network("127.0.0.1/32"),), first_hop_only, seconds=2)
        try:
            await fetcher(f"http://redirector.test:{port}{path}")
        except InputError as error:
            return dict(error.detail[0])
        finally:
            await fetcher.close()
        raise AssertionError("fetched")

    port = int(origin.rsplit(":", 1)[1])
    assert asyncio.run(attempt())["type"] == "file_download_error"


@pytest.mark.parametrize("case", BODIES, ids=lambda case: case["why"])
def test_bodies(case: dict[str, Any], origin: str) -> None:
    outcome = fetched(origin + case["url"].removeprefix("http://bodyserver.test"))
    if case["url"].endswith("/html"):
        assert isinstance(outcome, bytes)
        with pytest.raises(InputError):
            decode(outcome)
    else:
        assert isinstance(outcome, dict)
        assert outcome["type"] in ("file_download_error", "file_too_large")


def test_an_error_status_is_an_error(origin: str) -> None:
    detail = fetched(f"{origin}/gone")
    assert isinstance(detail, dict)
    assert (detail["type"], detail["input"]) == ("file_download_error", f"{origin}/gone")
    assert detail["loc"] == ["body", "image_url"]


def test_a_closed_port_answers_like_a_refused_one(origin: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    closed = fetched(f"http://127.0.0.1:{port}/")
    refused = fetched(f"http://10.0.0.1:{port}/")
    assert isinstance(closed, dict) and isinstance(refused, dict)
    assert {**closed, "input": ""} == {**refused, "input": ""}


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:4700::1111", True),
        ("64:ff9b::5db8:d822", True),  # NAT64 of a public address
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::a9fe:a9fe", False),
        ("100.64.0.1", False),
        ("168.63.129.16", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("2002:a9fe:a9fe::1", False),
        ("fe80::1%eth0", False),
    ],
)
def test_addresses(address: str, public: bool) -> None:
    assert is_public(ip_address(address)) is public
