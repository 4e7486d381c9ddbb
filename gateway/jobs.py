"""One request's life: IN_QUEUE → IN_PROGRESS → COMPLETED, in one small class with time passed in.

An interrupted job (killed process, preempted container) goes back to IN_QUEUE and runs again; after
MAX_ATTEMPTS of the engine it is COMPLETED with an error, so that a job that kills its process does so
only so often.
Failed and cancelled jobs are COMPLETED too, as fal has it: the outcome carries the error.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Literal

from schemas.errors import ApiError, InputError, ServiceError

MAX_ATTEMPTS = 3

UNKEPT_SECONDS = 600.0
"""How long a result that is not to be kept stays, for a client whose connection broke."""

Status = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]


@dataclass(frozen=True)  # no slots: pickled by name, for the next version of it to read
class Terms:
    """How the caller wants the request handled.

    start_timeout: seconds within which the request must have started, else it ends with a 504.
    low_priority: behind all requests of normal priority. retry: run again when its process died
    under it. store: keep its result as long as others'. max_queue_length: refuse with a 429 if as
    many are waiting. idempotency_key: a second request with it is the first one.
    webhook: where to POST the end of it. file_lifetime: seconds that its pictures are kept.
    """

    start_timeout: float | None = None
    low_priority: bool = False
    retry: bool = True
    store: bool = True
    max_queue_length: int | None = None
    idempotency_key: str | None = None
    webhook: str | None = None
    file_lifetime: float | None = None

    @property
    def max_attempts(self) -> int:
        """How often its process may die under it before it is given up."""
        return MAX_ATTEMPTS if self.retry else 1


DEFAULT_TERMS = Terms()


@dataclass(frozen=True)
class Outcome:
    """What a finished request answers: HTTP status, JSON body, billed units (megapixels).

    kept: False for `sync_mode`, whose pictures are not to stay in the request history.
    plan: what the acceleration meant on the engine's device.
    """

    status: int
    body: bytes
    units: float = 0.0
    error: str | None = None
    error_type: str | None = None
    inference_time: float | None = None
    kept: bool = True
    plan: str | None = None

    @classmethod
    def of_error(cls, error: ApiError) -> Outcome:
        """Failed requests cost nothing."""
        body = error.body()
        error_type = error.error_type
        if error_type is None and isinstance(body["detail"], list):
            error_type = body["detail"][0]["type"]
        return cls(error.status, json.dumps(body).encode(), 0.0, str(error), error_type)


class IllegalTransition(RuntimeError):
    """A bug of ours: a job was asked to do what its state does not allow."""


@dataclass
class Job:
    """Times are seconds since the epoch. `origin` is the scheme and host for URLs in the answer."""

    request_id: str
    endpoint: str
    key_id: str
    origin: str
    created: float
    terms: Terms = DEFAULT_TERMS
    status: Status = "IN_QUEUE"
    started: float | None = None
    finished: float | None = None
    attempts: int = 0
    outcome: Outcome | None = None
    logs: list[dict[str, object]] = field(default_factory=list)

    def start(self, now: float) -> None:
        self._expect("IN_QUEUE")
        self.status, self.started = "IN_PROGRESS", now
        self.logs = []

    def attempt(self) -> None:
        """The engine takes it on: from here on, a crash may be this job's fault."""
        self._expect("IN_PROGRESS")
        self.attempts += 1

    def finish(self, outcome: Outcome, now: float) -> None:
        self._expect("IN_PROGRESS")
        self.status, self.outcome, self.finished = "COMPLETED", outcome, now

    def interrupt(self, now: float) -> None:
        """The process that ran it is gone."""
        self._expect("IN_PROGRESS")
        if self.attempts >= self.terms.max_attempts:
            text = f"The runner disconnected {self.attempts} times"
            self.finish(Outcome.of_error(disconnected(text)), now)
        else:
            self.status, self.started = "IN_QUEUE", None

    def hand_back(self, attempted: bool) -> None:
        """The process that runs it stops in good order: nobody's fault, so no attempt."""
        self._expect("IN_PROGRESS")
        self.status, self.started = "IN_QUEUE", None
        self.attempts -= attempted

    @property
    def deadline(self) -> float | None:
        """Before when it is to start; None if its caller waits as long as it takes."""
        timeout = self.terms.start_timeout
        return None if timeout is None else self.created + timeout

    def overdue(self, now: float) -> bool:
        """Whether it should have started by now and has not."""
        return self.status == "IN_QUEUE" and self.deadline is not None and now >= self.deadline

    def forget_at(self, retention: float) -> float | None:
        """Until when a finished job is kept, as its caller and the operator want."""
        if self.finished is None or self.outcome is None:
            return None
        kept = self.outcome.kept and self.terms.store
        return self.finished + (retention if kept else UNKEPT_SECONDS)

    def drop(self, error: ApiError, now: float) -> None:
        """Stop before it began. A running job is stopped by whoever runs it, through `finish`."""
        self._expect("IN_QUEUE")
        self.status, self.finished = "COMPLETED", now
        self.outcome = Outcome.of_error(error)

    def _expect(self, status: Status) -> None:
        if self.status != status:
            raise IllegalTransition(f"{self.request_id} is {self.status}, not {status}")


def request_digest(job: Job, body: bytes) -> str:
    """Tells whether two requests with one Idempotency-Key are the same."""
    return hashlib.sha256(job.endpoint.encode() + b"\0" + body).hexdigest()


def disconnected(text: str = "The runner disconnected") -> ServiceError:
    """What ran the request is gone, for good."""
    return ServiceError(503, text, "runner_disconnected")


def key_reused() -> InputError:
    """An Idempotency-Key came with another request before."""
    loc = ("header", "Idempotency-Key")
    return InputError(loc, "The same key came with another request before", "value_error")
