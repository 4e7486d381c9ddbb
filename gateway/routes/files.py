"""`GET /files/{name}`: outputs, readable by whoever has the URL."""

from __future__ import annotations

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import StreamingResponse

from gateway.accept import platform
from gateway.files import CONTENT_TYPES, URL_PATH
from gateway.openapi import file_operation

router = APIRouter()


@router.head(URL_PATH + "{name}", include_in_schema=False)
@router.get(URL_PATH + "{name}", **file_operation())
async def file(request: Request, name: str) -> Response:
    chunks = await platform(request).files.stream(name)
    if chunks is None:
        raise HTTPException(404)
    content_type = CONTENT_TYPES[name.rpartition(".")[2]]
    headers = {
        "Cache-Control": "private, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
    }
    return StreamingResponse(chunks, headers=headers, media_type=content_type)
