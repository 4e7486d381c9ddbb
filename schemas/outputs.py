"""Response bodies: the pictures of a request, and the queue's own messages."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class ImageFile(BaseModel):
    """One generated picture."""

    url: str = Field(description="The URL where the file can be downloaded from, or a data URI.")
    content_type: str = Field(description="The mime type of the file.")
    file_name: str = Field(description="The name of the file.")
    file_size: int = Field(description="The size of the file in bytes.")
    width: int = Field(description="The width of the image in pixels.")
    height: int = Field(description="The height of the image in pixels.")


class ImagesOutput(BaseModel):
    """Output of every Z-Image endpoint."""

    images: list[ImageFile] = Field(description="The generated image files info.")
    timings: dict[str, float] = Field(description="Seconds spent, in all and per stage.")
    seed: int = Field(
        description="Seed of the first generated image; image k was generated with seed + k."
    )
    has_nsfw_concepts: list[bool] = Field(
        description="Whether the generated images contain NSFW concepts."
    )
    prompt: str = Field(description="The prompt used for generating the image.")


class LogEntry(BaseModel):
    message: str
    level: Literal["STDERR", "STDOUT", "ERROR", "INFO", "WARN", "DEBUG"] = "INFO"
    source: str = "USER"
    timestamp: str
    labels: dict[str, str] = {}


class QueueStatus(BaseModel):
    """State of a queued request. A failed request is COMPLETED with `error` and `error_type`."""

    status: Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    request_id: str
    response_url: str
    status_url: str
    cancel_url: str
    queue_position: int | None = None
    logs: list[LogEntry] | None = None
    metrics: dict[str, float] | None = None
    progress: dict[str, Any] | None = Field(
        None, description="While denoising: step, steps, image, images and fraction (0…1)."
    )
    error: str | None = None
    error_type: str | None = None


class CancelStatus(BaseModel):
    status: Literal["CANCELLATION_REQUESTED", "ALREADY_COMPLETED", "NOT_FOUND"]


class FieldError(BaseModel):
    loc: list[str | int]
    msg: str
    type: str
    url: str | None = None
    ctx: dict[str, Any] | None = None
    input: Any = None


class ValidationErrorBody(BaseModel):
    detail: list[FieldError]
    message: str = Field(description="The same as a sentence.")


class ServiceErrorBody(BaseModel):
    detail: str
    error_type: str | None = None
    message: str = Field(description="The same as `detail`.")
