from pathlib import Path

import pytest
from pydantic import SecretStr

from gateway.auth import Keys, Unauthorized, keys_for
from gateway.settings import Settings

SECRET = "a-secret-of-some-length"
KEYS = Keys.parse(f"alice:{SECRET}, bob:{SECRET[::-1]}")


def test_a_key_is_known_by_its_id() -> None:
    assert KEYS.check(f"Key alice:{SECRET}") == "alice"
    assert KEYS.check(f"key bob:{SECRET[::-1]}") == "bob"
    assert KEYS.check(f"Bearer alice:{SECRET}") == "alice"


@pytest.mark.parametrize(
    ("header", "detail"),
    [
        (None, "Authorization header is required"),
        ("", "Authorization header is required"),
        ("Basic abc", "Invalid Key"),
        ("Key alice", "Invalid Key"),
        (f"Key alice:{SECRET}x", "No user found"),
        ("Key alice:", "No user found"),
        (f"Key carol:{SECRET}", "No user found"),
        (f"Key :{SECRET}", "No user found"),
    ],
)
def test_everything_else_is_refused(header: str | None, detail: str) -> None:
    with pytest.raises(Unauthorized, match=detail):
        KEYS.check(header)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("alice", "entry 1 is not of the form"),
        (f"alice:{SECRET},:x", "entry 2 is not of the form"),
        ("alice:short", "under 16 characters"),
        (f"alice:{SECRET},alice:{SECRET}", "twice"),
    ],
)
def test_unusable_settings_are_refused_without_showing_secrets(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        Keys.parse(text)
    assert SECRET not in str(caught.value)


def test_no_keys() -> None:
    assert not Keys.parse("") and not Keys.parse(" , ")


def test_keys_that_are_set_are_checked_wherever_the_server_listens(tmp_path: Path) -> None:
    keys = SecretStr(f"alice:{SECRET}")
    assert keys_for(Settings(home=tmp_path, keys=keys), default="off") is not None
    assert keys_for(Settings(home=tmp_path, keys=keys, auth="off"), default="on") is None
    assert keys_for(Settings(home=tmp_path), default="off") is None
    with pytest.raises(ValueError, match="No keys to check"):
        keys_for(Settings(home=tmp_path), default="on")
