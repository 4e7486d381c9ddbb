"""The tables of earlier versions are read on."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import closing, nullcontext
from pathlib import Path

import pytest

from gateway.jobs import Job, Terms
from gateway.platforms import tables
from gateway.platforms.records import Records


def test_records_of_the_first_version_are_read_on(tmp_path: Path) -> None:
    new = ["terms", "low_priority", "idempotency", "digest", "plan"]
    lines = tables._SCHEMA.splitlines()
    old = "\n".join(line for line in lines if not any(name in line for name in new))
    db = sqlite3.connect(tmp_path / "zimage.db")
    db.executescript(old + "CREATE INDEX queue ON jobs (sequence) WHERE status = 'IN_QUEUE';")
    db.execute(
        "INSERT INTO jobs (request_id, endpoint, key_id, origin, created, status, attempts, logs,"
        " input) VALUES ('old', 'fal-ai/z-image/turbo', 'key', 'http://host', 1, 'IN_QUEUE', 0,"
        " '[]', '{}')"
    )
    db.commit()
    db.close()

    async def scenario() -> None:
        for _ in range(2):  # and a second start finds nothing to do
            records = Records(tmp_path)
            await records.insert(
                Job(str(time.time()), "fal-ai/z-image/turbo", "key", "http://host", 2.0), b"{}"
            )
            records.close()
        records = Records(tmp_path)
        records.resume(2.5)
        job = records.claim(3.0)
        assert job is not None and (job.request_id, job.terms) == ("old", Terms())
        assert len(records.backlog) == 2
        records.close()

    asyncio.run(scenario())


def test_a_version_that_was_gone_back_from(tmp_path: Path) -> None:
    """An earlier version has written its number into the file of this one."""
    Records(tmp_path).close()
    for version, fine in ((0, True), (2, True), (len(tables._MIGRATIONS) + 1, False)):
        with closing(sqlite3.connect(tmp_path / tables.FILE)) as db:
            db.execute(f"PRAGMA user_version={version}")
        with nullcontext() if fine else pytest.raises(RuntimeError, match="later version"):
            Records(tmp_path).close()
