"""Uploads, as rest.fal.ai and fal's CDN have them: pictures and weights for later requests.

The JavaScript client asks for an upload URL and PUTs to it; the Python client asks for a token and
POSTs to the CDN with it; whoever uploads by hand does that with a key. Both have a form in parts for
large files. What arrives is a file like any output: readable by whoever has its URL until it expires, and
usable as `image_url`.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TypeVar
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, ValidationError

from gateway.accept import authenticate, origin, platform, read_body
from gateway.files import CONTENT_TYPES, NAME, URL_PATH, TooLarge, new_name
from gateway.middleware import REST_PREFIX
from gateway.responses import json_response
from gateway.settings import Settings
from gateway.terms import read_lifetime
from gateway.tokens import Tokens
from schemas.errors import InputError, ServiceError, ValidationFailed, body_too_large

UPLOAD_SECONDS = 3600.0
MAX_PARTS = 10_000
MAX_MESSAGE = 1 << 20

_SUFFIXES = {**{kind: suffix for suffix, kind in CONTENT_TYPES.items()}, "image/jpg": "jpeg"}
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
"""What curl sends unless it is told otherwise."""

_STORAGE = f"{REST_PREFIX}/storage"

router = APIRouter(tags=["storage"], include_in_schema=False)


Model = TypeVar("Model", bound=BaseModel)


class Initiate(BaseModel):
    content_type: str = "application/octet-stream"
    file_name: str = ""


class Part(BaseModel):
    part_number: int = Field(alias="partNumber", ge=1, le=MAX_PARTS)


class Complete(BaseModel):
    parts: list[Part] = Field(min_length=1, max_length=MAX_PARTS)


@router.post(_STORAGE + "/upload/initiate")
async def initiate(request: Request) -> Response:
    return await _initiate(request, "files")


@router.post(_STORAGE + "/upload/initiate-multipart")
async def initiate_multipart(request: Request) -> Response:
    return await _initiate(request, "multipart")


async def _initiate(request: Request, kind: str) -> Response:
    key_id = authenticate(request)
    asked = await _read(request, Initiate)
    name = _name(request, asked.content_type, ("body", "content_type"))
    token = _tokens(request).issue("upload", key_id, UPLOAD_SECONDS, file=name)
    home = origin(request)
    return json_response(
        {
            "upload_url": f"{home}{_STORAGE}/{kind}/{name}?token={quote(token)}",
            "file_url": f"{home}{URL_PATH}{name}",
        }
    )


@router.put(_STORAGE + "/files/{name}")
async def put(request: Request, name: str) -> Response:
    _check_upload(request, name)
    await _store(request, name)
    return Response(status_code=200)


@router.put(_STORAGE + "/multipart/{name}/{number}")
async def put_part(request: Request, name: str, number: int) -> Response:
    _check_upload(request, name)
    return await _store_part(request, name, number)


@router.post(_STORAGE + "/multipart/{name}/complete")
async def complete(request: Request, name: str) -> Response:
    _check_upload(request, name)
    return await _join(request, name)


@router.post(_STORAGE + "/auth/token")
async def cdn_token(request: Request) -> Response:
    token = _tokens(request).issue("cdn", authenticate(request), UPLOAD_SECONDS)
    expires = datetime.now(UTC) + timedelta(seconds=UPLOAD_SECONDS)
    return json_response(
        {
            "token": token,
            "token_type": "Bearer",
            "base_url": origin(request),
            "expires_at": expires.isoformat(),
        }
    )


@router.post(URL_PATH + "upload")
async def cdn_upload(request: Request) -> Response:
    _uploader(request)
    name = _name(request, _content_type(request), ("header", "Content-Type"))
    await _store(request, name)
    return json_response({"access_url": f"{origin(request)}{URL_PATH}{name}"})


@router.post(URL_PATH + "upload/multipart")
async def cdn_multipart(request: Request) -> Response:
    key_id = _uploader(request)
    name = _name(request, _content_type(request), ("header", "Content-Type"))
    token = _tokens(request).issue("upload", key_id, UPLOAD_SECONDS, file=name)
    return json_response({"access_url": f"{origin(request)}{URL_PATH}{name}", "uploadId": token})


@router.put(URL_PATH + "{name}/multipart/{upload_id}/{number}")
async def cdn_put_part(request: Request, name: str, upload_id: str, number: int) -> Response:
    _check_upload(request, name, upload_id)
    return await _store_part(request, name, number)


@router.post(URL_PATH + "{name}/multipart/{upload_id}/complete")
async def cdn_complete(request: Request, name: str, upload_id: str) -> Response:
    _check_upload(request, name, upload_id)
    return await _join(request, name)


def _tokens(request: Request) -> Tokens:
    tokens: Tokens = platform(request).tokens
    return tokens


def _check_upload(request: Request, name: str, token: str | None = None) -> None:
    """Raises Unauthorized unless the token is for this very file."""
    claims = _tokens(request).read(token or request.query_params.get("token", ""), "upload")
    if claims.get("file") != name or not NAME.fullmatch(name):
        raise ServiceError(403, "The token is for another file", "bad_request")


def _uploader(request: Request) -> str:
    """The key id behind a CDN token, or behind a key that somebody sends without asking for a token first.

    Raises Unauthorized.
    """
    credentials = request.headers.get("authorization", "").rpartition(" ")[2]
    if request.app.state.keys is None or not credentials or ":" in credentials:
        return authenticate(request)
    return str(_tokens(request).read(credentials, "cdn")["sub"])


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "application/octet-stream")


def _name(request: Request, content_type: str, loc: tuple[str, str]) -> str:
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in _SUFFIXES:
        hint = ". Send the file itself, no form: curl --data-binary @FILE -H 'Content-Type: …'"
        raise InputError(
            loc,
            f"Files of this type are not stored; known are {', '.join(sorted(_SUFFIXES))}"
            f"{hint if kind in _FORMS else ''}",
            "unsupported_image_format",
            ctx={"supported_formats": sorted(_SUFFIXES)},
            input=content_type,
        )
    settings: Settings = request.app.state.settings
    lifetime = read_lifetime(request.headers)
    return new_name(_SUFFIXES[kind], settings.retention if lifetime is None else lifetime)


async def _store(request: Request, name: str) -> None:
    limit = _limit(request)
    try:
        await platform(request).files.write(name, request.stream(), limit)
    except TooLarge:
        raise body_too_large("File", limit) from None


async def _store_part(request: Request, name: str, number: int) -> Response:
    if not 1 <= number <= MAX_PARTS:
        raise InputError(("path", "number"), f"Parts are numbered 1 to {MAX_PARTS}", "value_error")
    limit = _limit(request)
    try:
        size = await platform(request).files.write_part(name, number, request.stream(), limit)
    except TooLarge:
        raise body_too_large("File", limit) from None
    etag = f'"{number}-{size}"'
    return json_response({"partNumber": number, "etag": etag}, headers={"ETag": etag})


async def _join(request: Request, name: str) -> Response:
    asked = await _read(request, Complete)
    numbers = sorted({part.part_number for part in asked.parts})
    limit = _limit(request)
    try:
        await platform(request).files.join(name, numbers, limit)
    except FileNotFoundError:
        raise InputError(("body", "parts"), "A part has not been uploaded", "value_error") from None
    except TooLarge:
        raise body_too_large("File", limit) from None
    return json_response({"access_url": f"{origin(request)}{URL_PATH}{name}"})


def _limit(request: Request) -> int:
    """Bytes an upload may have. Raises InputError early for one that says it has more."""
    settings: Settings = request.app.state.settings
    length = request.headers.get("content-length", "")
    if re.fullmatch(r"\d+", length) and int(length) > settings.upload_max:
        raise body_too_large("File", settings.upload_max)
    return settings.upload_max


async def _read(request: Request, model: type[Model]) -> Model:
    body = await read_body(request, MAX_MESSAGE)
    try:
        return model.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise ValidationFailed(error) from None
