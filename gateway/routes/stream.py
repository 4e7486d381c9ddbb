"""`POST /{endpoint id}/stream`: run now, as server-sent events: every step, then the output.

Events while it runs are `{"progress": {...}, "request_id": …}`; the last one is the model's output, or
its error's body. fal's clients hand on every event and resolve with the last.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from gateway.accept import accept, platform
from gateway.jobs import Job
from gateway.openapi import stream_operation
from gateway.responses import progress_body
from schemas.endpoints import ENDPOINTS

router = APIRouter()


async def _accepted(request: Request) -> Job:
    return await accept(request, ENDPOINTS[request.url.path.strip("/").removesuffix("/stream")])


async def stream(
    request: Request, response: Response, job: Annotated[Job, Depends(_accepted)]
) -> AsyncIterator[ServerSentEvent]:
    response.headers["x-fal-request-id"] = job.request_id
    last = None
    async for view in platform(request).watch(job.request_id):
        if view.progress is not None and view.progress != last:
            last = view.progress
            event = {"request_id": job.request_id, "progress": progress_body(last)}
            yield ServerSentEvent(data=event)
    outcome = await platform(request).outcome(job.request_id)
    if outcome is not None:
        yield ServerSentEvent(raw_data=outcome.body.decode())


for _endpoint in ENDPOINTS.values():
    _operation: dict[str, Any] = stream_operation(_endpoint)
    router.add_api_route(
        f"/{_endpoint.id}/stream",
        stream,
        methods=["POST"],
        response_class=EventSourceResponse,
        **_operation,
    )
