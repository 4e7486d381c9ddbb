"""Schedules: what a file may say, when its entries are due, and that a run makes everything once."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from gateway.auth import Keys
from gateway.jobs import Job
from gateway.platforms.local import LocalPlatform
from gateway.schedules import (
    Ran,
    Schedule,
    ScheduleError,
    check_keys,
    keep,
    load,
    run,
    saving_below,
)
from gateway.settings import Settings
from inference.aio import AsyncEngine
from inference.engine import Engine
from local_app import app
from schemas.errors import QueueFull
from tests.conftest import ROOT, Counting, encoded, opened

AT = datetime(2026, 3, 5, 7, 0, tzinfo=UTC)
SMALL = {"image_size": {"width": 64, "height": 48}, "num_inference_steps": 1}
ENTRY: dict[str, Any] = {
    "name": "cards",
    "cron": "0 7 * * *",
    "endpoint": "fal-ai/z-image/turbo",
    "arguments": {"prompt": ["a fox on {date}", "an owl at {time}"], "seed": [1, 2], **SMALL},
    "output": "cards/{date}",
}


def test_a_list_makes_a_request_of_each_of_its_values() -> None:
    bodies = [json.loads(body) for body in Schedule(**ENTRY).requests(AT)]
    assert [(body["prompt"], body["seed"]) for body in bodies] == [
        ("a fox on 2026-03-05", 1),
        ("a fox on 2026-03-05", 2),
        ("an owl at 07:00", 1),
        ("an owl at 07:00", 2),
    ]
    assert bodies[0]["image_size"] == SMALL["image_size"]


def test_loras_are_one_value() -> None:
    arguments = {"prompt": ["a", "b"], "loras": [{"path": "style"}, {"path": "x/y", "scale": 0.5}]}
    entry = {**ENTRY, "endpoint": "fal-ai/z-image/turbo/lora", "arguments": arguments}
    bodies = [json.loads(body) for body in Schedule(**entry).requests(AT)]
    assert [body["prompt"] for body in bodies] == ["a", "b"]
    assert all(body["loras"] == arguments["loras"] for body in bodies)


def test_cron_is_in_its_time_zone() -> None:
    paris = Schedule(**{**ENTRY, "timezone": "Europe/Paris"})
    assert paris.next(AT).astimezone(UTC) == datetime(2026, 3, 6, 6, 0, tzinfo=UTC)
    assert paris.due(AT).astimezone(UTC) == datetime(2026, 3, 5, 6, 0, tzinfo=UTC)
    summer = datetime(2026, 7, 5, 7, 0, tzinfo=UTC)
    assert paris.next(summer).astimezone(UTC) == datetime(2026, 7, 6, 5, 0, tzinfo=UTC)


def test_a_run_belongs_to_the_minute_it_was_due() -> None:
    """Whatever second it starts in, and however long it was held up."""
    schedule = Schedule(**ENTRY)
    for seconds in (0, 1, 59, 3600):
        assert schedule.due(AT + timedelta(seconds=seconds)) == AT
    assert schedule.due(AT - timedelta(seconds=1)) == AT - timedelta(days=1)


def test_an_hour_that_comes_twice_has_two_runs() -> None:
    """Paris, 25 October 2026: 3:00 becomes 2:00 again at 01:00 UTC."""
    hourly = Schedule(**{**ENTRY, "cron": "0 * * * *", "timezone": "Europe/Paris"})
    times = [datetime(2026, 10, 25, hour, 0, 5, tzinfo=UTC) for hour in range(4)]
    due = [hourly.due(now) for now in times]
    assert [at.astimezone(UTC).hour for at in due] == [0, 1, 2, 3]
    assert len({at.isoformat() for at in due}) == 4
    assert len({f"{at:%Y-%m-%dT%H%M%z}" for at in due}) == 4


def test_too_many_requests_are_a_reason_to_wait(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.schedules.PAUSES", (0.01, 0.01))
    refusals = iter([QueueFull(1), QueueFull(1)])
    submit = LocalPlatform.submit

    async def sometimes(self: LocalPlatform, job: Job, body: bytes) -> Job:
        for refusal in refusals:
            raise refusal
        return await submit(self, job, body)

    monkeypatch.setattr(LocalPlatform, "submit", sometimes)
    schedule, save = Schedule(**ENTRY), saving_below(tmp_path)
    ran, _ = on_a_platform(tmp_path, engine, lambda p: run(p, schedule, AT, "http://host", save))
    assert [each.error for each in ran] == [None] * 4


def test_usage_is_somebodys(tmp_path: Path) -> None:
    keys = Keys.parse("alice:a-secret-long-enough")
    check_keys([Schedule(**{**ENTRY, "key": "alice"})], keys)
    check_keys([Schedule(**ENTRY)], None)
    with pytest.raises(ScheduleError, match="'cards': key: there is no key 'anonymous'"):
        check_keys([Schedule(**ENTRY)], keys)


def test_the_example_is_one(tmp_path: Path) -> None:
    assert [each.name for each in load(ROOT / "examples" / "schedules.toml")] == [
        "morning",
        "hourly",
    ]


MINIMAL = '[[schedule]]\nname="a"\ncron="0 7 * * *"\nendpoint="fal-ai/z-image/turbo"\n'
ARGUMENTS = '[schedule.arguments]\nprompt="x"\n'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("nonsense", "Expected"),
        ("[other]", "only \\[\\[schedule\\]\\] entries"),
        ("schedule=[1]", "with two brackets"),
        (MINIMAL.replace("[[schedule]]", "[schedule]"), "with two brackets"),
        (MINIMAL, "'a': arguments field required"),
        (MINIMAL.replace("0 7", "99 7") + ARGUMENTS, "cron is no cron expression.*Bad minute"),
        (MINIMAL.replace("0 7", "0 0 7") + ARGUMENTS, "cron is no cron expression of five fields"),
        (MINIMAL.replace("turbo", "other") + ARGUMENTS, "endpoint must be one of fal-ai/"),
        (MINIMAL.replace('"a"', '"A b"') + ARGUMENTS, "name string should match"),
        (MINIMAL + 'timezone="Mars"\n' + ARGUMENTS, "timezone is no time zone"),
        (MINIMAL + 'output="../x"\n' + ARGUMENTS, "output must be a relative path"),
        (MINIMAL + 'output=""\n' + ARGUMENTS, "output must be a relative path"),
        (MINIMAL + 'webhook="x"\n' + ARGUMENTS, "webhook not a plain http"),
        (MINIMAL + 'kron="x"\n' + ARGUMENTS, "kron extra inputs"),
        (MINIMAL + ARGUMENTS + "num_images=[1, 9]", "arguments: num_images: Input should be less"),
        (MINIMAL + ARGUMENTS + "promt=1", "arguments: no promt here"),
        (MINIMAL + ARGUMENTS + "sync_mode=true", "arguments: no sync_mode here"),
        ((MINIMAL + ARGUMENTS) * 2, "the name is taken"),
    ],
)
def test_mistakes_are_named(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "schedules.toml"
    path.write_text(text)
    with pytest.raises(ScheduleError, match=problem):
        load(path)


def on_a_platform(
    home: Path, engine: Engine, work: Callable[[LocalPlatform], Awaitable[Any]]
) -> tuple[Any, Counting]:
    counting = Counting(engine)

    async def scenario() -> Any:
        aio = AsyncEngine(counting)
        async with LocalPlatform(Settings(home=home), aio) as platform:
            result = await work(platform)
        aio.close()
        return result

    return asyncio.run(scenario()), counting


def test_a_run_is_made_once_however_often_it_is_started(tmp_path: Path, engine: Engine) -> None:
    schedule, save = Schedule(**ENTRY), saving_below(tmp_path / "out")

    async def twice(platform: LocalPlatform) -> tuple[list[Ran], list[Ran], list[Ran]]:
        both = [run(platform, schedule, AT, "http://host", save) for _ in range(2)]
        first, second = await asyncio.gather(*both)
        tomorrow = await run(platform, schedule, AT + timedelta(days=1), "http://host", save)
        return first, second, tomorrow

    (first, second, tomorrow), counting = on_a_platform(tmp_path / "home", engine, twice)
    assert first == second != tomorrow
    assert len(counting.tasks) == 8
    assert [each.pictures for each in first][1] == [
        "cards/2026-03-05/2026-03-05T0700+0000-cards-001-0.png"
    ]
    for each in (*first, *tomorrow):
        assert each.error is None
        assert opened((tmp_path / "out" / each.pictures[0]).read_bytes()).size == (64, 48)


def test_failures_are_told_and_stop_nothing_else(
    tmp_path: Path, engine: Engine, photo: Image.Image
) -> None:
    picture = "data:image/png;base64," + base64.b64encode(encoded(photo)).decode()
    arguments = {"prompt": "x", "image_url": ["http://127.0.0.1/x.png", picture], **SMALL}
    schedule = Schedule(
        **{**ENTRY, "endpoint": "fal-ai/z-image/turbo/image-to-image", "arguments": arguments}
    )
    ran, _ = on_a_platform(
        tmp_path, engine, lambda p: run(p, schedule, AT, "http://host", saving_below(tmp_path))
    )
    assert [each.error is not None for each in ran] == [True, False]
    assert "download" in ran[0].error and len(ran[1].pictures) == 1


def test_keep_runs_what_is_due(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = Schedule(**{**ENTRY, "arguments": {"prompt": "x", **SMALL}})
    dates = iter([timedelta(seconds=0.1), timedelta(seconds=0.3), timedelta(days=1)])
    monkeypatch.setattr(Schedule, "next", lambda self, now: now + next(dates))

    saved: asyncio.Queue[str] = asyncio.Queue()

    async def save(path: str, data: bytes) -> None:
        await saved.put(path)

    async def for_a_while(platform: LocalPlatform) -> None:
        keeping = asyncio.create_task(keep(platform, [schedule], "http://host", save))
        async with asyncio.timeout(60):
            for _ in range(2):
                await saved.get()
        keeping.cancel()

    _, counting = on_a_platform(tmp_path, engine, for_a_while)
    assert len(counting.tasks) == 2


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    path = tmp_path / "schedules.toml"
    unreachable = ARGUMENTS + 'image_url="http://127.0.0.1/x.png"\n'
    path.write_text(
        MINIMAL + 'output="new"\n' + ARGUMENTS + "num_inference_steps=1\n"
        "image_size={width=64, height=48}\n"
        + MINIMAL.replace('"a"', '"b"').replace("turbo", "turbo/image-to-image")
        + unreachable
    )
    shared = ["--file", str(path)]
    listing = CliRunner().invoke(app, ["schedule", "list", *shared])
    assert listing.exit_code == 0 and "07:00 UTC" in listing.stdout
    options = [*shared, "--home", str(tmp_path / "home"), "--at", "2026-03-05 08:00:00"]
    made = CliRunner().invoke(app, ["schedule", "run", "a", *options])
    assert made.exit_code == 0, made.output
    (picture,) = (tmp_path / "new").glob("2026-03-05T*-a-000-0.png")
    assert str(picture) in made.stdout and not list(elsewhere.iterdir())
    failing = CliRunner().invoke(app, ["schedule", "run", "b", *options])
    assert failing.exit_code == 1 and "1 requests failed" in failing.output
    missing = CliRunner().invoke(app, ["schedule", "run", "c", *options])
    assert missing.exit_code == 2 and "no schedule 'c'; there is a, b" in missing.output
    nothing = CliRunner().invoke(app, ["schedule", "list"])
    assert nothing.exit_code == 2 and "ZIMAGE_SCHEDULES" in nothing.output
