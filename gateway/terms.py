"""How a caller wants a request handled: fal's request headers and query parameters, read once.

Values that cannot be honoured are refused with a 422 naming the header; fal's headers that have no
meaning here (`X-Fal-Runner-Hint`, `x-app-fal-disable-fallback`, `X-Fal-Tags`) are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from httpx2 import InvalidURL
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from gateway.files import FOREVER
from gateway.guarded import Unusable, checked_url
from gateway.jobs import Terms
from schemas.errors import ValidationFailed

TRUE = ("1", "true", "yes", "on")


class _Headers(BaseModel):
    timeout: Annotated[float | None, Field(alias="X-Fal-Request-Timeout", gt=0.1, le=604_800)] = (
        None
    )
    priority: Annotated[Literal["normal", "low"], Field(alias="X-Fal-Queue-Priority")] = "normal"
    no_retry: Annotated[str, Field(alias="X-Fal-No-Retry")] = ""
    store_io: Annotated[str, Field(alias="X-Fal-Store-IO")] = ""
    idempotency_key: Annotated[
        str | None, Field(alias="Idempotency-Key", min_length=1, max_length=255)
    ] = None


_NAMES = [field.alias for field in _Headers.model_fields.values() if field.alias]


class _Acl(BaseModel):
    default: Literal["allow"] = "allow"


class _Lifecycle(BaseModel):
    expiration_duration_seconds: Annotated[float | None, Field(ge=1, le=FOREVER)] = None
    initial_acl: _Acl | None = None


def read_lifetime(headers: Mapping[str, str]) -> float | None:
    """Seconds that files are to be kept, FOREVER for `null`; None where nothing is said.

    fal's access rules can only be "allow" here: whoever has a file's URL may read it.
    """
    for name in ("X-Fal-Object-Lifecycle-Preference", "X-Fal-Object-Lifecycle"):
        if name in headers:
            try:
                lifecycle = _Lifecycle.model_validate_json(headers[name])
            except ValidationError as error:
                raise ValidationFailed(error, "header", name) from None
            if "expiration_duration_seconds" in lifecycle.model_fields_set:
                return lifecycle.expiration_duration_seconds or FOREVER
    return None


def plain_url(url: str) -> str:
    """A URL that a webhook may have. Raises ValueError."""
    try:
        checked_url(url)
    except (Unusable, InvalidURL):
        raise ValueError("not a plain http(s) URL") from None
    return url


class _Query(BaseModel):
    fal_max_queue_length: Annotated[int | None, Field(gt=0)] = None
    fal_webhook: Annotated[str, AfterValidator(plain_url)] | None = None


def read_terms(headers: Mapping[str, str], query: Mapping[str, str]) -> Terms:
    """Raises ValidationFailed, with `loc` ("header" | "query", name)."""
    given = {name: headers[name] for name in _NAMES if name in headers}
    try:
        known = _Headers.model_validate(given)
    except ValidationError as error:
        raise ValidationFailed(error, "header") from None
    try:
        asked = _Query.model_validate(dict(query))
    except ValidationError as error:
        raise ValidationFailed(error, "query") from None
    return Terms(
        start_timeout=known.timeout,
        low_priority=known.priority == "low",
        retry=known.no_retry.lower() not in TRUE,
        store=known.store_io != "0",
        max_queue_length=asked.fal_max_queue_length,
        idempotency_key=known.idempotency_key,
        webhook=asked.fal_webhook,
        file_lifetime=read_lifetime(headers),
    )
