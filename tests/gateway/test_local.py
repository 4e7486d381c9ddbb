"""The local platform where it is hard: cancels at any moment, stops, crashes, a disk that fails."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.jobs import Job, Terms
from gateway.platforms import local, runs
from gateway.platforms.local import LocalPlatform
from gateway.platforms.records import Records
from gateway.settings import Settings
from schemas.task import EncodedImage, Progress, Result, Task

BODY = b'{"prompt": "x", "image_size": {"width": 16, "height": 16}}'


def job() -> Job:
    return Job(str(uuid.uuid4()), "fal-ai/z-image/turbo", "key", "http://host", time.time())


class Sleepy:
    """An engine that takes its time and draws nothing."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.started = seconds, 0

    async def __call__(self, task: Task, on_progress: Callable[[Progress], None]) -> Result:
        self.started += 1
        await asyncio.sleep(self.seconds)
        return Result((EncodedImage(b"", False),), task.seed, task.prompt, 1, {"inference": 0.0})


def on_platform(
    home: Path, engine: Sleepy, scenario: Callable[[LocalPlatform], Awaitable[None]]
) -> None:
    async def run() -> None:
        async with LocalPlatform(Settings(home=home), engine) as platform:
            await asyncio.wait_for(scenario(platform), 30)

    asyncio.run(run())


async def submitted(platform: LocalPlatform) -> str:
    it = job()
    await platform.submit(it, BODY)
    return it.request_id


@pytest.mark.parametrize("seconds", [0.0, 0.002])
def test_cancels_at_any_moment_strand_no_job(tmp_path: Path, seconds: float) -> None:
    async def scenario(platform: LocalPlatform) -> None:
        generator = random.Random(7)
        waiting = []
        for _ in range(200):
            request_id = await submitted(platform)
            waiting.append(asyncio.create_task(platform.wait(request_id)))
            for _ in range(generator.randrange(6)):
                await asyncio.sleep(0)
            for _ in range(generator.randrange(3)):
                await platform.cancel(request_id)
        outcomes = await asyncio.gather(*waiting)
        assert {outcome.status for outcome in outcomes} <= {200, 499}
        assert await platform.ready()
        assert (await platform.wait(await submitted(platform))).status == 200

    on_platform(tmp_path, Sleepy(seconds), scenario)


def test_an_orderly_stop_is_no_attempt(tmp_path: Path) -> None:
    ids: list[str] = []

    async def start(platform: LocalPlatform) -> None:
        if not ids:
            ids.append(await submitted(platform))
        while (view := await platform.view(ids[0])) is None or view.job.attempts == 0:
            await asyncio.sleep(0)

    for _ in range(5):
        on_platform(tmp_path, Sleepy(60), start)

    async def end(platform: LocalPlatform) -> None:
        assert (await platform.wait(ids[0])).status == 200

    on_platform(tmp_path, Sleepy(), end)


def test_only_jobs_at_the_engine_are_suspected_of_a_crash(tmp_path: Path) -> None:
    """Waiting requests survive any number of crashes of the process."""
    for _ in range(4):

        async def crash() -> None:
            platform = LocalPlatform(Settings(home=tmp_path), Sleepy(60))
            await platform.__aenter__()
            for _ in range(4 if not platform._runs._runs else 0):
                await submitted(platform)
            await asyncio.sleep(0.05)
            # Gone, without a word to the records.
            platform._records.hand_back = lambda *_: None  # type: ignore[method-assign]
            await platform._runs.stop()
            for task in platform._tasks:
                task.cancel()
            await asyncio.gather(*platform._tasks, return_exceptions=True)
            platform._records.close()
            platform._lock.close()

        asyncio.run(crash())
    with sqlite3.connect(tmp_path / "zimage.db") as db:
        rows = db.execute("SELECT status, attempts FROM jobs ORDER BY sequence").fetchall()
    db.close()
    assert [attempts for _, attempts in rows[:2]] == [3, 3]  # two slots at the engine
    assert all(status != "COMPLETED" for status, _ in rows[2:])


def test_a_failing_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "RETRY_SECONDS", 0.01)
    failures = {"update": 3, "body": 1}

    async def scenario(platform: LocalPlatform) -> None:
        records = platform._records
        update, body = records._update, records.body

        def fail(name: str) -> None:
            if failures[name]:
                failures[name] -= 1
                raise sqlite3.OperationalError("database or disk is full")

        def failing_update(job: Job, output: bytes | None) -> None:
            if job.status == "COMPLETED":
                fail("update")
            update(job, output)

        async def failing_body(request_id: str) -> bytes:
            fail("body")
            return await body(request_id)

        records._update = failing_update  # type: ignore[method-assign]
        records.body = failing_body  # type: ignore[method-assign]
        assert (await platform.wait(await submitted(platform))).status == 500  # it had no body
        assert (await platform.wait(await submitted(platform))).status == 200
        assert not any(failures.values())
        assert await platform.ready()

    on_platform(tmp_path, Sleepy(), scenario)


def test_a_start_that_cannot_be_recorded_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's write failed, and took the attempt of this one along."""
    engine, failures = Sleepy(), [1, 1]
    attempt = Records.attempt

    async def failing(self: Records, job: Job) -> None:
        if failures:
            failures.pop()
            raise sqlite3.OperationalError("database or disk is full")
        await attempt(self, job)

    monkeypatch.setattr(Records, "attempt", failing)
    monkeypatch.setattr(runs, "RETRY_SECONDS", 0.01)

    async def scenario(platform: LocalPlatform) -> None:
        given = job()
        await platform.submit(given, BODY)
        outcome = await platform.wait(given.request_id)
        assert outcome.status == 200 and engine.started == 1
        view = await platform.view(given.request_id)
        assert view is not None and view.job.attempts == 1

    on_platform(tmp_path, engine, scenario)


def test_a_stop_keeps_what_is_finished_and_what_was_cancelled(tmp_path: Path) -> None:
    """Stop while a result is being recorded, and just after a client's cancel: both are final."""
    ids: dict[str, str] = {}

    async def stop_while(moment: str) -> None:
        platform = LocalPlatform(Settings(home=tmp_path), Sleepy(0.05))
        async with platform:
            ids[moment] = await submitted(platform)
            while (view := await platform.view(ids[moment])) is None or not view.job.attempts:
                await asyncio.sleep(0)
            if moment == "cancelled":
                await platform.cancel(ids[moment])
            else:
                finish = platform._records.finish

                async def slowly(*arguments: object) -> None:
                    await asyncio.sleep(0.1)
                    await finish(*arguments)  # type: ignore[arg-type]

                platform._records.finish = slowly  # type: ignore[method-assign]
                await asyncio.sleep(0.1)

    for moment in ("cancelled", "finishing"):
        asyncio.run(asyncio.wait_for(stop_while(moment), 10))

    async def look(platform: LocalPlatform) -> None:
        statuses = {}
        for moment, request_id in ids.items():
            outcome = await platform.outcome(request_id)
            statuses[moment] = outcome and outcome.status
        assert statuses == {"cancelled": 499, "finishing": 200}

    on_platform(tmp_path, Sleepy(), look)


def test_watchers_leave_nothing_behind(tmp_path: Path) -> None:
    async def scenario(platform: LocalPlatform) -> None:
        request_id = await submitted(platform)
        watching = [platform.watch(request_id) for _ in range(20)]
        states = [(await anext(watcher)).job.status for watcher in watching]
        assert set(states) <= {"IN_QUEUE", "IN_PROGRESS"}
        assert len(platform._watchers[request_id]) == 20
        for watcher in watching[1:]:
            await watcher.aclose()  # type: ignore[attr-defined]
        assert [view.job.status async for view in watching[0]][-1] == "COMPLETED"
        assert not platform._watchers
        assert [watcher async for watcher in platform.watch("unknown")] == []

    on_platform(tmp_path, Sleepy(0.1), scenario)


@pytest.mark.parametrize("turns", range(4))
def test_an_orderly_stop_while_the_attempt_is_recorded_is_no_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    """Of a job that is to be tried once only, it would be the end."""
    given = replace(job(), terms=Terms(retry=False))
    attempt = Records.attempt

    async def start(platform: LocalPlatform) -> None:
        begun = asyncio.Event()

        async def watched(self: Records, it: Job) -> None:
            begun.set()
            await attempt(self, it)

        monkeypatch.setattr(Records, "attempt", watched)
        await platform.submit(given, BODY)
        await begun.wait()
        for _ in range(turns):
            await asyncio.sleep(0)

    on_platform(tmp_path, Sleepy(60), start)
    monkeypatch.undo()

    async def end(platform: LocalPlatform) -> None:
        assert (await platform.wait(given.request_id)).status == 200

    on_platform(tmp_path, Sleepy(), end)


@pytest.mark.parametrize("turns", range(3))
def test_a_stop_just_after_a_webhook_was_tried(tmp_path: Path, turns: int) -> None:
    async def scenario(platform: LocalPlatform) -> None:
        platform._records._journal.write(
            "INSERT INTO webhooks (request_id, user_id, url, attempts, due) VALUES (?,?,?,1,?)",
            ("later", "key", "http://host/", time.time() + 60),
        )
        platform._records._journal.commit()
        platform._outbox._changed.set()
        await asyncio.sleep(0.3)  # it waits for that one now
        platform._outbox._changed.set()
        for _ in range(turns):
            await asyncio.sleep(0)

    async def run() -> None:
        platform = LocalPlatform(Settings(home=tmp_path), Sleepy())
        await platform.__aenter__()
        await scenario(platform)
        await asyncio.wait_for(platform.__aexit__(None, None, None), 10)

    asyncio.run(run())


def test_a_cancel_that_nobody_asked_for_is_an_error(tmp_path: Path) -> None:
    class Broken(Sleepy):
        async def __call__(self, task: Task, on_progress: Callable[[Progress], None]) -> Result:
            raise asyncio.CancelledError

    async def scenario(platform: LocalPlatform) -> None:
        assert (await platform.wait(await submitted(platform))).status == 500
        assert await platform.ready()

    on_platform(tmp_path, Broken(), scenario)


def test_a_request_that_is_late_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "RETRY_SECONDS", 0.05)

    async def scenario(platform: LocalPlatform) -> None:
        for _ in range(4):  # its turn does not come
            await submitted(platform)
        late = replace(job(), terms=Terms(start_timeout=0.1))
        await platform.submit(late, BODY)
        update, failures = platform._records._update, [1, 1, 1]

        def full(it: Job, output: bytes | None) -> None:
            if it.request_id == late.request_id and failures:
                failures.pop()
                raise sqlite3.OperationalError("database or disk is full")
            update(it, output)

        platform._records._update = full  # type: ignore[method-assign]
        assert (await platform.wait(late.request_id)).status == 504
        assert not failures

    on_platform(tmp_path, Sleepy(60), scenario)


def test_a_request_whose_turn_comes_too_late(tmp_path: Path) -> None:
    """After a suspended machine wakes, say: the timer has not noticed."""

    async def scenario(platform: LocalPlatform) -> None:
        late = replace(job(), terms=Terms(start_timeout=60.0), created=time.time() - 61.0)
        platform._expire_later = lambda job: None  # type: ignore[method-assign]
        await platform.submit(late, BODY)
        assert (await platform.wait(late.request_id)).status == 504

    engine = Sleepy()
    on_platform(tmp_path, engine, scenario)
    assert engine.started == 0
