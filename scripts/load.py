"""Load from a process of its own: clients that keep their connections and ask again when answered.

    python scripts/load.py URL CLIENTS SECONDS < BODY

Prints the number of requests, per second, and milliseconds p50 and p99, as JSON. Any status but 200 ends it.
Reads as little of HTTP as will do (Content-Length, no chunks), so that the server is the bottleneck.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from typing import cast
from urllib.parse import urlsplit

import uvloop


class Client(asyncio.Protocol):
    """Sends `request`, waits for the answer, and so on until `end`; then sets `done`."""

    transport: asyncio.Transport

    def __init__(self, request: bytes, end: float, seconds: list[float]) -> None:
        self.request, self.end, self.seconds = request, end, seconds
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.ask()

    def ask(self) -> None:
        self.answer = b""
        self.started = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.answer += data
        head, found, body = self.answer.partition(b"\r\n\r\n")
        if not found:
            return
        if not head.startswith(b"HTTP/1.1 200 "):
            self.done.set_exception(SystemExit(head.decode()))
            self.transport.close()
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) < length:
            return
        now = time.perf_counter()
        self.seconds.append(now - self.started)
        if now < self.end:
            self.ask()
        else:
            self.done.set_result(None)
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionResetError("closed by the server"))


async def load(url: str, clients: int, duration: float, body: bytes) -> dict[str, float]:
    parts = urlsplit(url)
    request = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    seconds: list[float] = []
    began = time.perf_counter()
    loop = asyncio.get_running_loop()
    assert parts.hostname and parts.port
    running = []
    for _ in range(clients):
        _, client = await loop.create_connection(
            lambda: Client(request, began + duration, seconds), parts.hostname, parts.port
        )
        running.append(client.done)
    await asyncio.gather(*running)
    took = time.perf_counter() - began
    seconds.sort()
    return {
        "requests": len(seconds),
        "requests/s": len(seconds) / took,
        "p50 ms": statistics.median(seconds) * 1e3,
        "p99 ms": seconds[int(len(seconds) * 0.99)] * 1e3,
    }


if __name__ == "__main__":
    url, clients, duration = sys.argv[1:]
    result = uvloop.run(load(url, int(clients), float(duration), sys.stdin.buffer.read()))
    print(json.dumps(result))
