"""Pure ASGI middleware (Starlette's BaseHTTPMiddleware hides disconnects from what it wraps)."""

from __future__ import annotations

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from schemas.endpoints import ENDPOINTS

QUEUE_PREFIX = "/queue"
_OWNERS = tuple({f"/{endpoint.app}/" for endpoint in ENDPOINTS.values()})


class FalHeaders:
    """Every answer carries x-fal-request-id, and x-fal-billable-units, 0 unless a route says more."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("x-fal-request-id", str(uuid.uuid4()))
                headers.setdefault("x-fal-billable-units", "0")
            await send(message)

        return await self.app(scope, receive, send_with_headers)


class QueueHost:
    """A Host that starts with `queue.` means the queue: its endpoint paths get the queue's prefix."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] == "http"
            and scope["path"].startswith(_OWNERS)
            and Headers(scope=scope).get("host", "").lower().startswith("queue.")
        ):
            scope = {**scope, "path": QUEUE_PREFIX + scope["path"], "queue_host": True}
        return await self.app(scope, receive, send)
