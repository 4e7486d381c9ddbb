"""Records: order, spooled bodies, expiry; and the platform's housekeeping of files."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from gateway.files import DirectoryFiles
from gateway.jobs import UNKEPT_SECONDS, Job, Outcome
from gateway.platforms.records import INLINE, Records

LONG = b"x" * (INLINE + 1)


def job(name: str) -> Job:
    return Job(name, "fal-ai/z-image/turbo", "key", "http://host", created=time.time())


def test_jobs_start_in_the_order_they_came(tmp_path: Path) -> None:
    async def scenario() -> None:
        records = Records(tmp_path)
        for name in "abc":
            await records.insert(job(name), b"{}")
        assert [records.backlog.position(name) for name in "abc"] == [0, 1, 2]
        first = records.claim(1.0)
        assert first is not None and first.request_id == "a"
        assert [records.backlog.position(name) for name in "bc"] == [0, 1]
        records.close()
        records = Records(tmp_path)  # the process died
        assert not records.resume(2.0)  # the engine had not heard of it
        again = records.claim(3.0)
        assert again is not None and again.request_id == "a"
        await records.attempt(again)
        records.close()
        records = Records(tmp_path)
        assert [job.request_id for job in records.resume(4.0)] == ["a"]
        assert [job.request_id for job in records.backlog] == ["a", "b", "c"]
        records.close()

    asyncio.run(scenario())


def test_bodies_of_any_size_come_back_and_go(tmp_path: Path) -> None:
    async def scenario() -> None:
        records = Records(tmp_path)
        for name, body in (("small", b"{}"), ("large", LONG)):
            await records.insert(job(name), body)
            assert await records.body(name) == body
            claimed = records.claim(time.time())
            assert claimed is not None
            await records.finish(claimed, Outcome(200, body, 0.5), time.time())
            outcome = await records.outcome(name)
            assert outcome is not None and (outcome.body, outcome.units) == (body, 0.5)
        assert [path.name for path in (tmp_path / "bodies").iterdir()] == ["large.output"]
        records.close()

    asyncio.run(scenario())


def test_finished_jobs_are_forgotten_when_due(tmp_path: Path) -> None:
    async def scenario() -> None:
        records = Records(tmp_path)
        now = time.time()
        ages = {"old": 101.0, "young": 50.0, "unkept": UNKEPT_SECONDS + 1, "recent unkept": 50.0}
        for name, age in ages.items():
            await records.insert(job(name), LONG)
            claimed = records.claim(now)
            assert claimed is not None
            outcome = Outcome(200, LONG, kept="unkept" not in name)
            await records.finish(claimed, outcome, now - age)
        await records.insert(job("waiting"), b"{}")
        assert records.sweep(10 * UNKEPT_SECONDS) == 1
        assert records.get("unkept") is None
        assert records.sweep(100) == 1
        assert {name for name in ages if records.get(name)} == {"young", "recent unkept"}
        assert records.get("waiting") is not None
        left = {path.name for path in (tmp_path / "bodies").iterdir()}
        assert left == {"young.output", "recent unkept.output"}
        records.close()

    asyncio.run(scenario())


def test_files_are_deleted_when_due(tmp_path: Path) -> None:
    async def scenario() -> None:
        files = DirectoryFiles(tmp_path)
        old, young = [await files.put(b"data", "png", lifetime) for lifetime in (-1, 100)]
        assert await files.get(old, 100) is None  # although it is still there
        abandoned = tmp_path / "parts" / f"{young}.1"
        abandoned.write_bytes(b"part")
        os.utime(abandoned, (1, 1))
        assert files.sweep() == 2
        assert await files.get(young, 100) == b"data"

    asyncio.run(scenario())
    assert len([*tmp_path.rglob("*.*")]) == 1


def test_bodies_without_a_job_are_removed_at_the_next_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        records = Records(tmp_path)
        await records.insert(job("kept"), LONG)
        records.close()
        for orphan in ("lost.input", "kept.output.part"):
            (tmp_path / "bodies" / orphan).write_bytes(LONG)
        records = Records(tmp_path)
        assert [path.name for path in (tmp_path / "bodies").iterdir()] == ["kept.input"]
        assert await records.body("kept") == LONG
        records.close()

    asyncio.run(scenario())


def on_record(home: Path) -> list[str]:
    """As another process sees it, or the next start of this one."""
    with closing(sqlite3.connect(home / "zimage.db")) as db:
        return [name for (name,) in db.execute("SELECT request_id FROM jobs ORDER BY sequence")]


def test_writes_of_a_turn_share_a_transaction(tmp_path: Path) -> None:
    async def scenario() -> None:
        records = Records(tmp_path)
        statements: list[str] = []
        records._db.set_trace_callback(statements.append)
        names = [f"{number:02}" for number in range(20)]
        await asyncio.gather(*(records.insert(job(name), b"{}") for name in names))
        assert statements.count("COMMIT") == 1
        assert on_record(tmp_path) == names

        statements.clear()
        claims: list[Job | None] = []
        await records.insert(job("a"), b"{}", lambda: claims.append(records.claim(1.0)))
        assert statements.count("COMMIT") == 1
        assert [claim.request_id for claim in claims if claim] == ["00"]
        records.close()

    asyncio.run(scenario())


def test_nobody_is_told_what_is_not_on_record(tmp_path: Path) -> None:
    async def scenario() -> None:
        records = Records(tmp_path)
        inserting = asyncio.create_task(records.insert(job("a"), b"{}"))
        await asyncio.sleep(0)
        assert not inserting.done() and on_record(tmp_path) == []
        assert records.get("a") and on_record(tmp_path) == ["a"]
        await inserting
        records.close()

    asyncio.run(scenario())


def test_a_statement_that_fails_is_its_own_affair(tmp_path: Path) -> None:
    async def scenario() -> None:
        records = Records(tmp_path)
        inserts = [asyncio.create_task(records.insert(job(name), b"{}")) for name in "ab"]
        await asyncio.sleep(0)
        with pytest.raises(sqlite3.IntegrityError):
            records._journal.write("INSERT INTO jobs (request_id) VALUES (NULL)")
        await asyncio.gather(*inserts)
        records.close()
        assert on_record(tmp_path) == ["a", "b"]

    asyncio.run(scenario())


def test_who_shares_a_transaction_shares_its_failure(tmp_path: Path) -> None:
    """A statement that undoes all of it, as some errors of a disk do."""

    async def scenario() -> None:
        records = Records(tmp_path)
        await records.insert(job("before"), b"{}")
        inserts = [asyncio.create_task(records.insert(job(name), b"{}")) for name in "ab"]
        before = records.claim(1.0)
        assert before is not None
        attempt = asyncio.create_task(records.attempt(before))
        await asyncio.sleep(0)
        refused = records.claim(1.0)  # begun already, before it was accepted
        assert refused is not None and refused.request_id == "a"
        with pytest.raises(sqlite3.Error):
            records._journal.write(
                "INSERT OR ROLLBACK INTO jobs SELECT * FROM jobs WHERE request_id='before'"
            )
        results = await asyncio.gather(*inserts, attempt, return_exceptions=True)
        assert all(isinstance(result, sqlite3.Error) for result in results)
        assert on_record(tmp_path) == ["before"]
        assert before.attempts == 0 and not records.backlog
        with pytest.raises(LookupError):
            await records.attempt(refused)
        await records.attempt(before)
        await records.insert(job("after"), b"{}")
        assert [each.request_id for each in records.backlog] == ["after"]
        records.close()
        assert on_record(tmp_path) == ["before", "after"]

    asyncio.run(scenario())


def test_who_waits_for_a_transaction_that_a_read_undid_is_told(tmp_path: Path) -> None:
    """As SQLite does on an error of the disk, for a SELECT as well."""

    async def scenario() -> None:
        records = Records(tmp_path)
        for again in (True, False):
            lost = asyncio.create_task(records.insert(job(f"lost {again}"), b"{}"))
            await asyncio.sleep(0)
            records._db.execute("ROLLBACK")
            kept = records.insert(job(f"kept {again}"), b"{}") if again else asyncio.sleep(0)
            results = await asyncio.gather(lost, kept, return_exceptions=True)
            assert isinstance(results[0], sqlite3.OperationalError)
            assert not isinstance(results[1], Exception)
        assert [each.request_id for each in records.backlog] == ["kept True"]
        records.close()
        assert on_record(tmp_path) == ["kept True"]

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_what_a_full_disk_refuses_leaves_nothing_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        records = Records(tmp_path)
        (pages,) = records._db.execute("PRAGMA page_count").fetchone()
        records._db.execute(f"PRAGMA max_page_count={pages + 2}")
        refused = 0
        for number in range(150):
            try:
                await records.insert(job(str(number)), LONG)
            except sqlite3.Error:
                refused += 1
        assert refused and len([*(tmp_path / "bodies").iterdir()]) == 150 - refused

        def full(path: Path, data: bytes) -> int:
            path.touch()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            await records.insert(job("more"), LONG)
        assert len([*(tmp_path / "bodies").iterdir()]) == 150 - refused
        records.close()

    asyncio.run(scenario())


def test_checkpoints_bring_the_log_into_the_file(tmp_path: Path) -> None:
    """On a thread, while jobs come, so that SQLite's own checkpoint finds little to wait for."""

    async def scenario() -> None:
        records = Records(tmp_path)
        for number in range(150):
            await asyncio.gather(
                asyncio.to_thread(records.checkpoint),
                *(records.insert(job(f"{number} {k}"), LONG[:9000]) for k in range(20)),
            )
        assert (tmp_path / "zimage.db").stat().st_size > 6 << 20
        records.close()

    asyncio.run(scenario())
