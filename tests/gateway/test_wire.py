"""The wire, frozen: every kind of answer, event and webhook as JSON files beside this one.

They are the record of what clients may rely on. A change that is meant: `pytest --inline-snapshot=fix`,
and read the diff. Ids, hosts, file names, times and durations are masked.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from inline_snapshot import external_file

from inference.engine import Engine
from tests.conftest import CAT, I2I, T2I, Server, serving
from tests.gateway.receiver import receiving

KEY = "alice:a-secret-long-enough"
AUTHORIZED = {"Authorization": f"Key {KEY}"}
SMALL = {"prompt": "x", "image_size": {"width": 64, "height": 64}, "seed": 1}
QUEUE = f"/queue{T2I}"

MASKS = (
    (re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"), "ID"),
    (re.compile(r"(localhost|127\.0\.0\.1):\d+"), "HOST"),
    (re.compile(r"[\w-]{32}\.\d{10}\.(?=png|jpeg|webp)"), "FILE."),
    (re.compile(r"(?<=token=)[\w.-]+"), "TOKEN"),
    (re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+(Z|\+00:00)"), "TIME"),
)
MEASURED = (
    "timings",
    "inference_time",
    "file_size",
    "x-fal-webhook-timestamp",
    "x-fal-webhook-signature",
)


def masked(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {
            key: masked(item, key if name not in MEASURED else name) for key, item in value.items()
        }
    if isinstance(value, list):
        return [masked(item, name) for item in value]
    if name in MEASURED:
        return "MEASURED"
    if isinstance(value, str):
        for pattern, mask in MASKS:
            value = pattern.sub(mask, value)
    return value


def exchange(answer: httpx2.Response) -> Any:
    headers = {
        name: value
        for name, value in sorted(answer.headers.items())
        if name.startswith("x-") or name in ("content-type", "www-authenticate", "allow")
    }
    text = answer.headers["content-type"].startswith("text/event-stream")
    return masked(
        {
            "status": answer.status_code,
            "headers": headers,
            "body": events(answer.text) if text else answer.json(),
        }
    )


def events(text: str) -> list[dict[str, Any]]:
    """Server-sent events. Which steps a reader sees is chance: one stands for all, and the last
    event has all the logs."""
    kinds: list[dict[str, Any]] = []
    logs: list[Any] = []
    for line in text.splitlines():
        if not line.startswith("data: "):
            continue
        event = json.loads(line.removeprefix("data: "))
        if "progress" in event:
            event["progress"] |= {"step": "STEP", "fraction": "FRACTION"}
        if "logs" in event:
            logs += event["logs"]
            event["logs"] = []
        if event not in kinds:
            kinds.append(event)
    if logs:
        kinds[-1]["logs"] = logs
    return kinds


def kept(name: str, answer: httpx2.Response | dict[str, Any]) -> None:
    found = answer if isinstance(answer, dict) else exchange(answer)
    assert found == external_file(f"wire/{name}.json")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("home"), engine, keys=KEY) as server:
        server.http.headers.update(AUTHORIZED)
        yield server


@pytest.fixture(autouse=True)
def idle_again(server: Server) -> Iterator[None]:
    yield
    server.engine.gate.set()
    server.engine.broken = False
    while server.unfinished():
        time.sleep(0.01)


def submitted(server: Server, **options: Any) -> dict[str, str]:
    return dict(server.http.post(QUEUE, json=SMALL, **options).json())


def begun(server: Server, urls: dict[str, str]) -> None:
    while server.http.get(urls["status_url"]).json()["status"] == "IN_QUEUE":
        time.sleep(0.01)


def test_a_request_that_succeeds(server: Server) -> None:
    server.engine.gate.clear()
    answer = server.http.post(QUEUE, json=SMALL)
    kept("submit", answer)
    urls = answer.json()
    begun(server, urls)
    kept("status-in-progress", server.http.get(urls["status_url"], params={"logs": 1}))
    kept("result-too-early", server.http.get(urls["response_url"]))
    waiting = submitted(server)
    second = submitted(server)
    kept("status-in-queue", server.http.get(second["status_url"]))
    server.engine.gate.set()
    for each in (urls, waiting, second):
        server.wait(each["status_url"])
    kept("status-completed", server.http.get(urls["status_url"], params={"logs": 1}))
    kept("result", server.http.get(urls["response_url"]))
    kept("cancel-too-late", server.http.put(urls["cancel_url"]))
    kept("run", server.http.post(T2I, json=SMALL))


def test_a_request_that_is_cancelled(server: Server) -> None:
    server.engine.gate.clear()
    urls = submitted(server)
    kept("cancel", server.http.put(urls["cancel_url"]))
    server.wait(urls["status_url"])
    kept("status-cancelled", server.http.get(urls["status_url"], params={"logs": 1}))
    kept("result-cancelled", server.http.get(urls["response_url"]))


def test_a_request_that_fails(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.engine.broken = True
    urls = submitted(server)
    server.wait(urls["status_url"])
    kept("status-failed", server.http.get(urls["status_url"], params={"logs": 1}))
    kept("result-failed", server.http.get(urls["response_url"]))
    assert "a broken engine" in caplog.text  # ours to know, not the caller's


ERRORS: dict[str, Callable[[Server], httpx2.Response]] = {
    "missing-field": lambda s: s.http.post(T2I, json={}),
    "several-fields": lambda s: s.http.post(
        I2I, json={"image_url": "", "prompt": 1, "strength": 2, "num_inference_steps": 0}
    ),
    "unknown-value": lambda s: s.http.post(T2I, json={**SMALL, "output_format": "gif"}),
    "size-out-of-range": lambda s: s.http.post(
        T2I, json={**SMALL, "image_size": {"width": 63, "height": 64}}
    ),
    "not-json": lambda s: s.http.post(T2I, content=b"{"),
    "not-a-picture": lambda s: s.http.post(
        I2I, json={"prompt": "x", "image_url": "data:image/png;base64,AAAA"}
    ),
    "picture-not-there": lambda s: s.http.post(
        I2I, json={"prompt": "x", "image_url": f"{s.url}/files/none.png"}
    ),
    "forbidden-address": lambda s: s.http.post(
        I2I, json={"prompt": "x", "image_url": "http://169.254.169.254/latest"}
    ),
    "wrong-key": lambda s: s.http.post(T2I, json=SMALL, headers={"Authorization": "Key a:b"}),
    "unknown-request": lambda s: s.http.get(
        "/queue/fal-ai/z-image/requests/00000000-0000-0000-0000-000000000000"
    ),
    "unknown-endpoint": lambda s: s.http.post("/fal-ai/other", json=SMALL),
    "wrong-method": lambda s: s.http.get(T2I),
    "queue-full": lambda s: busy(s).http.post(
        QUEUE, json=SMALL, params={"fal_max_queue_length": 1}
    ),
    "start-timeout": lambda s: busy(s).http.post(
        T2I, json=SMALL, headers={"X-Fal-Request-Timeout": "0.2"}
    ),
    "bad-header": lambda s: s.http.post(QUEUE, json=SMALL, headers={"X-Fal-Request-Timeout": "-"}),
    "proxy-elsewhere": lambda s: s.http.post(
        "/proxy", json=SMALL, headers={"x-fal-target-url": "https://example.com/"}
    ),
}


def busy(server: Server) -> Server:
    """More requests than can be under way, so that the next one waits."""
    server.engine.gate.clear()
    for _ in range(6):
        submitted(server)
    return server


@pytest.mark.parametrize("name", ERRORS)
def test_errors(server: Server, name: str) -> None:
    kept(f"error-{name}", ERRORS[name](server))


def test_events_of_a_status_stream(server: Server) -> None:
    server.engine.gate.clear()
    urls = submitted(server)
    begun(server, urls)
    threading.Timer(0.2, server.engine.gate.set).start()
    kept("status-stream", server.http.get(f"{urls['status_url']}/stream", params={"logs": 1}))


def test_events_of_a_stream(server: Server) -> None:
    kept("stream", server.http.post(f"{T2I}/stream", json=SMALL))


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
def test_webhooks(server: Server, end: str) -> None:
    server.engine.broken = end == "failed"
    if end == "cancelled":
        server.engine.gate.clear()
    with receiving() as receiver:
        urls = submitted(server, params={"fal_webhook": receiver.url})
        if end == "cancelled":
            server.http.put(urls["cancel_url"])
        ((headers, body),) = receiver.wait(1)
    sent = {name: value for name, value in sorted(headers.items()) if name.startswith("x-fal")}
    kept(f"webhook-{end}", masked({"headers": sent, "body": json.loads(body)}))


def test_an_upload(server: Server) -> None:
    params = {"storage_type": "fal-cdn-v3"}
    body = {"content_type": "image/jpeg", "file_name": CAT.name}
    kept(
        "upload-initiate",
        server.http.post("/rest/storage/upload/initiate", json=body, params=params),
    )


def test_every_file_is_of_a_test() -> None:
    """What no test looks at would be no promise."""
    source = Path(__file__).read_text()
    for path in (Path(__file__).parent / "wire").iterdir():
        name = path.stem
        assert f'"{name}"' in source or name.removeprefix("error-") in ERRORS or "webhook-" in name
