"""OpenAPI: every endpoint with its schemas and examples.

Routes read bodies themselves (megabytes of data URI are parsed off the event loop), so what FastAPI
would derive from signatures is written down here, from the same models that do the validation.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gateway.files import CONTENT_TYPES
from schemas.endpoints import ENDPOINTS, Endpoint
from schemas.inputs import example
from schemas.outputs import (
    CancelStatus,
    ImagesOutput,
    QueueStatus,
    ServiceErrorBody,
    ValidationErrorBody,
)

_REF = "#/components/schemas/{model}"
_ANSWERS: tuple[type[BaseModel], ...] = (
    CancelStatus,
    ImagesOutput,
    QueueStatus,
    ServiceErrorBody,
    ValidationErrorBody,
)


def document(app: FastAPI) -> dict[str, Any]:
    """The application's OpenAPI document, made once."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title="Z-Image on your own account",
            version=app.version,
            description="fal's Z-Image API. Pictures are paid for in GPU seconds, to nobody else.",
            routes=app.routes,
        )
        inputs = [(endpoint.input, "validation") for endpoint in ENDPOINTS.values()]
        answers = [(model, "serialization") for model in _ANSWERS]
        _, definitions = models_json_schema([*inputs, *answers], ref_template=_REF)  # type: ignore[list-item]
        components = schema.setdefault("components", {})
        components.setdefault("schemas", {}).update(definitions["$defs"])
        components["securitySchemes"] = {
            "key": {
                "type": "apiKey",
                "in": "header",
                "name": "Authorization",
                "description": "`Key <id>:<secret>`",
            }
        }
        schema["security"] = [{"key": []}]
        app.openapi_schema = schema
    return app.openapi_schema


def run_operation(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "summary": endpoint.summary,
        "description": "Run now and wait for the pictures.",
        "tags": ["run"],
        "operation_id": f"run:{endpoint.id}",
        "openapi_extra": _request_body(endpoint),
        "responses": {200: _json("The pictures", ImagesOutput), **_errors()},
    }


def stream_operation(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "summary": f"{endpoint.summary} (as events)",
        "description": "Every step as a server-sent event; the last one is the output.",
        "tags": ["run"],
        "operation_id": f"stream:{endpoint.id}",
        "openapi_extra": _request_body(endpoint),
        "responses": {
            200: _events("Events; the last one's `data` is an ImagesOutput, or the error's body"),
            **_errors(),
        },
    }


def file_operation() -> dict[str, Any]:
    """Files need no key: whoever has the URL may read them."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {
        "summary": "A generated picture, or an uploaded file",
        "tags": ["files"],
        "response_class": Response,
        "responses": {
            200: {
                "description": "The file",
                "content": dict.fromkeys(CONTENT_TYPES.values(), binary),
            },
            404: _json("Unknown or expired", ServiceErrorBody),
        },
        "openapi_extra": {"security": []},
    }


def submit_operation(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "summary": f"{endpoint.summary} (queued)",
        "description": "Put into the queue; follow the returned URLs.",
        "tags": ["queue"],
        "operation_id": f"submit:{endpoint.id}",
        "openapi_extra": _request_body(endpoint),
        "responses": {200: _json("Accepted", QueueStatus), **_errors()},
    }


def queue_operation(kind: Literal["status", "stream", "result", "cancel"]) -> dict[str, Any]:
    """`app` is `owner/alias`, or a full endpoint id."""
    summary: str
    answers: dict[int | str, dict[str, Any]]
    match kind:
        case "status":
            summary = "State, position, progress and, with ?logs=1, logs of a request"
            answers = {
                200: _json("Finished", QueueStatus),
                202: _json("Not finished", QueueStatus),
            }
        case "stream":
            summary = "The same as server-sent events, one for every change, until it is COMPLETED"
            answers = {200: _events("Events whose `data` is a QueueStatus")}
        case "result":
            summary = "The output of a finished request, with the status the model answered"
            answers = {
                200: _json("The pictures", ImagesOutput),
                400: _json("Not finished", ServiceErrorBody),
                **_errors(),
                499: _json("Cancelled", ServiceErrorBody),
                500: _json("The request failed", ServiceErrorBody),
                503: _json("The request failed", ServiceErrorBody),
            }
        case "cancel":
            summary = "Stop a request: at once in the queue, between two steps when it runs"
            answers = {
                202: _json("It will stop", CancelStatus),
                400: _json("It was finished", CancelStatus),
            }
    missing = {404: _json("Unknown request", CancelStatus), 401: _errors()[401]}
    return {
        "summary": summary,
        "tags": ["queue"],
        "operation_id": f"queue:{kind}",
        "status_code": next(iter(answers)),
        "responses": {**answers, **missing},
    }


def _request_body(endpoint: Endpoint) -> dict[str, Any]:
    content = {
        "schema": {"$ref": _REF.format(model=endpoint.input.__name__)},
        "example": example(endpoint.input),
    }
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def _json(description: str, model: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _events(description: str) -> dict[str, Any]:
    data = {"type": "string", "contentMediaType": "application/json"}
    schema = {"type": "object", "properties": {"data": data}}
    return {"description": description, "content": {"text/event-stream": {"itemSchema": schema}}}


def _errors() -> dict[int | str, dict[str, Any]]:
    return {
        401: _json("Key missing or wrong", ServiceErrorBody),
        413: _json("Body too large", ValidationErrorBody),
        422: _json("Invalid input, naming the field", ValidationErrorBody),
    }
