"""`/proxy`: fal's URLs, chosen by a header, answered by us and never forwarded. And CORS."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from inference.engine import Engine
from tests.conftest import T2I, Server, serving

SMALL = {"prompt": "x", "image_size": {"width": 64, "height": 64}, "seed": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("home"), engine) as server:
        yield server


def proxied(server: Server, method: str, target: str, **kwargs: Any) -> Any:
    return server.http.request(method, "/proxy", headers={"x-fal-target-url": target}, **kwargs)


def test_run(server: Server) -> None:
    answer = proxied(server, "POST", f"https://fal.run{T2I}", json=SMALL)
    assert answer.status_code == 200 and len(answer.json()["images"]) == 1


def test_the_queue_from_submit_to_result(server: Server) -> None:
    queue = "https://queue.fal.run/fal-ai/z-image"
    accepted = proxied(server, "POST", f"{queue}/turbo?fal_max_queue_length=9", json=SMALL).json()
    request = f"{queue}/requests/{accepted['request_id']}"
    server.wait(accepted["status_url"])  # the URLs are ours
    status = proxied(server, "GET", f"{request}/status?logs=1").json()
    assert status["status"] == "COMPLETED" and status["logs"]
    assert proxied(server, "GET", request).json()["images"]
    assert proxied(server, "PUT", f"{request}/cancel").json()["status"] == "ALREADY_COMPLETED"


def test_errors_come_through(server: Server) -> None:
    answer = proxied(server, "POST", f"https://fal.run{T2I}", json={})
    assert answer.status_code == 422 and "prompt" in answer.json()["message"]


@pytest.mark.parametrize(
    "target",
    [
        "",
        "fal.run",
        f"http://fal.run{T2I}",
        f"https://fal.run:443{T2I}",
        f"https://user@fal.run{T2I}",
        f"https://fal.run.evil.example{T2I}",
        f"https://evil.example/fal.run{T2I}",
        "https://fal.run/proxy",
        "https://fal.run/health",
        "https://fal.run/queue/fal-ai/z-image/turbo",
        "https://rest.fal.ai/other",
        "https://[",
    ],
)
def test_other_targets_are_refused(server: Server, target: str) -> None:
    answer = proxied(server, "POST", target, json=SMALL)
    assert (answer.status_code, answer.json()["detail"]) == (400, "Invalid request")


def test_without_a_target(server: Server) -> None:
    assert server.http.get("/proxy").status_code == 400


def test_browsers_may_ask_from_anywhere(server: Server) -> None:
    page = {"Origin": "https://page.example"}
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-fal-queue-priority",
    }
    preflight = server.http.options(T2I, headers={**page, **asked})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "*"
    assert "x-fal-queue-priority" in preflight.headers["access-control-allow-headers"]
    assert "POST" in preflight.headers["access-control-allow-methods"]
    answer = server.http.post(T2I, json={}, headers=page)
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "x-fal-request-id" in answer.headers["access-control-expose-headers"]
