"""The one seam between the gateway and its surroundings: run a job durably, keep records and files.

`gateway.platforms.local` is a process with SQLite and an engine on a thread; `gateway.platforms.modal`
is functions, Dicts and Volumes. No other module knows which one it is talking to.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from gateway.files import Files
from gateway.jobs import Job, Outcome
from gateway.signing import Signer
from gateway.tokens import Tokens
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
    tokens: Tokens
    """Issued to those who cannot send a key."""
    signer: Signer | None
    """Signs webhooks; None where there are none."""

    async def submit(self, job: Job, body: bytes) -> Job:
        """Accept a job. When this returns, the job will complete, whatever is killed meanwhile.

        Returns the key's earlier job with the same Idempotency-Key, if there is one. Raises
        QueueFull, and InputError if that job was another request.
        """
        ...

    async def view(self, request_id: str) -> View | None:
        """State without the outcome's body; cheap, clients ask ten times a second."""
        ...

    def watch(self, request_id: str) -> AsyncIterator[View]:
        """The view now, and again whenever it may have changed; ends after COMPLETED."""
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
