"""Jobs in one SQLite file (WAL). Every method is one transaction of well under a millisecond.

Bodies beyond INLINE bytes (data URIs) live in files beside the database, written before the row that
needs them: a database that copies megabytes would hold up the event loop. synchronous=NORMAL
survives a killed process; a power cut may lose the last moments, never consistency.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from gateway.files import write_whole
from gateway.jobs import Job, Outcome

INLINE = 64 * 1024
UNKEPT_SECONDS = 600.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    sequence        INTEGER PRIMARY KEY AUTOINCREMENT,
    request_id      TEXT NOT NULL UNIQUE,
    endpoint        TEXT NOT NULL,
    key_id          TEXT NOT NULL,
    origin          TEXT NOT NULL,
    created         REAL NOT NULL,
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
CREATE INDEX IF NOT EXISTS queue ON jobs (sequence) WHERE status = 'IN_QUEUE';
CREATE INDEX IF NOT EXISTS running ON jobs (sequence) WHERE status = 'IN_PROGRESS';
CREATE INDEX IF NOT EXISTS finished ON jobs (finished) WHERE status = 'COMPLETED';
"""

_STATE = (
    "status=?, started=?, finished=?, attempts=?, logs=?,"
    " http_status=?, output=?, units=?, error=?, error_type=?, inference_time=?, kept=?"
)
_COLUMNS = (
    "request_id, endpoint, key_id, origin, created, status, started, finished, attempts, logs,"
    " http_status, units, error, error_type, inference_time, kept"
)


class Records:
    """All jobs of one home. Used from one thread, the event loop's."""

    def __init__(self, home: Path) -> None:
        self._bodies = home / "bodies"
        self._bodies.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(home / "zimage.db", isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + _SCHEMA)

        self._remove_orphans()

    def _remove_orphans(self) -> None:
        """Bodies whose row was never written: the process died in between."""
        known = {row["request_id"] for row in self._db.execute("SELECT request_id FROM jobs")}
        for path in self._bodies.iterdir():
            if path.suffix == ".part" or path.stem not in known:
                path.unlink()

    def close(self) -> None:
        self._db.close()

    async def insert(self, job: Job, body: bytes) -> None:
        inline = await self._spool(job.request_id, "input", body)
        self._db.execute(
            "INSERT INTO jobs (request_id, endpoint, key_id, origin, created, status, attempts,"
            " logs, input) VALUES (?,?,?,?,?,?,?,?,?)",
            (job.request_id, job.endpoint, job.key_id, job.origin, job.created, job.status, 0)
            + ("[]", inline),
        )

    def claim(self, now: float) -> Job | None:
        """Start the oldest queued job."""
        row = self._db.execute(
            f"SELECT {_COLUMNS} FROM jobs WHERE status='IN_QUEUE' ORDER BY sequence LIMIT 1"
        ).fetchone()
        if row is None:
            return None
        job = _job(row)
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
        with suppress(OSError):  # an orphan goes at the next start
            self._path(job.request_id, "input").unlink(missing_ok=True)

    def cancel_queued(self, request_id: str, now: float) -> Job | None:
        """Finish a queued job as cancelled; None if it is not queued."""
        job = self.get(request_id)
        if job is None or job.status != "IN_QUEUE":
            return None
        job.cancel(now)
        assert job.outcome is not None
        self._update(job, job.outcome.body)
        self._path(request_id, "input").unlink(missing_ok=True)
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
        return jobs

    def get(self, request_id: str) -> Job | None:
        """A job without its bodies."""
        row = self._db.execute(
            f"SELECT {_COLUMNS} FROM jobs WHERE request_id=?", (request_id,)
        ).fetchone()
        return _job(row) if row else None

    async def outcome(self, request_id: str) -> Outcome | None:
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

    def count_attempt(self, job: Job) -> None:
        """The engine takes the job on now."""
        job.attempt()
        self._update(job, None)

    def hand_back(self, job: Job, attempted: bool) -> None:
        """Back to the queue, in its old place, at an orderly stop."""
        job.hand_back(attempted)
        self._update(job, None)

    def queued(self) -> int:
        """How many jobs wait to be started."""
        (count,) = self._db.execute("SELECT COUNT(*) FROM jobs WHERE status='IN_QUEUE'").fetchone()
        return int(count)

    def position(self, request_id: str) -> int:
        """How many queued jobs are ahead."""
        (count,) = self._db.execute(
            "SELECT COUNT(*) FROM jobs WHERE status='IN_QUEUE' AND sequence <"
            " (SELECT sequence FROM jobs WHERE request_id=?)",
            (request_id,),
        ).fetchone()
        return int(count)

    def sweep(self, seconds: float) -> int:
        """Forget jobs that finished more than `seconds` ago, some hundreds at a time; returns how many.

        Results not to be kept stay UNKEPT_SECONDS, for a client whose connection broke.
        """
        now = time.time()
        rows = self._db.execute(
            "DELETE FROM jobs WHERE sequence IN (SELECT sequence FROM jobs WHERE status='COMPLETED'"
            " AND (finished<? OR (NOT kept AND finished<?)) LIMIT 500) RETURNING request_id",
            (now - seconds, now - UNKEPT_SECONDS),
        ).fetchall()
        for row in rows:
            for kind in ("input", "output"):
                self._path(row["request_id"], kind).unlink(missing_ok=True)
        return len(rows)

    def _update(self, job: Job, output: bytes | None) -> None:
        outcome = job.outcome
        results: tuple[Any, ...] = (None,) * 7
        if outcome:
            results = (outcome.status, output, outcome.units)
            results += (outcome.error, outcome.error_type, outcome.inference_time, outcome.kept)
        drop = ", input=NULL" if job.status == "COMPLETED" else ""
        self._db.execute(
            f"UPDATE jobs SET {_STATE}{drop} WHERE request_id=?",
            (job.status, job.started, job.finished, job.attempts, json.dumps(job.logs))
            + (*results, job.request_id),
        )

    async def _spool(self, request_id: str, kind: str, body: bytes) -> bytes | None:
        if len(body) <= INLINE:
            return body
        await asyncio.to_thread(write_whole, self._path(request_id, kind), body)
        return None

    def _path(self, request_id: str, kind: str) -> Path:
        return self._bodies / f"{request_id}.{kind}"


def _job(row: sqlite3.Row) -> Job:
    return Job(
        request_id=row["request_id"],
        endpoint=row["endpoint"],
        key_id=row["key_id"],
        origin=row["origin"],
        created=row["created"],
        status=row["status"],
        started=row["started"],
        finished=row["finished"],
        attempts=row["attempts"],
        outcome=_outcome(row, b"") if row["http_status"] else None,
        logs=json.loads(row["logs"]),
    )


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
