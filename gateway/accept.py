"""From an HTTP request to an accepted job: who asks, for what, and is it valid.

Everything that can be refused without the input picture is refused here, before a job exists.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid

from fastapi import Request

from gateway.auth import ANONYMOUS, Keys
from gateway.jobs import Job
from gateway.perform import parse
from gateway.platform import Platform
from gateway.settings import Settings
from schemas.endpoints import Endpoint
from schemas.errors import InputError, ServiceError

MAX_BODY = 32 * 1024 * 1024
"""Bytes: a data URI of the largest accepted picture, and room for the rest."""

_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")

_LARGE_BODY = 256 * 1024
"""Bodies from here on are parsed off the event loop."""


async def accept(request: Request, endpoint: Endpoint) -> Job:
    """Authenticate, validate, record. Raises Unauthorized or InputError; then there is no job."""
    key_id = authenticate(request)
    if "fal_webhook" in request.query_params:
        raise InputError(
            ("query", "fal_webhook"),
            "Webhooks are not supported by this deployment yet",
            "feature_not_supported",
        )
    body = await _body(request)
    if len(body) < _LARGE_BODY:
        parse(endpoint, body)
    else:
        await asyncio.to_thread(parse, endpoint, body)
    job = Job(str(uuid.uuid4()), endpoint.id, key_id, origin(request), time.time())
    await platform(request).submit(job, body)
    return job


def authenticate(request: Request) -> str:
    """The id of the caller's key. Raises Unauthorized."""
    keys: Keys | None = request.app.state.keys
    if keys is None:
        return ANONYMOUS
    return keys.check(request.headers.get("authorization"))


def platform(request: Request) -> Platform:
    result: Platform = request.app.state.platform
    return result


def origin(request: Request) -> str:
    """Scheme and host under which the caller reaches us. Raises ServiceError for a malformed Host."""
    settings: Settings = request.app.state.settings
    if settings.public_url:
        return settings.public_url
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        raise ServiceError(400, "Malformed Host header", "bad_request")
    return f"{request.url.scheme}://{host}"


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            error = InputError(
                ("body",),
                f"Request body exceeds the maximum of {MAX_BODY} bytes; use a URL instead",
                "file_too_large",
                ctx={"max_size": MAX_BODY},
            )
            error.status = 413
            raise error
    return bytes(body)
