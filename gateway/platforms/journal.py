"""A SQLite file (WAL) whose writes, of a turn or two of the event loop, share one transaction.

`committed` returns when what was written before is on record, or raises for all who shared the
transaction, and then nothing of it is. synchronous=NORMAL survives a killed process; a power cut may
lose the last moments, never consistency. The only waits for the disk are checkpoints: `checkpoint`, on
a thread, leaves little for SQLite's own to do.
"""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

WAL_PAGES = 10_000
"""Of 4 KiB: where SQLite itself checkpoints, between two writes, and begins the log anew."""


class Journal:
    """Used from one thread, the event loop's, except for `checkpoint`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.db = sqlite3.connect(file, isolation_level=None)
        self.db.row_factory = sqlite3.Row
        self.db.executescript(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;"
            f"PRAGMA wal_autocheckpoint={WAL_PAGES};"
        )
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def changes(self) -> int:
        """Rows written so far."""
        return self.db.total_changes

    def write(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """In the open transaction, whoever began it. Raises sqlite3.Error; then this is not written."""
        try:
            if not self.db.in_transaction:
                self._fail("undone by a read")  # as some errors do
                self.db.execute("BEGIN IMMEDIATE")
            return self.db.execute(statement, values)
        except (sqlite3.Error, MemoryError) as error:
            if not self.db.in_transaction:  # a full disk takes the others' writes along
                self._fail(str(error))
            if isinstance(error, MemoryError):
                raise sqlite3.OperationalError("out of memory") from error
            raise

    async def committed(self) -> None:
        """Until what was written before this call is on record. Raises sqlite3.Error if it is not."""
        if self.db.in_transaction:
            loop = asyncio.get_running_loop()
            if not self._waiting:
                # A turn later: whom this turn wakes still joins.
                loop.call_soon(loop.call_soon, self.settle)
            end = loop.create_future()
            self._waiting.append(end)
            await end

    def commit(self) -> None:
        """Now. Raises sqlite3.Error."""
        if not self.db.in_transaction:
            self._fail("undone by a read")
            return
        try:
            self.db.execute("COMMIT")
        except (sqlite3.Error, MemoryError) as error:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            self._fail(str(error))
            if isinstance(error, MemoryError):
                raise sqlite3.OperationalError("out of memory") from error
            raise
        for end in self._waited_for():
            end.set_result(None)

    def settle(self) -> None:
        """Now; only those who wait are told if it fails. Before reads that somebody is told of."""
        with suppress(sqlite3.Error):
            self.commit()

    def checkpoint(self) -> None:
        """Bring the log into the database file. For another thread: the disk may take its time."""
        with closing(sqlite3.connect(self._file)) as db:
            db.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def close(self) -> None:
        self.commit()
        self.db.close()

    def _fail(self, why: str) -> None:
        """Whoever still waits, waits for a transaction that is no more."""
        for end in self._waited_for():
            end.set_exception(sqlite3.OperationalError(f"not on record: {why}"))

    def _waited_for(self) -> list[asyncio.Future[None]]:
        ends, self._waiting = self._waiting, []
        return [end for end in ends if not end.done()]
