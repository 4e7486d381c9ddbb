"""The queue over a real socket: submit, status, logs, result, cancel; both path forms; Host."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from inference.engine import Engine
from tests.conftest import I2I, T2I, Server, serving

SMALL = {"prompt": "x", "image_size": {"width": 64, "height": 64}, "seed": 1}
RUNNING = dict.fromkeys(("detail", "message"), "Request is still in progress")
MISSING = {"status": "NOT_FOUND", "message": "Request not found"}
LARGE = {"prompt": "x", "image_size": {"width": 512, "height": 512}, "num_images": 4}


@pytest.fixture
def held(tmp_path: Path, engine: Engine) -> Iterator[Server]:
    """A server whose engine waits for the gate, so that states can be looked at."""
    with serving(tmp_path, engine) as server:
        server.engine.gate.clear()
        yield server


def submit(server: Server, body: dict[str, Any] = SMALL, path: str = T2I) -> dict[str, Any]:
    answer = server.http.post(f"/queue{path}", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-fal-request-id"] == answer.json()["request_id"]
    return dict(answer.json())


def until(server: Server, url: str, status: str) -> dict[str, Any]:
    while (answer := server.http.get(url).json())["status"] != status:
        time.sleep(0.005)
    return dict(answer)


def anonymous(server: Server, body: Any) -> Any:
    """A body with what differs between runs replaced."""
    text = json.dumps(body).replace(server.url, "http://HOST")
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.+]+", "TIME", text)
    text = re.sub(r'"inference_time": [\d.]+', '"inference_time": 0', text)
    return json.loads(text)


def test_the_whole_way(held: Server) -> None:
    server = held
    accepted = submit(server)
    assert anonymous(server, accepted) == snapshot(
        {
            "status": "IN_QUEUE",
            "request_id": "ID",
            "response_url": "http://HOST/queue/fal-ai/z-image/requests/ID",
            "status_url": "http://HOST/queue/fal-ai/z-image/requests/ID/status",
            "cancel_url": "http://HOST/queue/fal-ai/z-image/requests/ID/cancel",
            "queue_position": 0,
        }
    )
    waiting = [submit(server) for _ in range(6)]
    until(server, accepted["status_url"], "IN_PROGRESS")
    running = server.http.get(accepted["status_url"], params={"logs": 1})
    assert running.status_code == 202
    assert anonymous(server, running.json()) == snapshot(
        {
            "status": "IN_PROGRESS",
            "request_id": "ID",
            "response_url": "http://HOST/queue/fal-ai/z-image/requests/ID",
            "status_url": "http://HOST/queue/fal-ai/z-image/requests/ID/status",
            "cancel_url": "http://HOST/queue/fal-ai/z-image/requests/ID/cancel",
            "logs": [],
            "metrics": {},
        }
    )
    positions = [server.http.get(each["status_url"]).json() for each in waiting]
    assert [each.get("queue_position") for each in positions if each["status"] == "IN_QUEUE"] == [
        0,
        1,
        2,
    ]
    early = server.http.get(accepted["response_url"])
    assert (early.status_code, early.json()) == (
        400,
        dict.fromkeys(("detail", "message"), "Request is still in progress"),
    )

    server.engine.gate.set()
    server.wait(accepted["status_url"])
    done = server.http.get(accepted["status_url"], params={"logs": "true"})
    assert done.status_code == 200
    assert anonymous(server, done.json()) == snapshot(
        {
            "status": "COMPLETED",
            "request_id": "ID",
            "response_url": "http://HOST/queue/fal-ai/z-image/requests/ID",
            "status_url": "http://HOST/queue/fal-ai/z-image/requests/ID/status",
            "cancel_url": "http://HOST/queue/fal-ai/z-image/requests/ID/cancel",
            "logs": [
                {
                    "message": "image 1/1: step 1/8",
                    "level": "INFO",
                    "source": "USER",
                    "timestamp": "TIME",
                    "labels": {},
                },
                {
                    "message": "image 1/1: step 2/8",
                    "level": "INFO",
                    "source": "USER",
                    "timestamp": "TIME",
                    "labels": {},
                },
                {
                    "message": "image 1/1: step 3/8",
                    "level": "INFO",
                    "source": "USER",
                    "timestamp": "TIME",
                    "labels": {},
                },
                {
                    "message": "image 1/1: step 4/8",
                    "level": "INFO",
                    "source": "USER",
                    "timestamp": "TIME",
                    "labels": {},
                },
                {
                    "message": "image 1/1: step 5/8",
                    "level": "INFO",
                    "source": "USER",
                    "timestamp": "TIME",
                    "labels": {},
                },
                {
                    "message": "image 1/1: step 6/8",
                    "level": "INFO",
                    "source": "USER",
                    "timestamp": "TIME",
                    "labels": {},
                },
                {
                    "message": "image 1/1: step 7/8",
                    "level": "INFO",
                    "source": "USER",
                    "timestamp": "TIME",
                    "labels": {},
                },
                {
                    "message": "image 1/1: step 8/8",
                    "level": "INFO",
                    "source": "USER",
                    "timestamp": "TIME",
                    "labels": {},
                },
            ],
            "metrics": {"inference_time": 0},
        }
    )
    result = server.http.get(accepted["response_url"])
    assert result.status_code == 200
    assert result.headers["x-fal-request-id"] == accepted["request_id"]
    assert float(result.headers["x-fal-billable-units"]) == pytest.approx(64 * 64 / 1024**2)
    assert result.json()["seed"] == 1
    for each in waiting:
        server.wait(each["status_url"])


def test_logs_only_when_asked_for(server: Server) -> None:
    url = submit(server)["status_url"]
    server.wait(url)
    for query, some in [("", False), ("?logs=0", False), ("?logs=false", False), ("?logs=1", True)]:
        assert bool(server.http.get(url + query).json()["logs"]) is some


def test_both_path_forms_and_response(server: Server) -> None:
    accepted = submit(server)
    request_id = accepted["request_id"]
    server.wait(accepted["status_url"])
    for base in ("/queue/fal-ai/z-image", f"/queue{T2I}"):
        assert server.http.get(f"{base}/requests/{request_id}").status_code == 200
        assert server.http.get(f"{base}/requests/{request_id}/response").status_code == 200
        assert server.http.get(f"{base}/requests/{request_id}/status").status_code == 200
    for base in ("/queue/fal-ai/flux", f"/queue{I2I}"):
        assert server.http.get(f"{base}/requests/{request_id}").status_code == 404


def test_a_host_named_queue_is_the_queue(server: Server) -> None:
    host = {"host": f"queue.localhost:{server.port}"}
    accepted = server.http.post(T2I, json=SMALL, headers=host).json()
    assert accepted["status"] == "IN_QUEUE"
    assert accepted["status_url"].startswith(
        f"http://queue.localhost:{server.port}/fal-ai/z-image/"
    )
    path = accepted["status_url"].partition(f":{server.port}")[2]
    server.wait(path, headers=host)
    result = server.http.get(path.removesuffix("/status"), headers=host).json()
    (image,) = result["images"]
    assert server.http.get(image["url"].partition(f":{server.port}")[2]).status_code == 200


def test_unknown_requests(server: Server) -> None:
    url = "/queue/fal-ai/z-image/requests/00000000-0000-0000-0000-000000000000"
    for answer in (
        server.http.get(url),
        server.http.get(f"{url}/status"),
        server.http.put(f"{url}/cancel"),
    ):
        assert (answer.status_code, answer.json()) == (404, MISSING)


def test_bad_input_is_refused_at_submit(server: Server) -> None:
    answer = server.http.post(f"/queue{T2I}", json={"prompt": "x", "num_images": 9})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "num_images"]


def test_a_picture_that_cannot_be_read_fails_the_job(server: Server) -> None:
    body = {"prompt": "x", "image_url": "data:;base64,AAAA"}
    accepted = submit(server, body, I2I)
    status = server.wait(accepted["status_url"])
    assert status["error_type"] == "unsupported_image_format"
    assert "image_url" in status["error"]
    result = server.http.get(accepted["response_url"])
    assert result.status_code == 422
    assert result.headers["x-fal-billable-units"] == "0"
    assert result.headers["x-fal-error-type"] == "unsupported_image_format"
    assert anonymous(server, result.json()) == snapshot(
        {
            "detail": [
                {
                    "loc": ["body", "image_url"],
                    "msg": "Unsupported or unrecognized image format",
                    "type": "unsupported_image_format",
                    "url": "https://docs.fal.ai/errors#unsupported_image_format",
                    "ctx": {
                        "supported_formats": [".jpg", ".jpeg", ".png", ".webp", ".gif", ".avif"]
                    },
                }
            ],
            "message": "image_url: Unsupported or unrecognized image format",
        }
    )


def test_cancel_in_the_queue(held: Server) -> None:
    accepted = [submit(held) for _ in range(8)]
    last = accepted[-1]
    answer = held.http.put(last["cancel_url"])
    assert (answer.status_code, answer.json()) == (202, {"status": "CANCELLATION_REQUESTED"})
    assert answer.headers["x-fal-request-id"] == last["request_id"]
    status = held.http.get(last["status_url"]).json()
    assert (status["status"], status["error_type"]) == ("COMPLETED", "client_cancelled")
    again = held.http.put(last["cancel_url"])
    assert (again.status_code, again.json()) == (400, {"status": "ALREADY_COMPLETED"})
    result = held.http.get(last["response_url"])
    assert result.status_code == 499
    assert anonymous(held, result.json()) == snapshot(
        {
            "detail": "Request was cancelled by the client",
            "error_type": "client_cancelled",
            "message": "Request was cancelled by the client",
        }
    )
    held.engine.gate.set()
    for each in accepted[:-1]:
        assert "error" not in held.wait(each["status_url"])
    assert len(held.engine.tasks) == 7


def test_cancel_while_denoising_stops_the_engine(server: Server) -> None:
    before = server.engine.cancelled
    accepted = submit(server, LARGE)
    while not (status := server.http.get(accepted["status_url"]).json()).get("progress"):
        assert status["status"] != "COMPLETED"
    assert status["progress"]["images"] == 4
    assert server.http.put(accepted["cancel_url"]).status_code == 202
    status = server.wait(accepted["status_url"])
    assert status["error_type"] == "client_cancelled"
    assert server.engine.cancelled == before + 1
    assert server.http.get(accepted["response_url"]).status_code == 499
    assert server.http.post(T2I, json=SMALL).status_code == 200  # and the engine is well


def test_progress_is_visible_while_it_runs(server: Server) -> None:
    accepted = submit(server, LARGE)
    fractions: list[float] = []
    while (status := server.http.get(accepted["status_url"] + "?logs=1").json())[
        "status"
    ] != "COMPLETED":
        if progress := status.get("progress"):
            fractions.append(progress["fraction"])
            assert status["logs"][0]["message"].startswith("image ")
    assert len(set(fractions)) > 4 and fractions == sorted(fractions)


def test_keys_see_their_own_requests_only(tmp_path: Path, engine: Engine) -> None:
    keys = "alice:secret-of-alice-long,bob:secret-of-bob-longer"
    alice = {"authorization": "Key alice:secret-of-alice-long"}
    bob = {"authorization": "Key bob:secret-of-bob-longer"}
    with serving(tmp_path, engine, keys=keys) as server:
        refused = server.http.post(T2I, json=SMALL)
        assert (refused.status_code, refused.json()) == (
            401,
            dict.fromkeys(("detail", "message"), "Authorization header is required"),
        )
        assert refused.headers["x-fal-request-id"]
        accepted = server.http.post(f"/queue{T2I}", json=SMALL, headers=alice).json()
        url = accepted["status_url"]
        server.wait(url, headers=alice)
        assert server.http.get(url).status_code == 401
        for answer in (
            server.http.get(url, headers=bob),
            server.http.get(accepted["response_url"], headers=bob),
            server.http.put(accepted["cancel_url"], headers=bob),
        ):
            assert (answer.status_code, answer.json()) == (404, MISSING)
        result = server.http.get(accepted["response_url"], headers=alice).json()
        assert server.http.get(result["images"][0]["url"]).status_code == 200
        assert server.http.get("/health").status_code == 200


def test_status_answers_while_a_picture_is_denoised(server: Server) -> None:
    """The event loop is free: many answers come back between two steps of one picture."""
    accepted = submit(server, LARGE)
    answers = 0
    while server.http.get(accepted["status_url"]).json()["status"] != "COMPLETED":
        answers += 1
    assert answers > 50


def events(server: Server, url: str, **params: Any) -> list[dict[str, Any]]:
    with server.http.stream("GET", url, params=params) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith(("data: ", ":")) for line in lines)
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ")]


def test_the_status_stream_follows_a_request_to_its_end(held: Server) -> None:
    submit(held)
    accepted = submit(held, {**SMALL, "num_inference_steps": 3})
    threading.Timer(0.3, held.engine.gate.set).start()
    seen = events(held, accepted["status_url"] + "/stream", logs=1)
    states = [event["status"] for event in seen]
    assert states == sorted(states, key=["IN_QUEUE", "IN_PROGRESS", "COMPLETED"].index)
    assert states[-1] == "COMPLETED" and states.count("COMPLETED") == 1
    assert all(one != other for one, other in pairwise(seen))
    logs = [entry["message"] for event in seen for entry in event.get("logs", ())]
    whole = held.http.get(accepted["status_url"], params={"logs": 1}).json()["logs"]
    assert logs == [entry["message"] for entry in whole]  # each once, none lost
    steps = [event["progress"]["step"] for event in seen if "progress" in event]
    assert steps == sorted(steps) and set(steps) == {1, 2, 3}


def test_the_status_stream_of_a_finished_request_is_one_event(
    tmp_path: Path, engine: Engine
) -> None:
    with serving(tmp_path, engine) as server:
        accepted = submit(server)
        server.wait(accepted["status_url"])
        (event,) = events(server, accepted["status_url"] + "/stream")
        assert (event["status"], event["logs"]) == ("COMPLETED", [])


def test_the_status_stream_of_an_unknown_request(held: Server) -> None:
    answer = held.http.get("/queue/fal-ai/z-image/requests/nothing/status/stream")
    assert (answer.status_code, answer.json()["status"]) == (404, "NOT_FOUND")
