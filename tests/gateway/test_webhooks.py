"""Webhooks, delivered to a real receiver on a real socket: signed, repeated, guarded, durable."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from typer.testing import CliRunner

from gateway.jobs import Outcome
from gateway.signing import CACHED_SECONDS, PUBLISHED_SECONDS, DirectorySigner
from gateway.webhooks import ATTEMPTS, Attempt, judged, payload
from inference.engine import Engine
from local_app import app
from tests.conftest import T2I, Server, serving
from tests.gateway.receiver import receiving

SMALL = {"prompt": "x", "image_size": {"width": 64, "height": 64}, "seed": 1}


def submit(server: Server, url: str, body: Any = SMALL) -> dict[str, Any]:
    answer = server.http.post(f"/queue{T2I}", json=body, params={"fal_webhook": url})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def verify(jwks: dict[str, Any], headers: dict[str, str], body: bytes) -> None:
    """As fal's documentation tells receivers to."""
    names = ("request-id", "user-id", "timestamp")
    parts = [headers[f"x-fal-webhook-{name}"] for name in names]
    message = "\n".join([*parts, hashlib.sha256(body).hexdigest()]).encode()
    signature = bytes.fromhex(headers["x-fal-webhook-signature"])
    for key in jwks["keys"]:
        raw = base64.urlsafe_b64decode(key["x"] + "=")
        try:
            return Ed25519PublicKey.from_public_bytes(raw).verify(signature, message)
        except InvalidSignature:
            continue
    raise InvalidSignature


@pytest.fixture
def server(tmp_path: Path, engine: Engine) -> Iterator[Server]:
    with serving(tmp_path, engine) as server:
        yield server


def test_a_finished_request_is_announced_and_signed(server: Server) -> None:
    with receiving() as receiver:
        accepted = submit(server, receiver.url)
        ((headers, body),) = receiver.wait(1)
    jwks = server.http.get("/.well-known/jwks.json").json()
    verify(jwks, headers, body)
    with pytest.raises(InvalidSignature):
        verify(jwks, headers, body + b" ")
    message = json.loads(body)
    output = server.http.get(accepted["response_url"]).json()
    assert message == {
        "request_id": accepted["request_id"],
        "gateway_request_id": accepted["request_id"],
        "status": "OK",
        "payload": output,
    }
    assert headers["x-fal-webhook-request-id"] == accepted["request_id"]
    assert abs(int(headers["x-fal-webhook-timestamp"]) - time.time()) < 60


def test_a_failed_request_is_announced_with_its_error(server: Server) -> None:
    server.engine.gate.clear()
    with receiving() as receiver:
        accepted = submit(server, receiver.url)
        server.http.put(accepted["cancel_url"])
        ((_, body),) = receiver.wait(1)
    message = json.loads(body)
    assert (message["status"], message["error"]) == ("ERROR", "Invalid status code: 499")
    assert message["payload"]["error_type"] == "client_cancelled"


def test_it_is_repeated_until_it_is_acknowledged(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.webhooks.FIRST_DELAY", 0.05)
    with receiving(500, 404, 200) as receiver:
        submit(server, receiver.url)
        got = receiver.wait(3)
        time.sleep(0.3)
        assert len(got) == 3
    assert len({body for _, body in got}) == 1


def test_a_redirect_is_the_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.webhooks.FIRST_DELAY", 0.05)
    with receiving(302) as receiver:
        submit(server, receiver.url)
        receiver.wait(1)
        time.sleep(0.3)
        assert len(receiver.got) == 1


def test_a_receiver_that_hangs_delays_nobody(server: Server) -> None:
    with receiving(0) as hanging, receiving(200) as well:
        for _ in range(12):
            submit(server, hanging.url)
        for _ in range(3):
            submit(server, well.url)
        well.wait(3)


def test_private_addresses_are_not_told(tmp_path: Path, engine: Engine) -> None:
    with receiving() as receiver, serving(tmp_path, engine, fetch_allow="") as server:
        accepted = submit(server, receiver.url)
        server.wait(accepted["status_url"])
        time.sleep(0.3)
        assert not receiver.got


@pytest.mark.parametrize("url", ["", "nonsense", "ftp://host/x", "http://user:pw@host/", "/path"])
def test_urls_that_cannot_be_webhooks_are_refused(server: Server, url: str) -> None:
    answer = server.http.post(f"/queue{T2I}", json=SMALL, params={"fal_webhook": url})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query", "fal_webhook"]


def test_what_is_due_survives_a_restart_and_can_be_looked_at(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.webhooks.FIRST_DELAY", 1.0)
    listing = ["webhooks", "list", "--home", str(tmp_path), "--json"]
    with receiving(503, 200) as receiver:
        with serving(tmp_path, engine) as server:
            submit(server, receiver.url)
            receiver.wait(1)
            while not (rows := json.loads(CliRunner().invoke(app, listing).stdout))[0]["attempts"]:
                time.sleep(0.01)
            assert rows[0]["answer"] == "status 503" and "next attempt" in rows[0]["state"]
        with serving(tmp_path, engine):
            receiver.wait(2)
    table = CliRunner().invoke(app, listing[:-1]).stdout
    assert "attempts" in table


def test_the_schedule_is_ten_attempts_in_two_hours() -> None:
    waits = [judged("timeout", None, made).again for made in range(1, ATTEMPTS + 1)]
    assert waits[-1] is None
    assert 7000 < sum(wait for wait in waits if wait is not None) < 7300
    assert judged("status 204", 204, 1) == Attempt("status 204", True, None)
    assert judged("status 301", 301, 1) == Attempt("status 301", False, None)


def test_payloads_are_json_whatever_the_outcome() -> None:
    assert json.loads(payload("id", Outcome(200, b'{"a":1}')))["payload"] == {"a": 1}
    failed = json.loads(payload("id", Outcome(422, b'{"detail":[]}', error="no")))
    assert (failed["status"], failed["payload"]) == ("ERROR", {"detail": []})


def test_a_new_key_is_published_before_it_signs_and_an_old_one_after(tmp_path: Path) -> None:
    now = 1_000_000.0
    signer = DirectorySigner(tmp_path / "keys", now)
    (first,) = signer.jwks(now)["keys"]
    old = signer.headers("id", "user", b"{}", now)
    starts = DirectorySigner(tmp_path / "keys", now).rotate(now)  # another process
    assert starts == now + CACHED_SECONDS
    jwks = signer.jwks(now)
    assert len(jwks["keys"]) == 2 and first in jwks["keys"]
    assert signer.headers("id", "user", b"{}", now) == old
    new = signer.headers("id", "user", b"{}", starts)
    for headers in (old, new):
        verify(jwks, {name.lower(): value for name, value in headers.items()}, b"{}")
    assert first not in signer.jwks(starts + PUBLISHED_SECONDS)["keys"]
    assert len(signer.jwks(starts + PUBLISHED_SECONDS)["keys"]) == 1
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "keys").iterdir()} == {0o600}


def test_a_bug_costs_an_attempt_and_no_more(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []

    def broken(request_id: str, outcome: Outcome) -> bytes:
        tries.append(request_id)
        raise KeyError("a bug")

    monkeypatch.setattr("gateway.webhooks.payload", broken)
    with receiving() as receiver:
        submit(server, receiver.url)
        while not tries:
            time.sleep(0.01)
        time.sleep(0.5)
    assert len(tries) == 1
    listing = ["webhooks", "list", "--home", str(server.home), "--json"]
    (row,) = json.loads(CliRunner().invoke(app, listing).stdout)
    assert (row["attempts"], row["answer"]) == (1, "KeyError")


def test_commands_want_a_home_that_exists(tmp_path: Path) -> None:
    for command in ("list", "rotate-key"):
        result = CliRunner().invoke(app, ["webhooks", command, "--home", str(tmp_path / "typo")])
        assert result.exit_code == 2 and "exist; `zimage serve` makes it" in result.output
    assert not (tmp_path / "typo").exists()
