"""Pictures on a schedule: a TOML file of entries, each a cron expression and the requests it makes.

    [[schedule]]
    name = "cards"
    cron = "0 7 * * *"                        # five fields, in `timezone`
    timezone = "Europe/Paris"
    endpoint = "fal-ai/z-image/turbo"
    key = "alice"                             # whose usage it is
    output = "cards/{date}"                   # a folder beside this file; without, they stay where all do
    webhook = "https://example.com/hook"
    [schedule.arguments]
    prompt = ["a fox on {date}", "an owl"]    # a list makes one request of each

A run belongs to the time it was due: its requests carry idempotency keys made of it, so that a run that
was interrupted, or started twice, makes each picture once.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import time
import tomllib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, get_origin
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from gateway.auth import ANONYMOUS, Keys
from gateway.ids import new_id
from gateway.inputs import parse
from gateway.jobs import Job, Terms
from gateway.platform import Platform
from gateway.terms import plain_url
from schemas.endpoints import ENDPOINTS
from schemas.errors import ApiError

logger = logging.getLogger(__name__)

AT_ONCE = 16
"""Requests of a run that are being submitted at a time."""

PAUSES = (1, 2, 4, 8, 16, 32, 60, 60, 60, 60)
"""Seconds before a request is submitted again where too many wait."""

LATE_SECONDS = 60.0
"""A clock is looked at this often, so that one that is set does not stop a schedule."""

Save = Callable[[str, bytes], Awaitable[None]]
"""Keeps a picture under a relative path."""


class ScheduleError(ValueError):
    """The file cannot be used; the message names the entry and the field."""


def _endpoint(value: str) -> str:
    if value not in ENDPOINTS:
        raise ValueError(f"must be one of {', '.join(ENDPOINTS)}")
    return value


def _cron(value: str) -> str:
    try:
        CronSim(value, datetime(2026, 1, 1))
    except CronSimError as error:
        raise ValueError(f"is no cron expression of five fields: {error}") from None
    if len(value.split()) != 5:
        raise ValueError("is no cron expression of five fields")
    return value


def _zone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, IsADirectoryError):
        raise ValueError("is no time zone, such as UTC or Europe/Paris") from None
    return value


def _folder(value: str) -> str:
    if not value or value.startswith("/") or ".." in value.split("/"):
        raise ValueError("must be a relative path without ..")
    return value.rstrip("/")


class Schedule(BaseModel):
    """One entry of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
    cron: Annotated[str, AfterValidator(_cron)]
    timezone: Annotated[str, AfterValidator(_zone)] = "UTC"
    endpoint: Annotated[str, AfterValidator(_endpoint)]
    arguments: dict[str, Any]
    key: str = ANONYMOUS
    output: Annotated[str, AfterValidator(_folder)] | None = None
    webhook: Annotated[str, AfterValidator(plain_url)] | None = None

    def due(self, now: datetime) -> datetime:
        """The last time it was due, at or before `now`."""
        minute = now.astimezone(ZoneInfo(self.timezone)).replace(second=0, microsecond=0)
        found = next(CronSim(self.cron, minute + timedelta(minutes=1), reverse=True))
        # Backwards, the second of two hours with one name is passed over; forwards it is not.
        for later in CronSim(self.cron, found):
            if later.timestamp() > now.timestamp():
                break
            found = later
        return found

    def next(self, now: datetime) -> datetime:
        """The next time it is due, after `now`."""
        return next(CronSim(self.cron, now.astimezone(ZoneInfo(self.timezone))))

    def requests(self, at: datetime) -> list[bytes]:
        """The bodies of its requests: every combination of the values of its lists."""
        names = list(self.arguments)
        # A field that is a list itself, as `loras`, is one value.
        fields = ENDPOINTS[self.endpoint].input.model_fields
        choices = [
            value
            if isinstance(value, list) and get_origin(fields[name].annotation) is not list
            else [value]
            for name, value in self.arguments.items()
        ]
        return [
            json.dumps(
                {name: _dated(value, at) for name, value in zip(names, values, strict=True)}
            ).encode()
            for values in itertools.product(*choices)
        ]


def _dated(value: Any, at: datetime) -> Any:
    """`{date}` and `{time}` filled in, wherever text is."""
    if isinstance(value, str):
        return value.replace("{date}", f"{at:%Y-%m-%d}").replace("{time}", f"{at:%H:%M}")
    if isinstance(value, dict):
        return {name: _dated(each, at) for name, each in value.items()}
    return value


def load(path: Path) -> list[Schedule]:
    """The entries of a file, checked to the last argument. Raises ScheduleError."""
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ScheduleError(f"{path}: {why}") from None
    if content.keys() - {"schedule"}:
        raise ScheduleError(f"{path}: only [[schedule]] entries belong here")
    entries = content.get("schedule", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ScheduleError(f"{path}: write [[schedule]] above each entry, with two brackets")
    found: dict[str, Schedule] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"{path}, schedule {entry.get('name', number)!r}"
        try:
            schedule = Schedule.model_validate(entry)
            known = ENDPOINTS[schedule.endpoint].input.model_fields.keys() - {"sync_mode"}
            if unknown := schedule.arguments.keys() - known:
                raise ScheduleError(f"{where}: arguments: no {', '.join(sorted(unknown))} here")
            for body in schedule.requests(schedule.next(datetime.now().astimezone())):
                parse(ENDPOINTS[schedule.endpoint], body)
        except ValidationError as error:
            raise ScheduleError(
                "; ".join(f"{where}: {text}" for text in _problems(error))
            ) from None
        except ApiError as error:
            raise ScheduleError(f"{where}: arguments: {error}") from None
        if schedule.name in found:
            raise ScheduleError(f"{where}: the name is taken")
        found[schedule.name] = schedule
    return list(found.values())


def check_keys(schedules: list[Schedule], keys: Keys | None) -> None:
    """Where keys are on, usage is somebody's. Raises ScheduleError."""
    for schedule in schedules:
        if keys and schedule.key not in keys:
            raise ScheduleError(
                f"schedule {schedule.name!r}: key: there is no key {schedule.key!r}"
            )


def _problems(error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        text = item["msg"].removeprefix("Value error, ")
        yield f"{'.'.join(map(str, item['loc']))} {text[0].lower()}{text[1:]}"


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of one request of a run. error: None if there are pictures."""

    request_id: str
    error: str | None
    pictures: list[str]


async def run(
    platform: Platform, schedule: Schedule, at: datetime, origin: str, save: Save
) -> list[Ran]:
    """Make the requests that were due at `at`, wait for all, keep their pictures.

    A request that is refused or fails stops no other. Raises ScheduleError for a webhook where there
    is no key to sign it.
    """
    if schedule.webhook is not None and platform.signer is None:
        raise ScheduleError(f"schedule {schedule.name}: webhook: ZIMAGE_WEBHOOK_KEY is not set")
    places = asyncio.Semaphore(AT_ONCE)

    async def submit(body: bytes, copy: int) -> Job:
        name = hashlib.sha256(body).hexdigest()[:16]  # of what it is, not of its place in the file
        terms = Terms(
            idempotency_key=f"schedule {schedule.name} {at.isoformat()} {name} {copy}",
            webhook=schedule.webhook,
        )
        for pause in (*PAUSES, None):
            job = Job(new_id(), schedule.endpoint, schedule.key, origin, time.time(), terms)
            try:
                return await platform.submit(job, body)
            except ApiError as error:
                if error.status != 429 or pause is None:
                    raise
            await asyncio.sleep(pause)
        raise AssertionError

    async def one(index: int, body: bytes) -> Ran:
        try:
            async with places:
                job = await submit(body, bodies[:index].count(body))
        except ApiError as error:
            logger.error("schedule %s: request %d: %s", schedule.name, index, error)
            return Ran("", str(error), [])
        outcome = await platform.wait(job.request_id)
        if outcome.status != 200:
            logger.error("schedule %s: %s: %s", schedule.name, job.request_id, outcome.error)
            return Ran(job.request_id, outcome.error, [])
        images = json.loads(outcome.body)["images"]
        if schedule.output is None:
            return Ran(job.request_id, None, [image["url"] for image in images])
        saved = []
        for number, image in enumerate(images):
            suffix = image["file_name"].rpartition(".")[2]
            folder = _dated(schedule.output, at)
            name = f"{at:%Y-%m-%dT%H%M%z}-{schedule.name}-{index:03d}-{number}.{suffix}"
            path = f"{folder}/{name}"
            data = await platform.files.get(image["file_name"])
            if data is not None:  # else a run repeated long after: it was saved then
                await save(path, data)
            saved.append(path)
        return Ran(job.request_id, None, saved)

    bodies = schedule.requests(at)
    logger.info("schedule %s, due %s: %d requests", schedule.name, at.isoformat(), len(bodies))
    return await asyncio.gather(*(one(index, body) for index, body in enumerate(bodies)))


async def keep(platform: Platform, schedules: list[Schedule], origin: str, save: Save) -> None:
    """Run every entry whenever it is due, until cancelled. What was due before is not made up for."""

    async def keep_one(schedule: Schedule) -> None:
        while True:
            at = schedule.next(datetime.now().astimezone())
            while (pause := at.timestamp() - time.time()) > 0:
                await asyncio.sleep(min(pause, LATE_SECONDS))
            try:
                await run(platform, schedule, at, origin, save)
            except Exception:
                logger.exception("schedule %s, due %s, failed", schedule.name, at.isoformat())

    await asyncio.gather(*(keep_one(schedule) for schedule in schedules))


def saving_below(folder: Path) -> Save:
    """Pictures as files below a folder."""

    def write(path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    async def save(path: str, data: bytes) -> None:
        await asyncio.to_thread(write, folder / path, data)

    return save
