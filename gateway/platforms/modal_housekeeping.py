"""What a cron does every ten minutes: finds lost requests, repeats webhooks, counts usage, forgets.

Each step is finished before the next begins, and none is missed if one is cut short: whatever a run
leaves behind, the next one finds in the ledger.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import modal

from gateway.jobs import Job
from gateway.platforms.modal import ModalPlatform, Parts
from gateway.platforms.modal_ledger import GRACE_SECONDS, Entry, Ledger, Pending
from gateway.platforms.modal_usage import Usage, row
from gateway.settings import Settings

logger = logging.getLogger(__name__)

AT_ONCE = 32
"""Requests looked at at a time."""


async def keep_house(parts: Parts, settings: Settings) -> dict[str, int]:
    """One round; returns how many requests were counted and forgotten, webhooks sent again, files
    deleted."""
    platform, records, ledger = ModalPlatform(parts, settings), parts.records, parts.ledger
    entries, pending = await ledger.everything()
    places = asyncio.Semaphore(AT_ONCE)

    async def look(entry: Entry) -> tuple[Entry, Job | None]:
        async with places:
            await platform.view(entry.request_id)  # which notices what was lost or is overdue
            loaded = await records.load(entry.request_id)
            return entry, loaded.job if loaded else None

    seen = await asyncio.gather(*(look(entry) for entry in entries))
    ended = {job.request_id for _, job in seen if job is not None and job.status == "COMPLETED"}
    again = await _send_again(pending, ended, ledger, parts.functions.webhook)

    fresh = [job for entry, job in seen if job and job.request_id in ended and not entry.counted]
    if fresh:
        await Usage(parts.usage).add([row(job) for job in fresh])
        for job in fresh:
            await ledger.counted(job.request_id)

    now, waiting = time.time(), {each.delivery.request_id for each in pending}
    forgotten = 0
    for entry, found in seen:
        if found is None:  # Modal's own seven days are over
            await ledger.forget(entry.request_id)
        elif found.forgettable(now, settings.retention) and entry.request_id not in waiting:
            await records.delete(found)
            await ledger.forget(entry.request_id)
            forgotten += 1
    return {
        "requests counted": len(fresh),
        "requests forgotten": forgotten,
        "webhooks sent again": again,
        "files deleted": await parts.files.sweep(),
    }


async def _send_again(pending: list[Pending], ended: set[str], ledger: Ledger, webhook: Any) -> int:
    """Webhooks that are due, and those whose request ended without anybody saying so."""
    again, now = 0, time.time()
    for each in pending:
        request_id = each.delivery.request_id
        try:
            if each.due is not None and each.due + GRACE_SECONDS <= now:
                await webhook.spawn.aio(request_id)
            elif each.due is None and request_id in ended:
                await ledger.announce(request_id, webhook)
            else:
                continue
        except modal.exception.ResourceExhaustedError:
            logger.warning("too much is queued; %d webhooks wait for the next round", len(pending))
            break
        again += 1
    return again
