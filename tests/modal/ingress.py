"""Modal's front door: real HTTP and WebSocket connections become calls of a web function.

The function's input is the ASGI scope; its messages travel as two streams of the call, in and out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import modal  # noqa: F401  (modal_proto must not be imported first)
from aiohttp import WSMsgType, web
from modal._serialization import deserialize_data_format, serialize
from modal_proto import api_pb2 as api

if TYPE_CHECKING:
    from tests.modal.cloud import Call, Cloud


class Ingress:
    """Answers everything, in front of one function."""

    def __init__(self, cloud: Cloud, function: str) -> None:
        self._cloud, self._function = cloud, function

    async def handle(self, request: web.Request) -> web.StreamResponse:
        socket = request.headers.get("Upgrade", "").lower() == "websocket"
        call = await self._cloud.enqueue(self._function, _pickled(((_scope(request, socket),), {})))
        incoming = self._messages(call)
        if socket:
            return await self._websocket(request, call, incoming)
        body = await request.read()
        await self._send(call, {"type": "http.request", "body": body, "more_body": False})
        response = web.StreamResponse()
        try:
            async for message in incoming:
                if message["type"] == "http.response.start":
                    response.set_status(message["status"])
                    for name, value in message["headers"]:
                        response.headers.add(name.decode(), value.decode())
                    await response.prepare(request)
                elif message["type"] == "http.response.body":
                    await response.write(message.get("body", b""))
                    if not message.get("more_body"):
                        break
        except (ConnectionError, asyncio.CancelledError):
            await self._send(call, {"type": "http.disconnect"})
            raise
        if not response.prepared:  # the function failed before it answered
            return web.Response(status=500, text="modal-http: internal error")
        return response

    async def _websocket(
        self, request: web.Request, call: Call, incoming: AsyncIterator[Any]
    ) -> web.StreamResponse:
        await self._send(call, {"type": "websocket.connect"})
        first = await anext(incoming)
        if first["type"] != "websocket.accept":
            return web.Response(status=403)
        socket = web.WebSocketResponse()
        await socket.prepare(request)

        async def outwards() -> None:
            async for message in incoming:
                if message["type"] == "websocket.close":
                    await socket.close(code=message["code"])
                elif message.get("bytes") is not None:
                    await socket.send_bytes(message["bytes"])
                else:
                    await socket.send_str(message["text"])

        sending = asyncio.create_task(outwards())
        async for message in socket:
            kind = "bytes" if message.type == WSMsgType.BINARY else "text"
            await self._send(call, {"type": "websocket.receive", kind: message.data})
        await self._send(call, {"type": "websocket.disconnect", "code": socket.close_code or 1005})
        sending.cancel()
        return socket

    async def _send(self, call: Call, message: dict[str, Any]) -> None:
        given, index = _pickled(message), len(call.streams["in"]) + 1
        chunk = api.DataChunk(data=given.args, data_format=given.data_format, index=index)
        await self._cloud.put(call.id, "in", [chunk])

    async def _messages(self, call: Call) -> AsyncIterator[Any]:
        async for chunk in self._cloud.read(call.id, "out"):
            data = self._cloud.blobs[chunk.data_blob_id] if chunk.data_blob_id else chunk.data
            yield deserialize_data_format(data, chunk.data_format, None)


def _pickled(value: Any) -> api.FunctionInput:
    return api.FunctionInput(args=serialize(value), data_format=api.DATA_FORMAT_PICKLE)


def _scope(request: web.Request, socket: bool) -> dict[str, Any]:
    scheme = request.scheme
    kind: dict[str, Any] = {"type": "http", "method": request.method, "scheme": scheme}
    if socket:
        kind = {"type": "websocket", "scheme": scheme.replace("http", "ws"), "subprotocols": []}
    return {
        **kind,
        "http_version": "1.1",
        "path": request.path,
        "query_string": request.rel_url.raw_query_string.encode(),
        "headers": [(name.lower(), value) for name, value in request.raw_headers],
        "client": ("127.0.0.1", 1),
    }
