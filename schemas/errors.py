"""Errors of the domain, raised once with field, type and context, rendered once at the door.

Two shapes, both fal's (https://docs.fal.ai/errors):
* `InputError` and pydantic's own ValidationError → 422 `{"detail": [{loc, msg, type, url, ctx, input}]}`
* `ServiceError` → `{"detail": "text", "error_type": "…"}` with the header `X-Fal-Error-Type`

Both carry a `message` of ours besides, a sentence, which fal's JavaScript client and the AI SDK show
instead of a bare "Unprocessable Entity". Programs act on `type` and `ctx`; `msg` is for people. Never
carries a stack trace or a path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

DOCUMENTED_TYPES = frozenset(
    {
        "internal_server_error",
        "generation_timeout",
        "downstream_service_error",
        "downstream_service_unavailable",
        "content_policy_violation",
        "no_media_generated",
        "image_too_small",
        "image_too_large",
        "image_load_error",
        "file_download_error",
        "file_too_large",
        "unsupported_image_format",
        "greater_than",
        "greater_than_equal",
        "less_than",
        "less_than_equal",
        "multiple_of",
        "sequence_too_short",
        "sequence_too_long",
        "one_of",
        "feature_not_supported",
        "value_error",
        "input_value_error",
    }
)
"""Types with an entry at https://docs.fal.ai/errors; only these get a `url`."""

_MAX_ECHO = 256
"""Characters of a caller's value that an error repeats: data URIs are megabytes."""

Loc = tuple[str | int, ...]


class ApiError(Exception):
    """An answer that is not a picture: an HTTP status and fal's JSON body for it."""

    status: int = 500
    error_type: str | None = None

    def body(self) -> dict[str, Any]:
        raise NotImplementedError


class InputError(ApiError):
    """A request we understand and refuse: 422 naming the field. `loc` starts with "body"."""

    status = 422

    def __init__(
        self,
        loc: Loc,
        msg: str,
        type: str,
        *,
        ctx: Mapping[str, Any] | None = None,
        input: Any = None,
    ) -> None:
        super().__init__(f"{'.'.join(map(str, loc))}: {msg}")
        self.detail = [error_detail(loc, msg, type, ctx=ctx, input=input)]

    @classmethod
    def of_detail(cls, detail: dict[str, Any]) -> InputError:
        """An error that was rendered in another process."""
        error = cls(detail["loc"], detail["msg"], detail["type"])
        error.detail = [detail]
        return error

    def body(self) -> dict[str, Any]:
        return {"detail": self.detail, "message": field_message(self.detail)}


def body_too_large(what: str, limit: int, advice: str = "") -> InputError:
    """A request body of more than `limit` bytes: 413."""
    message = f"{what} exceeds the maximum of {limit} bytes{advice}"
    error = InputError(("body",), message, "file_too_large", ctx={"max_size": limit})
    error.status = 413
    return error


class ValidationFailed(InputError):
    """pydantic's errors for the body, or another part of a request, rendered in fal's shape."""

    def __init__(self, error: ValidationError, *part: str) -> None:
        self.detail = [
            error_detail(
                (*(part or ("body",)), *item["loc"]),
                item["msg"],
                item["type"],
                ctx=item.get("ctx"),
                input=item.get("input"),
            )
            for item in error.errors(include_url=False)
        ]
        Exception.__init__(self, field_message(self.detail))


class ServiceError(ApiError):
    """The service, not the input: `error_type` is one of fal's infrastructure types."""

    def __init__(self, status: int, detail: str, error_type: str) -> None:
        super().__init__(detail)
        self.status, self.detail, self.error_type = status, detail, error_type

    def body(self) -> dict[str, Any]:
        return {"detail": self.detail, "error_type": self.error_type, "message": self.detail}


class StartTimeout(ServiceError):
    """The request had not begun when the caller's X-Fal-Request-Timeout was over."""

    error_type = "request_timeout"

    def __init__(self) -> None:
        super().__init__(504, "Request timed out", self.error_type)


class QueueFull(ServiceError):
    """As many requests wait as the caller's fal_max_queue_length allows."""

    def __init__(self, length: int) -> None:
        super().__init__(
            429, f"Queue is full: {length} requests are waiting", "concurrent_requests_limit"
        )


class Cancelled(ServiceError):
    """The client asked for the request to stop."""

    def __init__(self) -> None:
        super().__init__(499, "Request was cancelled by the client", "client_cancelled")


def field_message(detail: Sequence[Mapping[str, Any]]) -> str:
    """ "strength: Input should be less than or equal to 1; prompt: Field required"."""
    return "; ".join(
        f"{'.'.join(map(str, entry['loc'][1:])) or entry['loc'][0]}: {entry['msg']}"
        for entry in detail
    )


def internal_error() -> ServiceError:
    """What a caller learns of a bug of ours: nothing but that it was one."""
    return ServiceError(500, "Internal Server Error", "internal_error")


def error_detail(
    loc: Sequence[str | int],
    msg: str,
    type: str,
    *,
    ctx: Mapping[str, Any] | None = None,
    input: Any = None,
) -> dict[str, Any]:
    """One entry of `detail`. Union tags ("<…>") leave `loc`; long inputs are cut, objects left out."""
    detail: dict[str, Any] = {
        "loc": [part for part in loc if not str(part).startswith("<")],
        "msg": msg,
        "type": type,
    }
    if type in DOCUMENTED_TYPES:
        detail["url"] = f"https://docs.fal.ai/errors#{type}"
    if ctx:
        detail["ctx"] = {key: _plain(value) for key, value in ctx.items()}
    if (echo := _echo(input)) is not None:
        detail["input"] = echo
    return detail


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, list, type(None))) else str(value)


def _echo(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= _MAX_ECHO else value[:_MAX_ECHO] + "…"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # NaN is not JSON
    if isinstance(value, (int, float)):
        return value
    return None
