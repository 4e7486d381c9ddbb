"""`POST /{endpoint id}`: run now. The same durable job as in the queue, and a wait for it.

A caller that disconnects loses nothing: the job goes on and its result is in the queue under its id.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from gateway.accept import accept, platform
from gateway.direct import Handler
from gateway.jobs import Outcome
from gateway.openapi import run_operation
from gateway.responses import outcome_response
from schemas.endpoints import ENDPOINTS, Endpoint
from schemas.errors import ServiceError

router = APIRouter()
POSTS: dict[str, Handler] = {}


def _add(endpoint: Endpoint) -> None:
    async def run(request: Request) -> Response:
        job = await accept(request, endpoint)
        try:
            outcome = await platform(request).wait(job.request_id)
        except asyncio.CancelledError:  # the server stops; the job runs again when it starts
            outcome = Outcome.of_error(
                ServiceError(503, "The server stops; the request goes on", "runner_disconnected")
            )
        return outcome_response(job.request_id, outcome)

    operation: dict[str, Any] = run_operation(endpoint)
    router.add_api_route(f"/{endpoint.id}", run, methods=["POST"], **operation)
    POSTS[f"/{endpoint.id}"] = run


for _endpoint in ENDPOINTS.values():
    _add(_endpoint)
