"""The queue: submit, status, result, cancel, as queue.fal.run has them.

Follow-up URLs name the app (`owner/alias`); the full endpoint id and a trailing `/response` are
accepted too. A request is visible to the key that made it and to no other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.sse import EventSourceResponse

from gateway.accept import accept, authenticate, origin, platform
from gateway.direct import Handler
from gateway.middleware import QUEUE_PREFIX
from gateway.openapi import queue_operation, submit_operation
from gateway.platform import View
from gateway.responses import json_response, outcome_response, progress_body
from gateway.terms import TRUE
from schemas.endpoints import ENDPOINTS, Endpoint
from schemas.errors import ApiError

router = APIRouter(prefix=QUEUE_PREFIX)
POSTS: dict[str, Handler] = {}

IN_PROGRESS = {
    "detail": "Request is still in progress",
    "message": "Request is still in progress",
}


class NotFound(ApiError):
    """An id we do not know, or that belongs to another key: the answer is the same."""

    status = 404

    def body(self) -> dict[str, str]:
        return {"status": "NOT_FOUND", "message": "Request not found"}


def _add(endpoint: Endpoint) -> None:
    async def submit(request: Request) -> Response:
        job = await accept(request, endpoint)
        view = await platform(request).view(job.request_id)
        assert view is not None
        body = _body(request, View(job, view.position), logs=[])
        return json_response(body, headers={"x-fal-request-id": job.request_id})

    operation: dict[str, Any] = submit_operation(endpoint)
    router.add_api_route(f"/{endpoint.id}", submit, methods=["POST"], **operation)
    POSTS[f"{QUEUE_PREFIX}/{endpoint.id}"] = submit


for _endpoint in ENDPOINTS.values():
    _add(_endpoint)


@router.get("/{app:path}/requests/{request_id}/status", **queue_operation("status"))
async def status(request: Request, app: str, request_id: str) -> Response:
    view = await _view(request, app, request_id)
    body = _body(request, view, view.job.logs if _wants_logs(request) else [])
    code = 200 if view.job.status == "COMPLETED" else 202
    return json_response(body, code, {"x-fal-request-id": request_id})


async def _view(request: Request, app: str, request_id: str) -> View:
    """The caller's own request. Raises NotFound or Unauthorized."""
    key_id = authenticate(request)
    view = await platform(request).view(request_id)
    if view is None or view.job.key_id != key_id:
        raise NotFound
    if app not in (view.job.endpoint, ENDPOINTS[view.job.endpoint].app):
        raise NotFound
    return view


@router.get(
    "/{app:path}/requests/{request_id}/status/stream",
    response_class=EventSourceResponse,
    **queue_operation("stream"),
)
async def status_stream(
    request: Request, response: Response, view: Annotated[View, Depends(_view)]
) -> AsyncIterator[dict[str, Any]]:
    """One event for every change; each carries only the logs that are new."""
    request_id = view.job.request_id
    response.headers["x-fal-request-id"] = request_id
    sent, last = 0, None
    async for now in platform(request).watch(request_id):
        logs = now.job.logs if _wants_logs(request) else []
        if len(logs) < sent:  # interrupted, and begun anew
            sent = 0
        body = _body(request, now, logs[sent:])
        sent = len(logs)
        if body != last:
            yield body
        last = {**body, "logs": []} if "logs" in body else body


@router.get("/{app:path}/requests/{request_id}/response", include_in_schema=False)
@router.get("/{app:path}/requests/{request_id}", **queue_operation("result"))
async def result(request: Request, app: str, request_id: str) -> Response:
    view = await _view(request, app, request_id)
    headers = {"x-fal-request-id": request_id}
    if view.job.status != "COMPLETED":
        return json_response(IN_PROGRESS, 400, headers)
    outcome = await platform(request).outcome(request_id)
    if outcome is None:
        raise NotFound
    return outcome_response(request_id, outcome)


@router.put("/{app:path}/requests/{request_id}/cancel", **queue_operation("cancel"))
async def cancel(request: Request, app: str, request_id: str) -> Response:
    await _view(request, app, request_id)
    headers = {"x-fal-request-id": request_id}
    if await platform(request).cancel(request_id):
        return json_response({"status": "CANCELLATION_REQUESTED"}, 202, headers)
    return json_response({"status": "ALREADY_COMPLETED"}, 400, headers)


def _wants_logs(request: Request) -> bool:
    return request.query_params.get("logs", "").lower() in TRUE


def _body(request: Request, view: View, logs: list[dict[str, object]]) -> dict[str, Any]:
    job = view.job
    prefix = "" if request.scope.get("queue_host") else QUEUE_PREFIX
    app = ENDPOINTS[job.endpoint].app
    url = f"{origin(request)}{prefix}/{app}/requests/{job.request_id}"
    body: dict[str, Any] = {
        "status": job.status,
        "request_id": job.request_id,
        "response_url": url,
        "status_url": f"{url}/status",
        "cancel_url": f"{url}/cancel",
    }
    if job.status == "IN_QUEUE":
        body["queue_position"] = view.position or 0
    else:
        body["logs"], body["metrics"] = logs, {}
    if view.progress is not None:
        body["progress"] = progress_body(view.progress)
    if job.outcome is not None:
        if job.outcome.inference_time is not None:
            body["metrics"]["inference_time"] = job.outcome.inference_time
        if job.outcome.error is not None:
            body["error"], body["error_type"] = job.outcome.error, job.outcome.error_type
    return body
