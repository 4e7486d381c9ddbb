"""`/health`: the process answers. `/ready`: it would start a request now."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from gateway.accept import platform
from gateway.responses import json_response

router = APIRouter(tags=["health"])

_OPEN: dict[str, Any] = {"security": []}


@router.get("/", include_in_schema=False)
async def root() -> Response:
    return RedirectResponse("/docs")


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="The process answers", openapi_extra=_OPEN)
async def health() -> Response:
    return json_response({"status": "ok"})


@router.head("/ready", include_in_schema=False)
@router.get("/ready", summary="A request would start now", openapi_extra=_OPEN)
async def ready(request: Request) -> Response:
    if await platform(request).ready():
        return json_response({"status": "ready"})
    return json_response({"status": "starting"}, 503)
