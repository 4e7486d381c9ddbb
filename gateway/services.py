"""What a request needs on its way from body to outcome, whatever the platform."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

from gateway.decoder import Decoder
from gateway.fetch import Fetcher
from gateway.files import Files
from gateway.loras import LoraStore
from schemas.task import Acceleration, Progress, Result, Task

OnProgress = Callable[[Progress], None]
OnLog = Callable[[str], None]


GenerateAsync = Callable[[Task, OnProgress], Awaitable[Result]]
"""Runs a Task somewhere; cancelling it stops the engine between two steps."""


@dataclass(slots=True)
class Services:
    """What a request needs on its way."""

    generate: GenerateAsync
    files: Files
    fetcher: Fetcher
    decoder: Decoder
    loras: LoraStore
    acceleration_default: Acceleration
    retention: float
    downloading: Callable[[], AbstractAsyncContextManager[None]] = nullcontext
    """Entered while a request waits for somebody else's server, so that others need not wait for it."""
    resume: Callable[[], Awaitable[tuple[Task, Result] | None]] | None = None
    """What the engine made of the job when it was performed before, and of which task."""
    transient: tuple[type[Exception], ...] = ()
    """Errors of the surroundings: raised, for the job to be performed again."""
