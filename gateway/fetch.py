"""Input pictures: from data URIs and from URLs that strangers wrote.

Against server-side request forgery every connection, redirects included, goes through `GuardedBackend`:
one look-up, every answer checked, and the connection made to a checked address, so that nothing can
change in between. TLS is still verified for the name. Errors say no more than "could not be
downloaded": what the network behind the server looks like is nobody's business.

Bounds: MAX_BYTES of body, FETCH_SECONDS in all, MAX_REDIRECTS, ports 80 and 443.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import ip_address
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import httpcore2
import httpx2

from gateway.addresses import Address, Network, allowed, within
from media.decode import MAX_BYTES, file_too_large
from schemas.errors import InputError, Loc

FETCH_SECONDS = 20.0
MAX_REDIRECTS = 5
PORTS = (80, 443)
_REFUSED_SUFFIXES = (".internal", ".local", ".localhost", ".localdomain", ".arpa")
MAX_URL = 8192
_SMALL_URI = 256 * 1024
"""Characters decoded in less time than a thread takes to start."""
_URL_SAFE = str.maketrans("-_", "+/")
_HEADERS: dict[bytes | str, bytes | str] = {
    "User-Agent": "zimage-endpoint (image fetcher)",
    "Accept": "image/*,*/*;q=0.8",
    "Accept-Encoding": "identity",
}

_LOOKUPS = ThreadPoolExecutor(8, thread_name_prefix="lookup")
"""A look-up cannot be cancelled; slow ones must not take threads that others need."""

logger = logging.getLogger(__name__)

Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]


class Refused(httpcore2.ConnectError):
    """A destination the fetcher does not talk to. The reason is for our log only."""


async def resolve(host: str, port: int) -> list[Address]:
    """All addresses of a name, by the system's resolver."""
    lookup = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    answers = await asyncio.get_running_loop().run_in_executor(_LOOKUPS, lookup)
    return [ip_address(sockaddr[0]) for *_, sockaddr in answers]


class GuardedBackend(httpcore2.AsyncNetworkBackend):
    """Connects to checked addresses only. A name with one refused address is refused whole."""

    def __init__(self, exceptions: Sequence[Network], resolve: Resolve) -> None:
        self._exceptions, self._resolve = exceptions, resolve
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        if host.rstrip(".").lower().endswith(_REFUSED_SUFFIXES):
            raise Refused(f"{host} is a name of private networks")
        try:
            addresses = await self._resolve(host, port)
        except (OSError, ValueError) as error:
            raise httpcore2.ConnectError(str(error)) from error
        for address in addresses:
            if not allowed(address, self._exceptions):
                raise Refused(f"{address} is not a public address; ZIMAGE_FETCH_ALLOW can allow it")
            if port not in PORTS and not within(address, self._exceptions):
                raise Refused(f"port {port} is neither 80 nor 443")
        if not addresses:
            raise httpcore2.ConnectError(f"{host} has no address")
        return await self._inner.connect_tcp(
            str(addresses[0]), port, timeout, local_address, socket_options
        )

    async def connect_unix_socket(self, *args: Any, **kwargs: Any) -> httpcore2.AsyncNetworkStream:
        raise Refused("unix socket")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Fetcher:
    """Downloads input pictures. `resolve` is the look-up, replaceable for tests."""

    def __init__(
        self,
        exceptions: Sequence[Network] = (),
        resolve: Resolve = resolve,
        seconds: float = FETCH_SECONDS,
    ) -> None:
        self._seconds = seconds
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=httpx2.create_ssl_context(trust_env=False),
            max_connections=32,
            max_keepalive_connections=0,  # a kept connection would skip the look-up
            network_backend=GuardedBackend(exceptions, resolve),
        )

    async def close(self) -> None:
        await self._pool.aclose()

    async def __call__(self, url: str, loc: Loc = ("body", "image_url")) -> bytes:
        """The bytes behind a data URI or an http(s) URL; `loc` names the field in errors.

        Raises InputError: file_download_error (input = the URL), file_too_large (ctx max_size), or
        image_load_error for a data URI that is not one.
        """
        if url[:5].lower() == "data:":
            if len(url) < _SMALL_URI:
                return from_data_uri(url, loc)
            return await asyncio.to_thread(from_data_uri, url, loc)
        try:
            async with asyncio.timeout(self._seconds):
                return await self._download(url, loc)
        except (
            httpcore2.NetworkError,
            httpcore2.ProtocolError,
            httpcore2.UnsupportedProtocol,
            httpcore2.TimeoutException,
            TimeoutError,
            httpx2.InvalidURL,
            _Unusable,
        ) as error:
            logger.info("fetch of %.200s failed: %s", url, error or type(error).__name__)
            raise InputError(loc, "File download error", "file_download_error", input=url) from None

    async def _download(self, url: str, loc: Loc) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            target = _checked_url(url)
            async with self._pool.stream(
                "GET", _wire(target), headers=_HEADERS, extensions={"timeout": self._timeouts}
            ) as response:
                headers = {name.lower(): value for name, value in response.headers}
                if response.status in (301, 302, 303, 307, 308) and b"location" in headers:
                    url = str(target.join(headers[b"location"].decode("latin-1")))
                    continue
                if response.status != 200:
                    raise _Unusable(f"status {response.status}")
                if headers.get(b"content-encoding", b"identity").lower() != b"identity":
                    raise _Unusable("compressed although asked not to")
                return await _read(response, loc)
        raise _Unusable("too many redirects")

    @property
    def _timeouts(self) -> dict[str, float]:
        return dict.fromkeys(("connect", "read", "write", "pool"), self._seconds)


class _Unusable(Exception):
    """An answer that is not a file; the reason is for our log only."""


def _checked_url(url: str) -> httpx2.URL:
    """Parse; refuse what browsers and we might read differently, credentials, and odd ports early."""
    if len(url) > MAX_URL or "\\" in url or not url.isprintable():
        raise _Unusable("malformed URL")
    parsed = httpx2.URL(url)
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo:
        raise _Unusable("not a plain http(s) URL")
    if parsed.port is not None and not 0 < parsed.port < 65536:
        raise _Unusable("not a port")
    return parsed


def _wire(url: httpx2.URL) -> httpcore2.URL:
    """Part by part, so that no second parser gets to see the string differently."""
    return httpcore2.URL(
        scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
    )


async def _read(response: httpcore2.Response, loc: Loc) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise file_too_large(loc)
    return bytes(body)


def from_data_uri(uri: str, loc: Loc) -> bytes:
    """The payload of a `data:` URI, base64 or percent-encoded. Raises InputError."""
    header, comma, payload = uri.partition(",")
    if not comma:
        raise InputError(loc, "Image load error: a data URI needs a comma", "image_load_error")
    if not header.lower().endswith(";base64"):
        data = unquote_to_bytes(payload[: 3 * MAX_BYTES + 1])
    elif len(payload) > MAX_BYTES * 4 // 3 + 4:
        raise file_too_large(loc)
    else:
        try:
            payload = "".join(unquote(payload).split()).translate(_URL_SAFE)
            data = base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
        except ValueError:
            raise InputError(loc, "Image load error: invalid base64", "image_load_error") from None
    if len(data) > MAX_BYTES:
        raise file_too_large(loc)
    return data
