"""Sends what the records say is due: a job's webhook when it ends, repetitions, an earlier process's."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from contextlib import suppress
from functools import partial

from gateway.platforms.records import Records
from gateway.webhooks import Delivery, Webhooks

PAUSE_SECONDS = 0.1
"""Between two looks at what is due."""

RETRY_SECONDS = 1.0

logger = logging.getLogger(__name__)


class Outbox:
    def __init__(self, records: Records, webhooks: Webhooks) -> None:
        self._records, self._webhooks = records, webhooks
        self._changed = asyncio.Event()
        self._delivering: dict[str, asyncio.Task[None]] = {}
        self._closed = False

    async def run(self) -> None:
        """Send what is due, for ever."""
        while True:
            self._changed.clear()
            now = time.time()
            try:
                for delivery in self._records.due_webhooks(now):
                    self.send(delivery)
                due = self._records.next_webhook(now)
            except sqlite3.Error:
                logger.exception("webhooks cannot be read, trying again")
                due = now + RETRY_SECONDS
            with suppress(TimeoutError):
                delay = None if due is None else max(0.0, due - time.time())
                async with asyncio.timeout(delay):  # unlike wait_for, never swallows a cancel
                    await self._changed.wait()
            await asyncio.sleep(PAUSE_SECONDS)

    def send(self, delivery: Delivery) -> None:
        """Begin one attempt, unless one is under way. It is on record, so nothing is lost after close."""
        if delivery.request_id not in self._delivering and not self._closed:
            task = asyncio.create_task(self._deliver(delivery))
            self._delivering[delivery.request_id] = task

    async def close(self) -> None:
        self._closed = True
        tasks = [*self._delivering.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._webhooks.close()

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            load = partial(self._records.outcome, delivery.request_id)
            attempt = await self._webhooks.deliver(delivery, load)
            self._records.record_attempt(delivery, attempt, time.time())
        except sqlite3.Error:  # it stays due
            logger.exception("attempt for %s cannot be recorded", delivery.request_id)
            await asyncio.sleep(RETRY_SECONDS)
        finally:
            del self._delivering[delivery.request_id]
            self._changed.set()
