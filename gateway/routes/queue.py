"""The queue: submit, status, result, cancel, as queue.fal.run has them.

Follow-up URLs name the app (`owner/alias`); the full endpoint id and a trailing `/response` are
accepted too. A request is visible to the key that made it and to no other.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from gateway.accept import accept, authenticate, origin, platform
from gateway.middleware import QUEUE_PREFIX
from gateway.openapi import queue_operation, submit_operation
from gateway.platform import View
from gateway.responses import json_response, outcome_response
from schemas.endpoints import ENDPOINTS, Endpoint
from schemas.errors import ApiError

router = APIRouter(prefix=QUEUE_PREFIX)

_TRUE = ("1", "true", "yes", "on")


class NotFound(ApiError):
    """An id we do not know, or that belongs to another key: the answer is the same."""

    status = 404

    def body(self) -> dict[str, str]:
        return {"status": "NOT_FOUND"}


def _add(endpoint: Endpoint) -> None:
    async def submit(request: Request) -> Response:
        job = await accept(request, endpoint)
        view = await platform(request).view(job.request_id)
        assert view is not None
        return _status(request, view, logs=False, submitted=True)

    operation: dict[str, Any] = submit_operation(endpoint)
    router.add_api_route(f"/{endpoint.id}", submit, methods=["POST"], **operation)


for _endpoint in ENDPOINTS.values():
    _add(_endpoint)


@router.get("/{app:path}/requests/{request_id}/status", **queue_operation("status"))
async def status(request: Request, app: str, request_id: str) -> Response:
    view = await _view(request, app, request_id)
    return _status(request, view, logs=request.query_params.get("logs", "").lower() in _TRUE)


@router.get("/{app:path}/requests/{request_id}/response", include_in_schema=False)
@router.get("/{app:path}/requests/{request_id}", **queue_operation("result"))
async def result(request: Request, app: str, request_id: str) -> Response:
    view = await _view(request, app, request_id)
    headers = {"x-fal-request-id": request_id}
    if view.job.status != "COMPLETED":
        return json_response({"detail": "Request is still in progress"}, 400, headers)
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


async def _view(request: Request, app: str, request_id: str) -> View:
    """The caller's own request. Raises NotFound or Unauthorized."""
    key_id = authenticate(request)
    view = await platform(request).view(request_id)
    if view is None or view.job.key_id != key_id:
        raise NotFound
    if app not in (view.job.endpoint, ENDPOINTS[view.job.endpoint].app):
        raise NotFound
    return view


def _status(request: Request, view: View, *, logs: bool, submitted: bool = False) -> Response:
    job = view.job
    prefix = "" if request.scope.get("queue_host") else QUEUE_PREFIX
    app = ENDPOINTS[job.endpoint].app
    url = f"{origin(request)}{prefix}/{app}/requests/{job.request_id}"
    body: dict[str, Any] = {
        "status": "IN_QUEUE" if submitted else job.status,
        "request_id": job.request_id,
        "response_url": url,
        "status_url": f"{url}/status",
        "cancel_url": f"{url}/cancel",
    }
    if body["status"] == "IN_QUEUE":
        body["queue_position"] = view.position or 0
    else:
        body["logs"] = job.logs if logs else []
        body["metrics"] = {}
    if view.progress is not None and not submitted:
        progress = view.progress
        body["progress"] = {
            "step": progress.step,
            "steps": progress.steps,
            "image": progress.image,
            "images": progress.images,
            "fraction": round(progress.fraction, 4),
        }
    if job.outcome is not None and not submitted:
        if job.outcome.inference_time is not None:
            body["metrics"]["inference_time"] = job.outcome.inference_time
        if job.outcome.error is not None:
            body["error"], body["error_type"] = job.outcome.error, job.outcome.error_type
    code = 200 if submitted or job.status == "COMPLETED" else 202
    return json_response(body, code, {"x-fal-request-id": job.request_id})
