"""Connections to URLs that strangers wrote: input pictures, webhooks.

Against server-side request forgery every connection, redirects included, goes through `GuardedBackend`:
one look-up, every answer checked, and the connection made to a checked address, so that nothing can
change in between. TLS is still verified for the name.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import ip_address
from typing import Any

import httpcore2
import httpx2

from gateway.addresses import Address, Network, allowed, within

PORTS = (80, 443)
MAX_URL = 8192
_REFUSED_SUFFIXES = (".internal", ".local", ".localhost", ".localdomain", ".arpa")

_LOOKUPS = ThreadPoolExecutor(32, thread_name_prefix="lookup")
"""As many as there are downloads. A look-up cannot be cancelled; slow ones must not take threads that
others need."""

Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]


UNREACHABLE = (
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
    httpcore2.UnsupportedProtocol,
    httpcore2.TimeoutException,
    TimeoutError,
)
"""What goes wrong with somebody else's server."""


class Refused(httpcore2.ConnectError):
    """A destination the fetcher does not talk to. The reason is for our log only."""


async def resolve(host: str, port: int, threads: ThreadPoolExecutor = _LOOKUPS) -> list[Address]:
    """All addresses of a name, by the system's resolver."""
    lookup = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    answers = await asyncio.get_running_loop().run_in_executor(threads, lookup)
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


def guarded_pool(
    exceptions: Sequence[Network], resolve: Resolve, connections: int
) -> httpcore2.AsyncConnectionPool:
    """A pool whose connections all pass the guard."""
    return httpcore2.AsyncConnectionPool(
        ssl_context=httpx2.create_ssl_context(trust_env=False),
        max_connections=connections,
        max_keepalive_connections=0,  # a kept connection would skip the look-up
        network_backend=GuardedBackend(exceptions, resolve),
    )


class Unusable(Exception):
    """An answer that is not a file; the reason is for our log only."""


def checked_url(url: str) -> httpx2.URL:
    """Parse; refuse what browsers and we might read differently, credentials, and odd ports early."""
    if len(url) > MAX_URL or "\\" in url or not url.isprintable():
        raise Unusable("malformed URL")
    parsed = httpx2.URL(url)
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo:
        raise Unusable("not a plain http(s) URL")
    if parsed.port is not None and not 0 < parsed.port < 65536:
        raise Unusable("not a port")
    return parsed


def wire(url: httpx2.URL) -> httpcore2.URL:
    """Part by part, so that no second parser gets to see the string differently."""
    return httpcore2.URL(
        scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
    )
