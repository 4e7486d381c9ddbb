"""`POST /{endpoint id}`: run now. The same durable job as in the queue, and a wait for it.

A caller that disconnects loses nothing: the job goes on and its result is in the queue under its id.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from gateway.accept import accept, platform
from gateway.openapi import run_operation
from gateway.responses import outcome_response
from schemas.endpoints import ENDPOINTS, Endpoint

router = APIRouter()


def _add(endpoint: Endpoint) -> None:
    async def run(request: Request) -> Response:
        job = await accept(request, endpoint)
        outcome = await platform(request).wait(job.request_id)
        return outcome_response(job.request_id, outcome)

    operation: dict[str, Any] = run_operation(endpoint)
    router.add_api_route(f"/{endpoint.id}", run, methods=["POST"], **operation)


for _endpoint in ENDPOINTS.values():
    _add(_endpoint)
