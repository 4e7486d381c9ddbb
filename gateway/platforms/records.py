"""Jobs in one SQLite file.

`insert`, `attempt`, `finish` and `committed` return when it is on record (see `journal`). Reads for a
caller commit first, so that nobody is told what a kill could take back. On record a job waits until
the engine takes it on; that it has been claimed before is known to this process only (see `backlog`).

Bodies beyond INLINE bytes (data URIs) live in files beside the database, written before the row that
needs them: a database that copies megabytes would hold up the event loop.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from gateway.files import SMALL, write_whole
from gateway.jobs import UNKEPT_SECONDS, Job, Outcome, key_reused, request_digest
from gateway.platforms import tables
from gateway.platforms.backlog import Backlog
from gateway.platforms.journal import Journal
from gateway.webhooks import Attempt, Delivery
from schemas.errors import ApiError, QueueFull

INLINE = SMALL

AT_HAND = 64
"""While so few jobs wait, a new one's body stays in memory: it is wanted in a moment."""

_STATE = (
    "status=?, started=?, finished=?, attempts=?, logs=?,"
    " http_status=?, output=?, units=?, error=?, error_type=?, inference_time=?, kept=?, plan=?"
)


class Records:
    """All jobs of one home. Used from one thread, the event loop's."""

    def __init__(self, home: Path) -> None:
        self._bodies = home / "bodies"
        self._bodies.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(home / tables.FILE)
        self._db = self._journal.db
        self.checkpoint = self._journal.checkpoint
        self.committed = self._journal.committed
        self.backlog = Backlog()
        self._at_hand: dict[str, bytes] = {}
        self._spooled: set[str] = set()
        tables.migrate(self._db)
        self._remove_orphans()

    def _remove_orphans(self) -> None:
        """Bodies whose row was never written: the process died in between."""
        known = {row["request_id"] for row in self._db.execute("SELECT request_id FROM jobs")}
        for path in self._bodies.iterdir():
            if path.suffix == ".part" or path.stem not in known:
                path.unlink()
            elif path.suffix == ".input":
                self._spooled.add(path.stem)

    def resume(self, now: float) -> list[Job]:
        """Read what waits, and what the last process left in progress, which returns here: back in its
        old place, or COMPLETED if it killed its process too often."""
        rows = self._db.execute(
            f"SELECT {tables.JOB_COLUMNS}, sequence FROM jobs WHERE status != 'COMPLETED'"
        ).fetchall()
        interrupted = []
        for row in rows:
            job = tables.job(row)
            if job.status == "IN_PROGRESS":
                job.interrupt(now)
                self._update(job, job.outcome.body if job.outcome else None)
                interrupted.append(job)
            if job.status == "IN_QUEUE":
                self.backlog.add(job, row["sequence"])
            else:
                self._drop_input(job.request_id)
        self._journal.commit()
        return interrupted

    def close(self) -> None:
        self._journal.close()

    @property
    def changes(self) -> int:
        """Rows written so far."""
        return self._journal.changes

    async def insert(self, job: Job, body: bytes, waits: Callable[[], None] = lambda: None) -> Job:
        """Write a new job down; or return the one that has its key's Idempotency-Key already.

        `waits` is called when the job is in the backlog, shortly before it is on record. Raises
        QueueFull, and InputError if that earlier job was another request.
        """
        terms = job.terms
        idempotency, digest = None, ""
        try:
            inline = await self._spool(job.request_id, "input", body)
            if terms.idempotency_key is not None:
                idempotency = json.dumps([job.key_id, terms.idempotency_key])
                digest = await asyncio.to_thread(request_digest, job, body)
                if earlier := self._earlier(idempotency, digest):
                    self._drop_input(job.request_id)
                    await self.committed()
                    return earlier
            limit = terms.max_queue_length
            if limit is not None and len(self.backlog) >= limit:
                raise QueueFull(limit)
            written = self._journal.write(
                "INSERT INTO jobs (request_id, endpoint, key_id, origin, created, terms, low_priority,"
                " idempotency, digest, status, attempts, logs, input)"
                " VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",
                (job.request_id, job.endpoint, job.key_id, job.origin, job.created)
                + (tables.dumped(terms), terms.low_priority, idempotency, digest)
                + (job.status, 0, "[]", inline),
            )
        except BaseException:
            self._drop_input(job.request_id)
            raise
        assert written.lastrowid is not None
        if inline is not None and len(self.backlog) < AT_HAND:
            self._at_hand[job.request_id] = inline
        self.backlog.add(replace(job), written.lastrowid)  # the caller's stays as it was accepted
        waits()
        try:
            await self.committed()
        except sqlite3.Error:
            self.backlog.remove(job.request_id)  # if it runs already, it will not find its row
            self._drop_input(job.request_id)
            raise
        return job

    def _earlier(self, idempotency: str, digest: str) -> Job | None:
        row = self._db.execute(
            f"SELECT {tables.JOB_COLUMNS}, digest FROM jobs WHERE idempotency=?", (idempotency,)
        ).fetchone()
        if row is None:
            return None
        if row["digest"] != digest:
            raise key_reused()
        return tables.job(row)

    def claim(self, now: float) -> Job | None:
        """Start the job whose turn it is. Nothing is written: if this process dies, it waits again."""
        if (job := self.backlog.next()) is not None:
            job.start(now)
        return job

    async def body(self, request_id: str) -> bytes:
        """The request body of an unfinished job."""
        if (body := self._at_hand.pop(request_id, None)) is not None:
            return body
        row = self._db.execute(
            "SELECT input FROM jobs WHERE request_id=?", (request_id,)
        ).fetchone()
        if row["input"] is not None:
            return bytes(row["input"])
        return await asyncio.to_thread(self._path(request_id, "input").read_bytes)

    async def attempt(self, job: Job) -> None:
        """The engine takes the job on. Raises sqlite3.Error, and then it does not."""
        job.attempt()
        try:
            self._update(job, None)
            await self.committed()
        except sqlite3.Error:
            job.attempts -= 1
            raise

    async def finish(self, job: Job, outcome: Outcome, now: float) -> None:
        """Record the outcome and drop the request body, which nobody needs any more.

        May be repeated after an error: `job` itself stays as it is.
        """
        inline = await self._spool(job.request_id, "output", outcome.body)
        finished = replace(job)
        finished.finish(outcome, now)
        self._update(finished, inline)
        await self.committed()
        self._drop_input(job.request_id)

    def drop_queued(self, request_id: str, error: ApiError, now: float) -> Job | None:
        """Finish a queued job with an error; None if it is not queued."""
        waiting = self.backlog.get(request_id)
        if waiting is None:
            return None
        job = replace(waiting)
        job.drop(error, now)
        assert job.outcome is not None
        self._update(job, job.outcome.body)
        self._journal.commit()
        self.backlog.remove(request_id)
        self._drop_input(request_id)
        return job

    def hand_back(self, job: Job, attempted: bool) -> None:
        """Back to the queue, in its old place, at an orderly stop."""
        job.hand_back(attempted)
        if attempted:  # else it never left the queue, on record
            self._update(job, None)
            self._journal.commit()

    def get(self, request_id: str) -> Job | None:
        """A job without its bodies."""
        self._journal.settle()
        row = self._db.execute(
            f"SELECT {tables.JOB_COLUMNS} FROM jobs WHERE request_id=?", (request_id,)
        ).fetchone()
        return tables.job(row) if row else None

    async def outcome(self, request_id: str) -> Outcome | None:
        self._journal.settle()
        row = self._db.execute(
            f"SELECT {tables.JOB_COLUMNS}, output FROM jobs"
            " WHERE request_id=? AND status='COMPLETED'",
            (request_id,),
        ).fetchone()
        if row is None:
            return None
        body = row["output"]
        if body is None:
            body = await asyncio.to_thread(self._path(request_id, "output").read_bytes)
        return tables.outcome(row, bytes(body))

    def due_webhooks(self, now: float) -> list[Delivery]:
        """Webhooks to send now, those included that are being sent."""
        self._journal.settle()
        rows = self._db.execute(
            "SELECT request_id, user_id, url, attempts FROM webhooks WHERE due<=? ORDER BY due",
            (now,),
        ).fetchall()
        return [Delivery(*row) for row in rows]

    def next_webhook(self, now: float) -> float | None:
        """When the next one after `now` is due."""
        (due,) = self._db.execute("SELECT MIN(due) FROM webhooks WHERE due>?", (now,)).fetchone()
        return None if due is None else float(due)

    def record_attempt(self, delivery: Delivery, attempt: Attempt, now: float) -> None:
        self._journal.write(
            "UPDATE webhooks SET attempts=?, due=?, delivered=?, answer=? WHERE request_id=?",
            (
                delivery.attempts + 1,
                None if attempt.again is None else now + attempt.again,
                now if attempt.delivered else None,
                attempt.answer,
                delivery.request_id,
            ),
        )
        self._journal.commit()

    def sweep(self, seconds: float) -> int:
        """Forget jobs that finished more than `seconds` ago, some hundreds at a time; returns how many.

        Results not to be kept stay UNKEPT_SECONDS, for a client whose connection broke.
        """
        now = time.time()
        rows = self._journal.write(
            "DELETE FROM jobs WHERE sequence IN (SELECT sequence FROM jobs WHERE status='COMPLETED'"
            " AND (finished<? OR (NOT kept AND finished<?)) AND NOT EXISTS (SELECT 1 FROM webhooks"
            " WHERE webhooks.request_id=jobs.request_id AND due IS NOT NULL)"
            " LIMIT 500) RETURNING request_id",
            (now - seconds, now - UNKEPT_SECONDS),
        ).fetchall()
        self._journal.write(
            "DELETE FROM webhooks WHERE due IS NULL"
            " AND request_id NOT IN (SELECT request_id FROM jobs)"
        )
        self._journal.commit()
        for row in rows:
            for kind in ("input", "output"):
                self._path(row["request_id"], kind).unlink(missing_ok=True)
        return len(rows)

    def _update(self, job: Job, output: bytes | None) -> None:
        """Raises LookupError for a job that was not accepted after all: its transaction failed."""
        outcome = job.outcome
        results: tuple[Any, ...] = (None,) * 8
        if outcome:
            results = (outcome.status, output, outcome.units)
            results += (outcome.error, outcome.error_type, outcome.inference_time)
            results += (outcome.kept and job.terms.store, outcome.plan)
        ended = job.status == "COMPLETED"
        written = self._journal.write(
            f"UPDATE jobs SET {_STATE}{', input=NULL' if ended else ''} WHERE request_id=?",
            (job.status, job.started, job.finished, job.attempts, json.dumps(job.logs))
            + (*results, job.request_id),
        )
        if not written.rowcount:
            raise LookupError(f"request {job.request_id} is not on record")
        if ended and job.terms.webhook:  # with the end of the job, or not at all
            self._journal.write(
                "INSERT INTO webhooks (request_id, user_id, url, attempts, due) VALUES (?,?,?,0,?)",
                (job.request_id, job.key_id, job.terms.webhook, job.finished),
            )

    def _drop_input(self, request_id: str) -> None:
        self._at_hand.pop(request_id, None)
        if request_id in self._spooled:
            self._spooled.discard(request_id)
            with suppress(OSError):  # an orphan goes with its job
                self._path(request_id, "input").unlink(missing_ok=True)

    async def _spool(self, request_id: str, kind: str, body: bytes) -> bytes | None:
        if len(body) <= INLINE:
            return body
        if kind == "input":
            self._spooled.add(request_id)
        await asyncio.to_thread(write_whole, self._path(request_id, kind), body)
        return None

    def _path(self, request_id: str, kind: str) -> Path:
        return self._bodies / f"{request_id}.{kind}"
