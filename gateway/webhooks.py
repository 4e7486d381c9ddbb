"""Webhooks: one signed POST when a request is finished, repeated until it is acknowledged.

At least once, with the request id as its identity: 2xx acknowledges, 3xx is a refusal (nobody is
redirected), everything else is tried again, ten times in all over two hours. What is due is in the
records, so that neither a killed server nor a dead receiver loses or delays anything. Receivers are
reached through the same guard as input pictures.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from weakref import WeakValueDictionary

import httpx2

from gateway.addresses import Network
from gateway.guarded import (
    UNREACHABLE,
    Refused,
    Resolve,
    Unusable,
    checked_url,
    guarded_pool,
    resolve,
    wire,
)
from gateway.jobs import Outcome
from gateway.signing import Signer

ATTEMPTS = 10
FIRST_DELAY = 14.0
"""Seconds before the second attempt, doubled for each further one: 14 · (2⁹ − 1) s are two hours."""

ATTEMPT_SECONDS = 15.0
AT_ONCE = 32
AT_ONCE_PER_RECEIVER = 4
"""Deliveries under way, so that a receiver that hangs holds up nobody's but its own."""

_resolve = partial(resolve, threads=ThreadPoolExecutor(8, thread_name_prefix="webhook-lookup"))
"""Not the pictures' threads: a receiver whose name is never answered must not hold those up."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)  # no slots: pickled by name
class Delivery:
    """A webhook that is due. attempts: how many were made before."""

    request_id: str
    user_id: str
    url: str
    attempts: int

    @property
    def receiver(self) -> str:
        """Host and port."""
        return httpx2.URL(self.url).netloc.decode()


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of one: the status or the error, and when to try again (None: never)."""

    answer: str
    delivered: bool
    again: float | None


def payload(request_id: str, outcome: Outcome) -> bytes:
    """fal's body: the model's output, or its error, as the caller would have got it."""
    message = {"request_id": request_id, "gateway_request_id": request_id}
    if outcome.status < 400:
        message["status"] = "OK"
    else:
        message |= {"status": "ERROR", "error": f"Invalid status code: {outcome.status}"}
    head = json.dumps(message, separators=(",", ":")).encode()
    return head[:-1] + b',"payload":' + outcome.body + b"}"


class Webhooks:
    """Delivers. `resolve` is the look-up, replaceable for tests."""

    def __init__(
        self, signer: Signer, exceptions: Sequence[Network] = (), resolve: Resolve = _resolve
    ) -> None:
        self._signer = signer
        self._pool = guarded_pool(exceptions, resolve, connections=AT_ONCE)
        self._places = asyncio.Semaphore(AT_ONCE)
        self._receiver_places = WeakValueDictionary[str, asyncio.Semaphore]()

    async def close(self) -> None:
        await self._pool.aclose()

    async def deliver(
        self, delivery: Delivery, load: Callable[[], Awaitable[Outcome | None]]
    ) -> Attempt:
        """One attempt. Never raises for what the receiver does. `load` reads the outcome, once it is
        this delivery's turn."""
        places = self._receiver_places.get(delivery.receiver)
        if places is None:
            places = asyncio.Semaphore(AT_ONCE_PER_RECEIVER)
            self._receiver_places[delivery.receiver] = places
        async with places, self._places:
            try:
                outcome = await load()
                if outcome is None:
                    return Attempt("the result is gone", False, None)
                answer, status = await self._post(delivery, payload(delivery.request_id, outcome))
            except Exception as error:  # a bug, a disk: an attempt like any other that failed
                logger.exception("webhook of %s failed", delivery.request_id)
                answer, status = type(error).__name__, None
        attempt = judged(answer, status, delivery.attempts + 1)
        logger.info(
            "webhook of %s, attempt %d: %s", delivery.request_id, delivery.attempts + 1, answer
        )
        return attempt

    async def _post(self, delivery: Delivery, body: bytes) -> tuple[str, int | None]:
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "User-Agent": "zimage-endpoint (webhook)",
            **self._signer.headers(delivery.request_id, delivery.user_id, body, time.time()),
        }
        try:
            async with asyncio.timeout(ATTEMPT_SECONDS):
                target = wire(checked_url(delivery.url))
                timeouts = dict.fromkeys(("connect", "read", "write", "pool"), ATTEMPT_SECONDS)
                async with self._pool.stream(
                    "POST",
                    target,
                    headers=list(headers.items()),
                    content=body,
                    extensions={"timeout": timeouts},
                ) as response:
                    return f"status {response.status}", response.status
        except Refused as error:
            return f"refused: {error}", None
        except (*UNREACHABLE, httpx2.InvalidURL, Unusable) as error:
            return type(error).__name__, None


def judged(answer: str, status: int | None, made: int) -> Attempt:
    if status is not None and 200 <= status < 300:
        return Attempt(answer, True, None)
    if made >= ATTEMPTS or (status is not None and 300 <= status < 400):
        return Attempt(answer, False, None)
    return Attempt(answer, False, FIRST_DELAY * 2 ** (made - 1))
