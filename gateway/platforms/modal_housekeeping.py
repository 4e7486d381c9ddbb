"""What a cron does every ten minutes: repeats webhooks, finds lost requests, counts usage, forgets.

Each step is finished before the next begins, and none is missed if one is cut short: whatever a run
leaves behind, the next one finds in the ledger. A request that makes trouble is left for the next round
and stops nobody else's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from gateway.jobs import Job
from gateway.platforms.modal import ModalPlatform
from gateway.platforms.modal_ledger import GRACE_SECONDS, Entry, Pending
from gateway.platforms.modal_parts import Parts
from gateway.platforms.modal_usage import Usage, row
from gateway.settings import Settings

logger = logging.getLogger(__name__)

AT_ONCE = 32
"""Requests seen to at a time."""

T = TypeVar("T")
R = TypeVar("R")


async def keep_house(parts: Parts, settings: Settings) -> dict[str, int]:
    """One round; returns what was done, and how many requests made trouble."""
    platform, records, ledger = ModalPlatform(parts, settings), parts.records, parts.ledger
    entries, pending = await ledger.everything()
    troubled = 0

    async def each(work: Callable[[T], Awaitable[R]], items: Iterable[T]) -> list[R]:
        """Do all, a few at a time; what fails is logged and left out."""
        nonlocal troubled
        places = asyncio.Semaphore(AT_ONCE)

        async def one(item: T) -> R:
            async with places:
                return await work(item)

        results = await asyncio.gather(*map(one, items), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                troubled += 1
                logger.error("left for the next round", exc_info=result)
        return [result for result in results if not isinstance(result, BaseException)]

    async def look(entry: Entry) -> Job | None:
        """A request that has ended by now, and is not counted yet."""
        await platform.view(entry.request_id)  # which notices what was lost or is overdue
        loaded = await records.load(entry.request_id)
        if loaded is None:  # Modal's own seven days are over
            await ledger.forget(entry.request_id)
            return None
        return loaded.job if loaded.job.status == "COMPLETED" else None

    async def send_again(pending: Pending) -> bool:
        """A webhook that is overdue, or whose request ended without anybody saying so."""
        request_id, now = pending.delivery.request_id, time.time()
        if pending.due is not None and pending.due + GRACE_SECONDS <= now:
            await parts.functions.webhook.spawn.aio(request_id)
        elif pending.due is None and await records.finished(request_id):
            await ledger.announce(request_id, parts.functions.webhook)
        else:
            return False
        return True

    async def forget(entry: Entry) -> bool:
        loaded = await records.load(entry.request_id)
        if loaded is not None:
            await records.delete(loaded.job)
        await ledger.forget(entry.request_id)
        return True

    looked = await each(look, [entry for entry in entries if entry.forget is None])
    again = await each(send_again, pending)
    fresh = [job for job in looked if job is not None]
    if fresh:
        await Usage(parts.usage).add([row(job) for job in fresh])
    for job in fresh:
        await ledger.counted(job.request_id, job.forget_at(settings.retention) or time.time())

    now, waiting = time.time(), {one.delivery.request_id for one in pending}
    due = [e for e in entries if e.forget and e.forget <= now and e.request_id not in waiting]
    return {
        "requests counted": len(fresh),
        "requests forgotten": len(await each(forget, due)),
        "webhooks sent again": sum(again),
        "files deleted": await parts.files.sweep(),
        "troubled": troubled,
    }
