"""The public keys with which receivers verify our webhooks."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response

from gateway.accept import platform
from gateway.responses import json_response

router = APIRouter(include_in_schema=False)


@router.get("/.well-known/jwks.json")
@router.get("/rest/.well-known/jwks.json")
async def jwks(request: Request) -> Response:
    signer = platform(request).signer
    keys = signer.jwks(time.time()) if signer else {"keys": []}
    return json_response(keys, headers={"cache-control": "public, max-age=3600"})
