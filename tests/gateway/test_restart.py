"""kill -9 in the middle of a job, start again: the job completes, once. The real `zimage serve`."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import httpx2

from tests.conftest import T2I
from tests.gateway.processes import free_port, running

ZIMAGE = Path(sys.executable).parent / "zimage"
JOB = {"prompt": "x", "image_size": {"width": 384, "height": 384}, "num_images": 4, "seed": 3}


def serve(home: Path, port: int) -> AbstractContextManager[subprocess.Popen[bytes]]:
    command = [ZIMAGE, "serve", "--home", home, "--port", str(port)]
    return running(command, home.parent / "log", port)


def test_a_killed_server_loses_nothing(tmp_path: Path) -> None:
    home, port = tmp_path / "home", free_port()
    base = f"http://127.0.0.1:{port}"
    with serve(home, port) as process, httpx2.Client(base_url=base, timeout=60) as http:
        running = http.post(f"/queue{T2I}", json=JOB).json()
        queued = [http.post(f"/queue{T2I}", json=JOB).json() for _ in range(6)]
        while not http.get(running["status_url"]).json().get("progress"):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()

    with serve(home, port) as process, httpx2.Client(base_url=base, timeout=60) as http:
        files: list[list[bytes]] = []
        for job in (running, *queued):
            while http.get(job["status_url"]).json()["status"] != "COMPLETED":
                time.sleep(0.02)
            result = http.get(job["response_url"])
            assert result.status_code == 200
            files.append([http.get(image["url"]).content for image in result.json()["images"]])
        assert all(each == files[0] for each in files)  # the same request, the same pictures
        process.send_signal(signal.SIGTERM)
        process.wait(20)

    with sqlite3.connect(home / "zimage.db") as db:
        rows = db.execute(
            "SELECT request_id, status, attempts FROM jobs ORDER BY sequence"
        ).fetchall()
    db.close()
    assert [row[0] for row in rows] == [job["request_id"] for job in (running, *queued)]
    assert {row[1] for row in rows} == {"COMPLETED"}
    assert rows[0][2] == 2  # interrupted once, completed once


def test_a_caller_that_disconnects_loses_nothing(tmp_path: Path) -> None:
    home, port = tmp_path / "home", free_port()
    with serve(home, port):
        try:
            httpx2.post(f"http://127.0.0.1:{port}{T2I}", json=JOB, timeout=0.3)
            raise AssertionError("the request was answered before it could be given up")
        except httpx2.TimeoutException:
            pass
        with sqlite3.connect(home / "zimage.db") as db:
            ((request_id,),) = db.execute("SELECT request_id FROM jobs").fetchall()
        db.close()
        url = f"http://127.0.0.1:{port}/queue/fal-ai/z-image/requests/{request_id}"
        while httpx2.get(f"{url}/status").json()["status"] != "COMPLETED":
            time.sleep(0.02)
        assert len(httpx2.get(url).json()["images"]) == 4


def test_a_home_belongs_to_one_process(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with serve(home, free_port()):
        second = subprocess.run(
            [ZIMAGE, "serve", "--home", home, "--port", str(free_port())],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert second.returncode == 2
    assert "in use by another zimage process" in " ".join(second.stderr.split())


def test_a_stopping_server_tells_its_callers(tmp_path: Path) -> None:
    """503 with the request's id, after the grace period; and the request is done after the restart."""
    home, port = tmp_path / "home", free_port()
    base = f"http://127.0.0.1:{port}"
    long = {**JOB, "image_size": {"width": 1024, "height": 1024}}
    with ThreadPoolExecutor() as threads:
        with serve(home, port) as process:
            waiting = threads.submit(httpx2.post, base + T2I, json=long, timeout=60)
            with sqlite3.connect(home / "zimage.db") as db:
                while not db.execute("SELECT 1 FROM jobs WHERE attempts > 0").fetchall():
                    time.sleep(0.05)
            db.close()
            process.send_signal(signal.SIGTERM)
            process.wait(40)
        answer = waiting.result()
    if answer.status_code == 200:  # a machine so fast that the grace period was enough
        return
    assert (answer.status_code, answer.json()["error_type"]) == (503, "runner_disconnected")
    with sqlite3.connect(home / "zimage.db") as db:
        rows = db.execute("SELECT request_id, status, attempts FROM jobs").fetchall()
    db.close()
    assert rows == [(answer.headers["x-fal-request-id"], "IN_QUEUE", 0)]
    assert "Traceback" not in (tmp_path / "log").read_text()
