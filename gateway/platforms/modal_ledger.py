"""What is to be done about requests later: one `modal.Dict`, walked by a cron.

    id               the request was accepted, and is to be counted and one day forgotten
    ("webhook", id)  its webhook is to be delivered

Both are written before the request is accepted and removed when they are done, so that a container
that is killed anywhere between leaves work behind, never a gap.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

import modal

from gateway.jobs import Job
from gateway.platforms.modal_records import ModalRecords
from gateway.webhooks import Delivery, Webhooks, judged

logger = logging.getLogger(__name__)

PROMPT_RETRIES = 3
"""Attempts that Modal repeats by itself, after 14, 28 and 56 seconds; it knows no longer pauses. The
cron makes the others."""

GRACE_SECONDS = 90.0
"""How long after its time a delivery is left to Modal before the cron takes it on."""


@dataclasses.dataclass(frozen=True)  # no slots: pickled by name
class Entry:
    """forget: when the request's time is over; None until its usage is in a Parquet file."""

    request_id: str
    forget: float | None = None


@dataclasses.dataclass(frozen=True)
class Pending:
    """due: when the next attempt is; None while the request has not ended."""

    delivery: Delivery
    due: float | None = None


class Undelivered(Exception):
    """Tells Modal to try again soon; shown in its dashboard."""


class Ledger:
    def __init__(self, entries: modal.Dict) -> None:
        self._entries = entries

    async def open(self, job: Job) -> None:
        """A request is about to be accepted."""
        await self._entries.put.aio(job.request_id, Entry(job.request_id))
        if job.terms.webhook is not None:
            delivery = Delivery(job.request_id, job.key_id, job.terms.webhook, 0)
            await self._put(Pending(delivery))

    async def forget(self, request_id: str) -> None:
        await self._entries.pop.aio(request_id, None)
        await self._entries.pop.aio(_webhook(request_id), None)

    async def counted(self, request_id: str, forget: float) -> None:
        await self._entries.put.aio(request_id, Entry(request_id, forget))

    async def announce(self, request_id: str, webhook: Any) -> None:
        """The request has ended: have its webhook, if it has one, delivered. Once is enough, twice
        does no harm."""
        pending = await self._pending(request_id)
        if pending is None or pending.due is not None:
            return
        await self._put(dataclasses.replace(pending, due=time.time()))
        try:
            await webhook.spawn.aio(request_id)
        except modal.exception.ResourceExhaustedError:
            logger.warning("webhook of %s has to wait: too much is queued", request_id)

    async def deliver(
        self, request_id: str, records: ModalRecords, webhooks: Webhooks | None
    ) -> str:
        """One attempt; returns what came of it. Raises Undelivered where Modal is to repeat it.
        Without `webhooks`, because there is no key any more, the attempt has failed."""
        pending = await self._pending(request_id)
        if pending is None:
            return "done before"
        delivery = pending.delivery
        if webhooks is None:
            attempt = judged("ZIMAGE_WEBHOOK_KEY is not set", None, delivery.attempts + 1)
        else:
            attempt = await webhooks.deliver(delivery, lambda: records.outcome(request_id))
        if attempt.again is None:
            await self._entries.pop.aio(_webhook(request_id), None)
            return attempt.answer
        made = delivery.attempts + 1
        later = dataclasses.replace(delivery, attempts=made)
        await self._put(Pending(later, time.time() + attempt.again))
        if made <= PROMPT_RETRIES:
            raise Undelivered(f"{attempt.answer}, attempt {made}")
        return attempt.answer

    async def everything(self) -> tuple[list[Entry], list[Pending]]:
        found: list[Entry | Pending] = [value async for value in self._entries.values.aio()]
        entries = [each for each in found if isinstance(each, Entry)]
        return entries, [each for each in found if isinstance(each, Pending)]

    async def _pending(self, request_id: str) -> Pending | None:
        found: Pending | None = await self._entries.get.aio(_webhook(request_id))
        return found

    async def _put(self, pending: Pending) -> None:
        await self._entries.put.aio(_webhook(pending.delivery.request_id), pending)


def _webhook(request_id: str) -> tuple[str, str]:
    return ("webhook", request_id)
