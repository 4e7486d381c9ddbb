"""`/{endpoint id}/realtime`: a WebSocket that takes inputs and gives outputs, both in msgpack.

Made for inputs that change while somebody drags a slider: only the newest one that has arrived is
generated, older ones that were still waiting are dropped. Every input generated is a job like any other. Text
frames carry control messages in JSON, as fal's do.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgpack
from fastapi import APIRouter, Request, Response, WebSocket
from pydantic import BaseModel, Field, ValidationError
from starlette.websockets import WebSocketDisconnect, WebSocketState

from gateway.accept import accept_body, authenticate, platform, read_body
from gateway.auth import Unauthorized
from gateway.jobs import DEFAULT_TERMS
from gateway.middleware import REST_PREFIX
from gateway.responses import json_response
from schemas.endpoints import ENDPOINTS, Endpoint
from schemas.errors import ApiError, InputError, ValidationFailed

IDLE_SECONDS = 60.0
MAX_TOKEN_SECONDS = 3600

router = APIRouter(include_in_schema=False)


class TokenRequest(BaseModel):
    allowed_apps: list[str] = Field(min_length=1)
    token_expiration: int = Field(120, ge=1, le=MAX_TOKEN_SECONDS)


@router.post(REST_PREFIX + "/tokens/")
async def token(request: Request) -> Response:
    """A token that lets a browser open the realtime endpoints of some apps for a while."""
    key_id = authenticate(request)
    try:
        asked = TokenRequest.model_validate_json(await read_body(request, 1 << 16))
    except ValidationError as error:
        raise ValidationFailed(error) from None
    tokens = platform(request).tokens
    made = tokens.issue("realtime", key_id, asked.token_expiration, apps=asked.allowed_apps)
    return json_response(made, 201)


def _add(endpoint: Endpoint) -> None:
    async def realtime(socket: WebSocket) -> None:
        await socket.accept()
        try:
            key_id = authenticate(socket, endpoint)
        except Unauthorized:
            await socket.send_text(json.dumps({"status": "error", "error": "Unauthorized"}))
            return await socket.close(1008)
        newest = _Newest()
        reading = asyncio.create_task(_read(socket, newest))
        try:
            await _answer(socket, endpoint, key_id, newest)
        except WebSocketDisconnect:
            pass
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    router.add_api_websocket_route(f"/{endpoint.id}/realtime", realtime)


for _endpoint in ENDPOINTS.values():
    _add(_endpoint)


class _Newest:
    """The newest input that has arrived; None once no more will come."""

    def __init__(self) -> None:
        self._value: bytes | None = None
        self._arrived = asyncio.Event()
        self._closed = False

    def put(self, value: bytes) -> None:
        self._value = value
        self._arrived.set()

    def close(self) -> None:
        self._closed = True
        self._arrived.set()

    async def get(self) -> bytes | None:
        """Raises TimeoutError when nothing comes for IDLE_SECONDS."""
        await asyncio.wait_for(self._arrived.wait(), IDLE_SECONDS)
        value, self._value = self._value, None
        if not self._closed:
            self._arrived.clear()
        return value


async def _read(socket: WebSocket, newest: _Newest) -> None:
    try:
        while True:
            newest.put(await socket.receive_bytes())
    except (WebSocketDisconnect, KeyError):  # gone, or a text frame, of which we know none
        newest.close()


async def _answer(socket: WebSocket, endpoint: Endpoint, key_id: str, newest: _Newest) -> None:
    while True:
        try:
            frame = await newest.get()
        except TimeoutError:
            reason = "no inputs, reconnect when needed!"
            await _control(socket, "TIMEOUT", reason)
            return await socket.close(1000)
        if frame is None:
            return None
        try:
            body = json.dumps(_unpack(frame)).encode()
            job = await accept_body(socket, endpoint, key_id, body, DEFAULT_TERMS)
            outcome = await platform(socket).wait(job.request_id)
        except ApiError as error:
            await _control(socket, "INPUT_ERROR", str(error), error.body())
            continue
        answer = json.loads(outcome.body)
        if outcome.status == 200:
            await socket.send_bytes(msgpack.packb({**answer, "request_id": job.request_id}))
        else:
            await _control(socket, "REQUEST_ERROR", outcome.error or "", answer)


def _unpack(frame: bytes) -> Any:
    """Raises InputError for what is not msgpack, or has no form in JSON."""
    try:
        value = msgpack.unpackb(frame)
        json.dumps(value)
    except (ValueError, TypeError, msgpack.UnpackException):
        raise InputError(("body",), "Frames are msgpack maps", "value_error") from None
    return value


async def _control(socket: WebSocket, error: str, reason: str, body: Any = None) -> None:
    if socket.application_state is WebSocketState.CONNECTED:
        message = {"type": "x-fal-error", "error": error, "reason": reason}
        if body is not None:
            message["body"] = body
        await socket.send_text(json.dumps(message))
