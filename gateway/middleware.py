"""Pure ASGI middleware (Starlette's BaseHTTPMiddleware hides disconnects from what it wraps)."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.ids import new_id
from schemas.endpoints import ENDPOINTS

QUEUE_PREFIX = "/queue"
REST_PREFIX = "/rest"
PROXY_PATH = "/proxy"
_OWNERS = tuple({f"/{endpoint.app}/" for endpoint in ENDPOINTS.values()})

_REST = ("/storage/", "/tokens/")
_TARGETS = {
    "fal.run": ("", _OWNERS),
    "queue.fal.run": (QUEUE_PREFIX, _OWNERS),
    "rest.fal.ai": (REST_PREFIX, _REST),
    "rest.alpha.fal.ai": (REST_PREFIX, _REST),
}
"""fal's host → the prefix of its services here, and what their paths begin with."""


class FalHeaders:
    """Every answer carries x-fal-request-id, and x-fal-billable-units, 0 unless a route says more."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in message["headers"]}
                if b"x-fal-request-id" not in names:
                    message["headers"].append((b"x-fal-request-id", new_id().encode()))
                if b"x-fal-billable-units" not in names:
                    message["headers"].append((b"x-fal-billable-units", b"0"))
            await send(message)

        return await self.app(scope, receive, send_with_headers)


class FalHosts:
    """A Host that starts with `queue.` or `rest.` means that service: its paths get its prefix."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope.get("proxied"):
            host, path = Headers(scope=scope).get("host", "").lower(), scope["path"]
            if host.startswith("queue.") and path.startswith(_OWNERS):
                scope = {**scope, "path": QUEUE_PREFIX + path, "queue_host": True}
            elif host.startswith("rest.") and path.startswith(_REST):
                scope = {**scope, "path": REST_PREFIX + path}
        return await self.app(scope, receive, send)


class Proxy:
    """`/proxy` with `x-fal-target-url`, for the `proxyUrl` of fal's JavaScript client.

    The target's host, path and query choose one of our own routes; nothing is ever forwarded.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PROXY_PATH:
            return await self.app(scope, receive, send)
        local = self._local(Headers(scope=scope).get("x-fal-target-url", ""))
        if local is None:
            message = "x-fal-target-url must be a URL of fal.run, queue.fal.run or rest.fal.ai"
            body = {"detail": "Invalid request", "message": message}
            return await JSONResponse(body, 400)(scope, receive, send)
        path, query = local
        chosen = {"path": unquote(path), "raw_path": path.encode(), "query_string": query.encode()}
        return await self.app({**scope, **chosen, "proxied": True}, receive, send)

    def _local(self, target: str) -> tuple[str, str] | None:
        """Path and query of ours for a URL of fal's; None for any other."""
        try:
            url = urlsplit(target)
            prefix, starts = _TARGETS[url.netloc.lower()]
        except (ValueError, KeyError):
            return None
        if url.scheme != "https" or not url.path.startswith(starts) or not target.isascii():
            return None
        return prefix + url.path, url.query
