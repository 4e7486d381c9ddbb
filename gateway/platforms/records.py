"""Jobs in one SQLite file.

`insert`, `attempt`, `finish` and `committed` return when it is on record (see `journal`). Reads for a
caller commit first, so that nobody is told what a kill could take back.

Bodies beyond INLINE bytes (data URIs) live in files beside the database, written before the row that
needs them: a database that copies megabytes would hold up the event loop.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from gateway.files import SMALL, write_whole
from gateway.jobs import (
    DEFAULT_TERMS,
    UNKEPT_SECONDS,
    Job,
    Outcome,
    Terms,
    key_reused,
    request_digest,
)
from gateway.platforms.journal import Journal
from gateway.webhooks import Attempt, Delivery
from schemas.errors import ApiError, QueueFull, StartTimeout

INLINE = SMALL

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    sequence        INTEGER PRIMARY KEY AUTOINCREMENT,
    request_id      TEXT NOT NULL UNIQUE,
    endpoint        TEXT NOT NULL,
    key_id          TEXT NOT NULL,
    origin          TEXT NOT NULL,
    created         REAL NOT NULL,
    terms           TEXT NOT NULL,
    low_priority    INTEGER NOT NULL,
    idempotency     TEXT,
    digest          TEXT NOT NULL,
    status          TEXT NOT NULL,
    started         REAL,
    finished        REAL,
    attempts        INTEGER NOT NULL,
    logs            TEXT NOT NULL,
    input           BLOB,
    http_status     INTEGER,
    output          BLOB,
    units           REAL,
    error           TEXT,
    error_type      TEXT,
    inference_time  REAL,
    kept            INTEGER
);
CREATE INDEX IF NOT EXISTS queue ON jobs (low_priority, sequence) WHERE status = 'IN_QUEUE';
CREATE UNIQUE INDEX IF NOT EXISTS idempotency ON jobs (idempotency) WHERE idempotency IS NOT NULL;
CREATE INDEX IF NOT EXISTS running ON jobs (sequence) WHERE status = 'IN_PROGRESS';
CREATE TABLE IF NOT EXISTS webhooks (
    request_id      TEXT PRIMARY KEY,
    user_id         TEXT NOT NULL,
    url             TEXT NOT NULL,
    attempts        INTEGER NOT NULL,
    due             REAL,
    delivered       REAL,
    answer          TEXT
);
CREATE INDEX IF NOT EXISTS due ON webhooks (due) WHERE due IS NOT NULL;
CREATE INDEX IF NOT EXISTS finished ON jobs (finished) WHERE status = 'COMPLETED';
"""

_MIGRATIONS = (
    """
ALTER TABLE jobs ADD COLUMN terms TEXT NOT NULL DEFAULT '{}';
ALTER TABLE jobs ADD COLUMN low_priority INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN idempotency TEXT;
ALTER TABLE jobs ADD COLUMN digest TEXT NOT NULL DEFAULT '';
DROP INDEX queue;
""",
    "DROP INDEX IF EXISTS idempotency;",
)
"""From the tables of version 0 to 1, from 1 to 2."""

_STATE = (
    "status=?, started=?, finished=?, attempts=?, logs=?,"
    " http_status=?, output=?, units=?, error=?, error_type=?, inference_time=?, kept=?"
)
_COLUMNS = (
    "request_id, endpoint, key_id, origin, created, terms, status, started, finished, attempts, logs,"
    " http_status, units, error, error_type, inference_time, kept"
)


class Records:
    """All jobs of one home. Used from one thread, the event loop's."""

    def __init__(self, home: Path) -> None:
        self._bodies = home / "bodies"
        self._bodies.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(home / "zimage.db")
        self._db = self._journal.db
        self.checkpoint = self._journal.checkpoint
        self.committed = self._journal.committed
        self._spooled: set[str] = set()
        self._migrate()
        self._remove_orphans()

    def _migrate(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (old,) = self._db.execute(
            "SELECT COUNT(*) FROM sqlite_master WHERE type='table' AND name='jobs'"
        ).fetchone()
        migration = "".join(_MIGRATIONS[version:]) if old else ""
        self._db.executescript(
            f"BEGIN; {migration} {_SCHEMA} PRAGMA user_version={len(_MIGRATIONS)}; COMMIT;"
        )

    def _remove_orphans(self) -> None:
        """Bodies whose row was never written: the process died in between."""
        known = {row["request_id"] for row in self._db.execute("SELECT request_id FROM jobs")}
        for path in self._bodies.iterdir():
            if path.suffix == ".part" or path.stem not in known:
                path.unlink()
            elif path.suffix == ".input":
                self._spooled.add(path.stem)

    def close(self) -> None:
        self._journal.close()

    @property
    def changes(self) -> int:
        """Rows written so far."""
        return self._journal.changes

    async def insert(
        self, job: Job, body: bytes, written: Callable[[], None] = lambda: None
    ) -> Job:
        """Write a new job down; or return the one that has its key's Idempotency-Key already.

        `written` is called when `claim` can see it, shortly before it is on record. Raises QueueFull,
        and InputError if that earlier job was another request.
        """
        inline = await self._spool(job.request_id, "input", body)
        terms = job.terms
        idempotency, digest = None, ""
        if terms.idempotency_key is not None:
            idempotency = json.dumps([job.key_id, terms.idempotency_key])
            digest = await asyncio.to_thread(request_digest, job, body)
        try:
            if idempotency and (earlier := self._earlier(idempotency, digest)):
                self._drop_input(job.request_id)
                await self.committed()
                return earlier
            if terms.max_queue_length is not None and self.queued() >= terms.max_queue_length:
                raise QueueFull(terms.max_queue_length)
        except ApiError:
            self._drop_input(job.request_id)
            raise
        self._journal.write(
            "INSERT INTO jobs (request_id, endpoint, key_id, origin, created, terms, low_priority,"
            " idempotency, digest, status, attempts, logs, input)"
            " VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (job.request_id, job.endpoint, job.key_id, job.origin, job.created)
            + (_dumped(terms), terms.low_priority, idempotency, digest)
            + (job.status, 0, "[]", inline),
        )
        written()
        await self.committed()
        return job

    def _earlier(self, idempotency: str, digest: str) -> Job | None:
        row = self._db.execute(
            f"SELECT {_COLUMNS}, digest FROM jobs WHERE idempotency=?", (idempotency,)
        ).fetchone()
        if row is None:
            return None
        if row["digest"] != digest:
            raise key_reused()
        return _job(row)

    def claim(self, now: float) -> Job | None:
        """Start the oldest queued job; one that should have started before is COMPLETED instead.

        On record when `committed` returns.
        """
        row = self._db.execute(
            f"SELECT {_COLUMNS} FROM jobs WHERE status='IN_QUEUE'"
            " ORDER BY low_priority, sequence LIMIT 1"
        ).fetchone()
        if row is None:
            return None
        job = _job(row)
        if job.overdue(now):
            job.drop(StartTimeout(), now)
            assert job.outcome is not None
            self._update(job, job.outcome.body)
        else:
            job.start(now)
            self._update(job, None)
        return job

    async def body(self, request_id: str) -> bytes:
        """The request body of an unfinished job."""
        row = self._db.execute(
            "SELECT input FROM jobs WHERE request_id=?", (request_id,)
        ).fetchone()
        if row["input"] is not None:
            return bytes(row["input"])
        return await asyncio.to_thread(self._path(request_id, "input").read_bytes)

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
        job = self.get(request_id)
        if job is None or job.status != "IN_QUEUE":
            return None
        job.drop(error, now)
        assert job.outcome is not None
        self._update(job, job.outcome.body)
        self._journal.commit()
        self._drop_input(request_id)
        return job

    def requeue_interrupted(self, now: float) -> list[Job]:
        """Put jobs in progress back to the queue, in their old places: their process is gone."""
        rows = self._db.execute(
            f"SELECT {_COLUMNS} FROM jobs WHERE status='IN_PROGRESS'"
        ).fetchall()
        jobs = [_job(row) for row in rows]
        for job in jobs:
            job.interrupt(now)
            self._update(job, job.outcome.body if job.outcome else None)
        self._journal.commit()
        return jobs

    def get(self, request_id: str) -> Job | None:
        """A job without its bodies."""
        self._journal.settle()
        row = self._db.execute(
            f"SELECT {_COLUMNS} FROM jobs WHERE request_id=?", (request_id,)
        ).fetchone()
        return _job(row) if row else None

    async def outcome(self, request_id: str) -> Outcome | None:
        self._journal.settle()
        row = self._db.execute(
            f"SELECT {_COLUMNS}, output FROM jobs WHERE request_id=? AND status='COMPLETED'",
            (request_id,),
        ).fetchone()
        if row is None:
            return None
        body = row["output"]
        if body is None:
            body = await asyncio.to_thread(self._path(request_id, "output").read_bytes)
        return _outcome(row, bytes(body))

    async def attempt(self, job: Job) -> None:
        """The engine takes the job on. Raises sqlite3.Error, and then it does not."""
        job.attempt()
        try:
            self._update(job, None)
            await self.committed()
        except sqlite3.Error:
            job.attempts -= 1
            raise

    def hand_back(self, job: Job, attempted: bool) -> None:
        """Back to the queue, in its old place, at an orderly stop."""
        job.hand_back(attempted)
        self._update(job, None)
        self._journal.commit()

    def with_deadline(self) -> list[Job]:
        """Queued jobs that must start within some time."""
        rows = self._db.execute(
            f"SELECT {_COLUMNS} FROM jobs WHERE status='IN_QUEUE'"
            " AND json_extract(terms, '$.start_timeout') IS NOT NULL"
        ).fetchall()
        return [_job(row) for row in rows]

    def queued(self) -> int:
        """How many jobs wait to be started."""
        (count,) = self._db.execute("SELECT COUNT(*) FROM jobs WHERE status='IN_QUEUE'").fetchone()
        return int(count)

    def position(self, request_id: str) -> int:
        """How many queued jobs are ahead."""
        (count,) = self._db.execute(
            "SELECT COUNT(*) FROM jobs WHERE status='IN_QUEUE' AND (low_priority, sequence) <"
            " (SELECT low_priority, sequence FROM jobs WHERE request_id=?)",
            (request_id,),
        ).fetchone()
        return int(count)

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
        outcome = job.outcome
        results: tuple[Any, ...] = (None,) * 7
        if outcome:
            results = (outcome.status, output, outcome.units)
            results += (outcome.error, outcome.error_type, outcome.inference_time)
            results += (outcome.kept and job.terms.store,)
        ended = job.status == "COMPLETED"
        self._journal.write(
            f"UPDATE jobs SET {_STATE}{', input=NULL' if ended else ''} WHERE request_id=?",
            (job.status, job.started, job.finished, job.attempts, json.dumps(job.logs))
            + (*results, job.request_id),
        )
        if ended and job.terms.webhook:  # with the end of the job, or not at all
            self._journal.write(
                "INSERT INTO webhooks (request_id, user_id, url, attempts, due) VALUES (?,?,?,0,?)",
                (job.request_id, job.key_id, job.terms.webhook, job.finished),
            )

    def _drop_input(self, request_id: str) -> None:
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


def read_webhooks(home: Path) -> list[dict[str, Any]]:
    """Every webhook on record, newest first; beside a running server. Raises FileNotFoundError."""
    path = home / "zimage.db"
    if not path.is_file():
        raise FileNotFoundError(f"{home} has no records")
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        db.row_factory = sqlite3.Row
        rows = db.execute("SELECT * FROM webhooks ORDER BY rowid DESC").fetchall()
    return [dict(row) for row in rows]


def _job(row: sqlite3.Row) -> Job:
    return Job(
        request_id=row["request_id"],
        endpoint=row["endpoint"],
        key_id=row["key_id"],
        origin=row["origin"],
        created=row["created"],
        terms=DEFAULT_TERMS if row["terms"] == "{}" else Terms(**json.loads(row["terms"])),
        status=row["status"],
        started=row["started"],
        finished=row["finished"],
        attempts=row["attempts"],
        outcome=_outcome(row, b"") if row["http_status"] else None,
        logs=json.loads(row["logs"]),
    )


def _dumped(terms: Terms) -> str:
    return "{}" if terms == DEFAULT_TERMS else json.dumps(vars(terms))


def _outcome(row: sqlite3.Row, body: bytes) -> Outcome:
    return Outcome(
        status=row["http_status"],
        body=body,
        units=row["units"],
        error=row["error"],
        error_type=row["error_type"],
        inference_time=row["inference_time"],
        kept=bool(row["kept"]),
    )
