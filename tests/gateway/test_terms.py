"""How a caller wants a request handled: fal's headers, over a real socket and into the records."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from gateway.jobs import Job, Terms
from gateway.platforms.records import Records
from gateway.terms import read_terms
from inference.engine import Engine
from schemas.errors import InputError, QueueFull
from tests.conftest import T2I, Server, serving

SMALL = {"prompt": "x", "image_size": {"width": 64, "height": 64}, "seed": 1}


@pytest.fixture
def held(tmp_path: Path, engine: Engine) -> Iterator[Server]:
    with serving(tmp_path, engine) as server:
        server.engine.gate.clear()
        yield server


def submit(server: Server, headers: dict[str, str] | None = None, **query: Any) -> Any:
    return server.http.post(f"/queue{T2I}", json=SMALL, headers=headers, params=query)


def occupy(server: Server) -> list[str]:
    """Requests that hold every place that is not the queue; their status URLs."""
    urls = [submit(server).json()["status_url"] for _ in range(4)]
    while {server.http.get(url).json()["status"] for url in urls} != {"IN_PROGRESS"}:
        time.sleep(0.01)
    return urls


def test_a_request_that_does_not_start_in_time_is_a_504(held: Server) -> None:
    occupy(held)
    accepted = submit(held, {"X-Fal-Request-Timeout": "0.3"}).json()
    status = held.wait(accepted["status_url"])
    assert status["error_type"] == "request_timeout"
    result = held.http.get(accepted["response_url"])
    assert (result.status_code, result.json()) == snapshot(
        (
            504,
            {
                "detail": "Request timed out",
                "error_type": "request_timeout",
                "message": "Request timed out",
            },
        )
    )
    assert result.headers["x-fal-request-timeout-type"] == "user"
    run = held.http.post(T2I, json=SMALL, headers={"x-fal-request-timeout": "0.2"})
    assert run.status_code == 504
    assert run.headers["x-fal-request-timeout-type"] == "user"
    assert len(held.engine.tasks) <= 4


def test_a_request_that_starts_in_time_may_take_longer(tmp_path: Path, engine: Engine) -> None:
    with serving(tmp_path, engine) as server:
        server.engine.gate.clear()
        accepted = submit(server, {"X-Fal-Request-Timeout": "0.2"}).json()
        time.sleep(0.4)
        server.engine.gate.set()
        assert "error" not in server.wait(accepted["status_url"])


def test_a_deadline_survives_a_restart(tmp_path: Path, engine: Engine) -> None:
    with serving(tmp_path, engine) as server:
        server.engine.gate.clear()
        occupy(server)
        accepted = submit(server, {"X-Fal-Request-Timeout": "1"}).json()
    time.sleep(1)
    with serving(tmp_path, engine) as server:
        path = accepted["status_url"].split("/", 3)[3]
        assert server.wait(f"/{path}")["error_type"] == "request_timeout"


def test_low_priority_waits_behind_all_others(held: Server) -> None:
    occupy(held)
    low = submit(held, {"X-Fal-Queue-Priority": "low"}).json()
    normal = submit(held, {"X-Fal-Queue-Priority": "normal"}).json()
    positions = [
        held.http.get(accepted["status_url"]).json()["queue_position"] for accepted in (low, normal)
    ]
    assert positions == [1, 0]


def test_a_full_queue_is_a_429(held: Server) -> None:
    occupy(held)
    assert submit(held, fal_max_queue_length=1).status_code == 200
    refused = submit(held, fal_max_queue_length=1)
    assert (refused.status_code, refused.json()) == snapshot(
        (
            429,
            {
                "detail": "Queue is full: 1 requests are waiting",
                "error_type": "concurrent_requests_limit",
                "message": "Queue is full: 1 requests are waiting",
            },
        )
    )
    assert refused.headers["x-fal-needs-retry"] == "1"
    assert submit(held, fal_max_queue_length=2).status_code == 200


def test_one_idempotency_key_is_one_request(held: Server) -> None:
    first, second = (submit(held, {"Idempotency-Key": "k"}).json() for _ in range(2))
    assert first["request_id"] == second["request_id"]
    other = submit(held, {"Idempotency-Key": "another"}).json()
    assert other["request_id"] != first["request_id"]
    changed = held.http.post(
        f"/queue{T2I}", json={**SMALL, "seed": 2}, headers={"Idempotency-Key": "k"}
    )
    assert changed.status_code == 422
    assert changed.json()["detail"][0]["loc"] == ["header", "Idempotency-Key"]
    held.engine.gate.set()
    again = held.http.post(T2I, json=SMALL, headers={"Idempotency-Key": "k"})
    assert again.headers["x-fal-request-id"] == first["request_id"]
    held.wait(other["status_url"])
    assert len(held.engine.tasks) == 2


@pytest.mark.parametrize(
    ("headers", "query", "loc"),
    [
        ({"x-fal-request-timeout": "soon"}, {}, ("header", "X-Fal-Request-Timeout")),
        ({"x-fal-request-timeout": "0"}, {}, ("header", "X-Fal-Request-Timeout")),
        ({"x-fal-request-timeout": "nan"}, {}, ("header", "X-Fal-Request-Timeout")),
        ({"x-fal-queue-priority": "urgent"}, {}, ("header", "X-Fal-Queue-Priority")),
        ({"idempotency-key": ""}, {}, ("header", "Idempotency-Key")),
        ({}, {"fal_max_queue_length": "0"}, ("query", "fal_max_queue_length")),
    ],
)
def test_terms_that_make_no_sense_are_refused(
    held: Server, headers: dict[str, str], query: dict[str, str], loc: tuple[str, str]
) -> None:
    answer = submit(held, headers, **query)
    assert answer.status_code == 422
    (entry,) = answer.json()["detail"]
    assert tuple(entry["loc"]) == loc
    assert loc[1] in answer.json()["message"]


def test_what_headers_say() -> None:
    assert read_terms({}, {}) == Terms()
    headers = {
        "X-Fal-Request-Timeout": "30",
        "X-Fal-Queue-Priority": "low",
        "X-Fal-No-Retry": "yes",
        "X-Fal-Store-IO": "0",
    }
    assert read_terms(headers, {"fal_max_queue_length": "5"}) == Terms(
        start_timeout=30.0, low_priority=True, retry=False, store=False, max_queue_length=5
    )


def test_results_not_to_be_stored_are_not_kept(tmp_path: Path, engine: Engine) -> None:
    with serving(tmp_path, engine) as server:
        accepted = submit(server, {"X-Fal-Store-IO": "0"}).json()
        server.wait(accepted["status_url"])
        assert server.http.get(accepted["response_url"]).status_code == 200
    with sqlite3.connect(tmp_path / "zimage.db") as db:
        assert db.execute("SELECT kept FROM jobs").fetchall() == [(0,)]
    db.close()


def test_refused_jobs_leave_no_body_behind(tmp_path: Path) -> None:
    async def scenario() -> None:
        records = Records(tmp_path)
        body = b"x" * 100_000

        def job(name: str, **terms: Any) -> Job:
            return Job(name, "fal-ai/z-image/turbo", "key", "http://host", 1.0, Terms(**terms))

        await records.insert(job("a", idempotency_key="k"), body)
        assert (await records.insert(job("b", idempotency_key="k"), body)).request_id == "a"
        with pytest.raises(QueueFull):
            await records.insert(job("c", max_queue_length=1), body)
        with pytest.raises(InputError):
            await records.insert(job("d", idempotency_key="k"), body + b"y")
        assert [path.name for path in (tmp_path / "bodies").iterdir()] == ["a.input"]
        records.close()

    asyncio.run(scenario())
