"""The one seam between the gateway and its surroundings: run a job durably, keep records and files.

`gateway.platforms.local` is a process with SQLite and an engine on a thread; `gateway.platforms.modal`
is functions, Dicts and Volumes. No other module knows which one it is talking to.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from gateway.files import Files
from gateway.jobs import Job, Outcome
from schemas.task import Progress


@dataclass(frozen=True, slots=True)
class View:
    """A job as its owner may see it. position: requests ahead of it, None once it runs."""

    job: Job
    position: int | None = None
    progress: Progress | None = None


class Platform(AbstractAsyncContextManager["Platform"], Protocol):
    """Enter it to start its workers; leaving it stops them and loses nothing."""

    files: Files

    async def submit(self, job: Job, body: bytes) -> None:
        """Accept a job. When this returns, the job will complete, whatever is killed meanwhile."""
        ...

    async def view(self, request_id: str) -> View | None:
        """State without the outcome's body; cheap, clients ask ten times a second."""
        ...

    async def outcome(self, request_id: str) -> Outcome | None:
        """The finished outcome with its body; None while unfinished, unknown or expired."""
        ...

    async def wait(self, request_id: str) -> Outcome:
        """Block until the job is finished. The caller may stop waiting; the job goes on."""
        ...

    async def cancel(self, request_id: str) -> bool:
        """Ask a job to stop; False if it was finished already."""
        ...

    async def ready(self) -> bool:
        """Whether a job submitted now would start as soon as its turn comes."""
        ...
