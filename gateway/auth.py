"""Keys: `Authorization: Key <id>:<secret>`, compared in constant time.

Knows nothing of what a key may spend; a key's id is its name in records, the secret appears nowhere.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Literal

from gateway.settings import Settings
from schemas.errors import ApiError

ANONYMOUS = "anonymous"
"""Key id of requests where authentication is off."""


class Unauthorized(ApiError):
    """401 in fal's wording: {"detail": text}."""

    status = 401

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail

    def body(self) -> dict[str, str]:
        return {"detail": self.detail, "message": self.detail}


class Keys:
    """A fixed set of keys. Holds digests, so that comparison time says nothing about a secret."""

    def __init__(self, keys: dict[str, str]) -> None:
        self._digests = {key_id: _digest(secret) for key_id, secret in keys.items()}

    @classmethod
    def parse(cls, text: str) -> Keys:
        """`id:secret,id:secret,…`. Raises ValueError naming the entry, never showing a secret."""
        keys: dict[str, str] = {}
        for number, entry in enumerate(filter(None, map(str.strip, text.split(","))), start=1):
            key_id, _, secret = entry.partition(":")
            if not key_id or not secret:
                raise ValueError(f"ZIMAGE_KEYS entry {number} is not of the form id:secret")
            if len(secret) < 16:
                raise ValueError(f"ZIMAGE_KEYS: the secret of {key_id!r} is under 16 characters")
            if key_id in keys:
                raise ValueError(f"ZIMAGE_KEYS names {key_id!r} twice")
            keys[key_id] = secret
        return cls(keys)

    def __contains__(self, key_id: str) -> bool:
        return key_id in self._digests

    def __len__(self) -> int:
        return len(self._digests)

    def check(self, authorization: str | None) -> str:
        """The key id behind an Authorization header. Raises Unauthorized."""
        if not authorization:
            raise Unauthorized("Authorization header is required")
        scheme, _, credentials = authorization.partition(" ")
        key_id, colon, secret = credentials.strip().partition(":")
        if scheme.lower() not in ("key", "bearer") or not colon:
            raise Unauthorized(
                "Invalid Key Authorization header format. Expected '<key_id>:<key_secret>'."
            )
        expected = self._digests.get(key_id, b"\0" * 32)
        if not hmac.compare_digest(_digest(secret), expected):
            raise Unauthorized("No user found for Key ID and Secret")
        return key_id


def keys_for(settings: Settings, *, default: Literal["on", "off"]) -> Keys | None:
    """The keys to check, or None when authentication is off. Whoever sets keys wants them checked.

    Raises ValueError when it is on and there are no keys: nothing runs open by accident.
    """
    keys = Keys.parse(settings.keys.get_secret_value())
    if (settings.auth or ("on" if keys else default)) == "off":
        return None
    if not keys:
        raise ValueError(
            "No keys to check requests with: set ZIMAGE_KEYS=id:secret[,id:secret…] with "
            "secrets of 16 characters or more, "
            "or ZIMAGE_AUTH=off to let everyone in"
        )
    return keys


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
