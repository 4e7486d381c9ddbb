"""`GET /files/{name}`: outputs, readable by whoever has the URL."""

from __future__ import annotations

from fastapi import APIRouter, HTTPException, Request, Response

from gateway.accept import platform
from gateway.files import URL_PATH
from media.encode import CONTENT_TYPES

router = APIRouter()


@router.head(URL_PATH + "{name}", include_in_schema=False)
@router.get(URL_PATH + "{name}", summary="A generated picture", tags=["files"])
async def file(request: Request, name: str) -> Response:
    data = await platform(request).files.get(name)
    if data is None:
        raise HTTPException(404)
    content_type = next(t for f, t in CONTENT_TYPES.items() if name.endswith(f".{f}"))
    headers = {
        "Cache-Control": "private, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(data, headers=headers, media_type=content_type)
