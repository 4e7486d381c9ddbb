"""From an HTTP request to an accepted job: who asks, for what, and is it valid.

Everything that can be refused without the input picture is refused here, before a job exists.
"""

from __future__ import annotations

import asyncio
import re
import time

from fastapi import Request
from starlette.requests import HTTPConnection

from gateway.auth import ANONYMOUS, Keys, Unauthorized
from gateway.ids import new_id
from gateway.inputs import parse
from gateway.jobs import Job, Terms
from gateway.platform import Platform
from gateway.settings import Settings
from gateway.terms import read_terms
from schemas.endpoints import Endpoint
from schemas.errors import InputError, ServiceError, body_too_large

MAX_BODY = 32 * 1024 * 1024
"""Bytes: a data URI of the largest accepted picture, and room for the rest."""

_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")

_LARGE_BODY = 256 * 1024
"""Bodies from here on are parsed off the event loop."""


async def accept(request: Request, endpoint: Endpoint) -> Job:
    """Authenticate, validate, record. Raises Unauthorized, InputError or QueueFull; then there is no
    job. The job is an earlier one if the caller's Idempotency-Key says so."""
    key_id = authenticate(request, endpoint)
    if "fal_webhook" in request.query_params and platform(request).signer is None:
        raise InputError(
            ("query", "fal_webhook"),
            "Webhooks need a signing key: ZIMAGE_WEBHOOK_KEY in the deployment's secret",
            "feature_not_supported",
        )
    terms = read_terms(request.headers, request.query_params)
    return await accept_body(request, endpoint, key_id, await read_body(request, MAX_BODY), terms)


async def accept_body(
    connection: HTTPConnection, endpoint: Endpoint, key_id: str, body: bytes, terms: Terms
) -> Job:
    """Validate and record, for a caller who is known. Raises ServiceError, InputError or QueueFull."""
    settings: Settings = connection.app.state.settings
    if endpoint.variant not in settings.variants:
        raise ServiceError(
            404,
            f"This deployment does not serve {endpoint.id}: it has no weights for it, see "
            f"ZIMAGE_{endpoint.variant.upper()}_WEIGHTS",
            "not_found",
        )
    if len(body) < _LARGE_BODY:
        parse(endpoint, body)
    else:
        await asyncio.to_thread(parse, endpoint, body)
    job = Job(new_id(), endpoint.id, key_id, origin(connection), time.time(), terms)
    return await platform(connection).submit(job, body)


def authenticate(connection: HTTPConnection, endpoint: Endpoint | None = None) -> str:
    """The id of the caller's key. Raises Unauthorized.

    A browser without a key may show a token for the endpoint's app instead, `?fal_jwt_token=…`.
    """
    keys: Keys | None = connection.app.state.keys
    if keys is None:
        return ANONYMOUS
    token = connection.query_params.get("fal_jwt_token")
    if endpoint is not None and token and "authorization" not in connection.headers:
        claims = platform(connection).tokens.read(token, "realtime")
        if endpoint.app.rpartition("/")[2] not in claims["apps"]:
            raise Unauthorized("The token is for another app")
        return str(claims["sub"])
    return keys.check(connection.headers.get("authorization"))


def platform(connection: HTTPConnection) -> Platform:
    result: Platform = connection.app.state.platform
    return result


def origin(connection: HTTPConnection) -> str:
    """Scheme and host under which the caller reaches us. Raises ServiceError for a malformed Host."""
    settings: Settings = connection.app.state.settings
    if settings.public_url:
        return settings.public_url
    host = connection.headers.get("host", "")
    if not _HOST.fullmatch(host):
        raise ServiceError(400, "Malformed Host header", "bad_request")
    given = connection.scope["scheme"]
    scheme = {"ws": "http", "wss": "https"}.get(given, given)
    return f"{scheme}://{host}"


async def read_body(request: Request, limit: int) -> bytes:
    """Raises InputError, with status 413, for more than `limit` bytes."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise body_too_large("Request body", limit, "; use a URL instead")
    return bytes(body)
