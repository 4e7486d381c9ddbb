"""The tables of a home's SQLite file, their versions, and rows as jobs and outcomes."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from gateway.jobs import DEFAULT_TERMS, Job, Outcome, Terms

FILE = "zimage.db"

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
    plan            TEXT,
    kept            INTEGER
);
CREATE UNIQUE INDEX IF NOT EXISTS idempotency ON jobs (idempotency) WHERE idempotency IS NOT NULL;
CREATE INDEX IF NOT EXISTS unfinished ON jobs (sequence) WHERE status != 'COMPLETED';
CREATE INDEX IF NOT EXISTS finished ON jobs (finished) WHERE status = 'COMPLETED';
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
"""

_MIGRATIONS = (
    (
        "ALTER TABLE jobs ADD COLUMN terms TEXT NOT NULL DEFAULT '{}'",
        "ALTER TABLE jobs ADD COLUMN low_priority INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE jobs ADD COLUMN idempotency TEXT",
        "ALTER TABLE jobs ADD COLUMN digest TEXT NOT NULL DEFAULT ''",
    ),
    ("DROP INDEX IF EXISTS idempotency",),
    (
        "DROP INDEX IF EXISTS queue",
        "DROP INDEX IF EXISTS running",
        "ALTER TABLE jobs ADD COLUMN plan TEXT",
    ),
)
"""From the tables of version 0 to 1, from 1 to 2, …"""


def migrate(db: sqlite3.Connection) -> None:
    """Make the tables, or bring those of an earlier version up to date. Raises RuntimeError for a later
    version's."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > len(_MIGRATIONS):
        raise RuntimeError(f"{FILE} is of a later version of zimage, which has to be used with it")
    columns = {name for _, name, *_ in db.execute("PRAGMA table_info(jobs)")}
    migration = [
        statement
        for statements in (_MIGRATIONS[version:] if columns else ())
        for statement in statements
        # An earlier version may have been used since, and have left its number.
        if statement.partition("ADD COLUMN ")[2].partition(" ")[0] not in columns
    ]
    db.executescript(
        f"BEGIN; {'; '.join(migration)}; {_SCHEMA} PRAGMA user_version={len(_MIGRATIONS)}; COMMIT;"
    )


JOB_COLUMNS = (
    "request_id, endpoint, key_id, origin, created, terms, status, started, finished, attempts, logs,"
    " http_status, units, error, error_type, inference_time, kept, plan"
)


def job(row: sqlite3.Row) -> Job:
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
        outcome=outcome(row, b"") if row["http_status"] else None,
        logs=json.loads(row["logs"]),
    )


def outcome(row: sqlite3.Row, body: bytes) -> Outcome:
    return Outcome(
        status=row["http_status"],
        body=body,
        units=row["units"],
        error=row["error"],
        error_type=row["error_type"],
        inference_time=row["inference_time"],
        kept=bool(row["kept"]),
        plan=row["plan"],
    )


def dumped(terms: Terms) -> str:
    return "{}" if terms == DEFAULT_TERMS else json.dumps(vars(terms))


def read_webhooks(home: Path) -> list[dict[str, Any]]:
    """Every webhook on record, newest first; beside a running server. Raises FileNotFoundError."""
    path = home / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{home} has no records")
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        db.row_factory = sqlite3.Row
        rows = db.execute("SELECT * FROM webhooks ORDER BY rowid DESC").fetchall()
    return [dict(row) for row in rows]
