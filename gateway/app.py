"""The gateway as an ASGI application: `create_app(settings, platform)`. Assembles, decides nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from gateway import openapi
from gateway.auth import Keys
from gateway.direct import Direct
from gateway.middleware import FalHeaders, FalHosts, Proxy
from gateway.platform import Platform
from gateway.responses import PLAN_HEADER, error_response, json_response
from gateway.routes import files, health, jwks, queue, realtime, run, storage, stream
from gateway.settings import Settings
from schemas.errors import ApiError, internal_error

logger = logging.getLogger(__name__)

BROWSERS: dict[str, Any] = {
    "allow_origins": ["*"],  # the key is in a header of the page's own, never in a cookie
    "allow_methods": ["GET", "POST", "PUT", "DELETE"],
    "allow_headers": ["*"],
    "expose_headers": [
        "x-fal-request-id",
        "x-fal-billable-units",
        "x-fal-error-type",
        "x-fal-request-timeout-type",
        "x-fal-needs-retry",
        PLAN_HEADER,
    ],
    "max_age": 86400,
}


def create_app(
    settings: Settings,
    platform: Platform,
    keys: Keys | None,
    beside: Coroutine[Any, Any, None] | None = None,
) -> ASGIApp:
    """`keys` None leaves authentication off; the composition roots decide whether that is allowed.
    `beside` runs while the platform does."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with platform:
            task = asyncio.create_task(beside) if beside else None
            try:
                yield
            finally:
                if task:
                    task.cancel()
                    await asyncio.wait([task])

    app = FastAPIOffline(redoc_url=None, title="Z-Image", version="0.1.0", lifespan=lifespan)
    app.state.settings, app.state.platform, app.state.keys = settings, platform, keys
    # Asked in this order: the busiest first.
    for module in (run, queue, files, stream, realtime, storage, jwks, health):
        app.include_router(module.router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    app.openapi = lambda: openapi.document(app)  # type: ignore[method-assign]
    # Outside of everything, so that no answer lacks their headers.
    direct = Direct(app, {**run.POSTS, **queue.POSTS}, _api_error, _unexpected)
    return CORSMiddleware(FalHeaders(Proxy(FalHosts(direct))), **BROWSERS)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    _log(request, error.status, error)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, in fal's wording."""
    assert isinstance(error, HTTPException)
    detail: Any = error.detail
    _log(request, error.status_code, detail)
    if error.status_code == 404:
        detail = f"Path {request.url.path} not found"
    return json_response({"detail": detail, "message": detail}, error.status_code, error.headers)


def _log(request: Request, status: int, reason: object) -> None:
    """What was refused, for whoever is wiring up a client."""
    logger.info("%s %r: %d %s", request.method, request.url.path, status, reason)


async def _unexpected(request: Request, error: Exception) -> Response:
    return error_response(internal_error())
