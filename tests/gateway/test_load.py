"""Bursts and crashes, over an engine that takes no time: nothing lost, nothing doubled."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import httpx2

from tests.conftest import ROOT, T2I
from tests.gateway.processes import free_port, running
from tests.gateway.receiver import receiving

JOB = {"prompt": "x", "image_size": {"width": 64, "height": 64}}
CLIENTS, JOBS, KILLS = 50, 20, 20


def serve(
    home: Path, port: int, **environment: str
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    command = [sys.executable, ROOT / "scripts" / "no_op_server.py", home, str(port)]
    return running(command, home.parent / "log", port, **environment)


def records(home: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(home / "zimage.db", timeout=20)) as db:
        return db.execute(query).fetchall()


def until_all_done(home: Path) -> None:
    while records(home, "SELECT 1 FROM jobs WHERE status!='COMPLETED' LIMIT 1"):
        time.sleep(0.05)


def test_a_thousand_jobs_from_fifty_clients(tmp_path: Path) -> None:
    home, port = tmp_path / "home", free_port()

    def client(number: int) -> list[str]:
        priority = {"X-Fal-Queue-Priority": "low" if number % 5 == 0 else "normal"}
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            answers = [http.post(f"/queue{T2I}", json=JOB, headers=priority) for _ in range(JOBS)]
            for answer in answers:
                while http.get(answer.json()["status_url"]).json()["status"] != "COMPLETED":
                    time.sleep(0.05)
            assert {http.get(a.json()["response_url"]).status_code for a in answers} == {200}
            return [answer.json()["request_id"] for answer in answers]

    with serve(home, port), ThreadPoolExecutor(CLIENTS) as threads:
        ids = [id for ids in threads.map(client, range(CLIENTS)) for id in ids]
    rows = records(
        home,
        "SELECT request_id, low_priority, started, attempts, http_status FROM jobs ORDER BY sequence",
    )
    assert sorted(ids) == sorted(row[0] for row in rows) and len(set(ids)) == CLIENTS * JOBS
    assert {row[3:] for row in rows} == {(1, 200)}
    for low in (0, 1):
        started = [row[2] for row in rows if row[1] == low]
        assert started == sorted(started)


def test_killed_twenty_times(tmp_path: Path) -> None:
    home, port = tmp_path / "home", free_port()
    base, moments = f"http://127.0.0.1:{port}", random.Random(4)
    accepted: list[str] = []
    stop = threading.Event()

    def client(url: str) -> None:
        with httpx2.Client(base_url=base, timeout=60) as http:
            while not stop.is_set():
                try:
                    answer = http.post(f"/queue{T2I}", json=JOB, params={"fal_webhook": url})
                    accepted.append(answer.json()["request_id"])
                except httpx2.TransportError:  # killed; what was not answered was not accepted
                    time.sleep(0.02)

    with receiving() as receiver, ThreadPoolExecutor(2) as threads:
        running = [threads.submit(client, receiver.url) for _ in range(2)]
        for _ in range(KILLS):
            with serve(home, port) as process:
                time.sleep(moments.uniform(0.0, 0.3))
                process.kill()
                process.wait()
        stop.set()
        for future in running:
            future.result()
        with serve(home, port):
            until_all_done(home)
            while records(home, "SELECT 1 FROM webhooks WHERE due IS NOT NULL LIMIT 1"):
                time.sleep(0.05)
    assert len(accepted) > KILLS
    known = dict(records(home, "SELECT request_id, http_status FROM jobs"))
    assert len(set(accepted)) == len(accepted)
    assert {known[request_id] for request_id in accepted} == {200}
    told = Counter(json.loads(body)["request_id"] for _, body in receiver.got)
    assert set(told) == set(known)


def test_what_was_answered_is_on_record_whenever_it_is_killed(tmp_path: Path) -> None:
    """Sync requests from many clients, whose jobs share transactions, and kill -9 among them."""
    home, port, moments = tmp_path / "home", free_port(), random.Random(5)
    answered: list[str] = []

    def client(_: int) -> None:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            try:
                while True:
                    answer = http.post(T2I, json=JOB)
                    assert answer.status_code == 200
                    answered.append(answer.headers["x-fal-request-id"])
            except httpx2.TransportError:  # killed
                pass

    with ThreadPoolExecutor(16) as threads:
        for _ in range(4):
            with serve(home, port) as process:
                clients = [threads.submit(client, number) for number in range(16)]
                time.sleep(moments.uniform(0.3, 0.8))
                process.kill()
                process.wait()
            for future in clients:
                future.result()
            known = dict(records(home, "SELECT request_id, http_status FROM jobs"))
            assert answered and {known.get(request_id) for request_id in answered} == {200}
