"""A request's log as its owner reads it, in fal's form."""

from __future__ import annotations

from datetime import UTC, datetime

from schemas.task import Progress


def log_entry(message: str) -> dict[str, object]:
    return {
        "message": message,
        "level": "INFO",
        "source": "USER",
        "timestamp": datetime.now(UTC).isoformat(),
        "labels": {},
    }


def progress_message(progress: Progress) -> str:
    return f"image {progress.image}/{progress.images}: step {progress.step}/{progress.steps}"
