"""Answers: outcomes, errors and plain JSON as HTTP responses with fal's headers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import Response

from gateway.jobs import Outcome
from schemas.errors import ApiError, StartTimeout
from schemas.task import Progress

PLAN_HEADER = "x-zimage-acceleration"
"""The level, and what it meant on the device that drew: "regular: lean forward, compiled"."""


def json_response(
    body: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    content = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return Response(content, status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    headers = {"x-fal-error-type": error.error_type} if error.error_type else {}
    if error.status == 429:
        headers["x-fal-needs-retry"] = "1"
    return json_response(error.body(), error.status, headers)


def outcome_response(request_id: str, outcome: Outcome) -> Response:
    """The model's own status, body and headers."""
    headers = {
        "x-fal-request-id": request_id,
        "x-fal-billable-units": billable_units(outcome.units),
    }
    if outcome.plan:
        headers[PLAN_HEADER] = outcome.plan
    if outcome.error_type:
        headers["x-fal-error-type"] = outcome.error_type
    if outcome.error_type == StartTimeout.error_type:
        headers["x-fal-request-timeout-type"] = "user"
    return Response(outcome.body, outcome.status, headers, media_type="application/json")


def progress_body(progress: Progress) -> dict[str, float]:
    """step, steps, image, images, and the fraction 0…1 of all of them."""
    return {**asdict(progress), "fraction": round(progress.fraction, 4)}


def billable_units(units: float) -> str:
    """fal's form: whole numbers plain, others with eight decimals."""
    return f"{units:.0f}" if units == int(units) else f"{units:.8f}"
