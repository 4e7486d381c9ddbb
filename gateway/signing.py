"""Webhook signatures: Ed25519, verifiable with the keys at /.well-known/jwks.json, as fal's are.

Receivers may cache the key set for a day. So a new key is published a day before it signs, and an old
one stays published a week after its last signature. On one machine a key is a file in the home, named
by the second from which it signs; on Modal keys come from the secret, and who rotates them keeps the
days.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

CACHED_SECONDS = 24 * 3600
PUBLISHED_SECONDS = 7 * CACHED_SECONDS


class Signer(ABC):
    """Signs webhooks, and says with which public keys to verify them."""

    @abstractmethod
    def _signing(self, now: float) -> Ed25519PrivateKey: ...

    @abstractmethod
    def _published(self, now: float) -> list[Ed25519PrivateKey]:
        """Newest first."""

    def headers(self, request_id: str, user_id: str, body: bytes, now: float) -> dict[str, str]:
        """What a webhook carries: the signature of request id, user id, time and SHA-256 of the body."""
        timestamp = str(int(now))
        digest = hashlib.sha256(body).hexdigest()
        message = "\n".join((request_id, user_id, timestamp, digest)).encode()
        return {
            "X-Fal-Webhook-Request-Id": request_id,
            "X-Fal-Webhook-User-Id": user_id,
            "X-Fal-Webhook-Timestamp": timestamp,
            "X-Fal-Webhook-Signature": self._signing(now).sign(message).hex(),
        }

    def jwks(self, now: float) -> dict[str, list[dict[str, str]]]:
        """The public keys as a JSON Web Key Set (RFC 8037)."""
        return {"keys": [_jwk(private) for private in self._published(now)]}


class SecretSigner(Signer):
    """Keys from a secret: the first signs, all are published."""

    def __init__(self, keys: Sequence[Ed25519PrivateKey]) -> None:
        self._keys = keys

    @classmethod
    def parse(cls, text: str) -> SecretSigner | None:
        """Seeds of 32 bytes in hex, comma-separated; None for none. Raises ValueError, showing none."""
        seeds = [part.strip() for part in text.split(",") if part.strip()]
        if not all(re.fullmatch("[0-9a-fA-F]{64}", seed) for seed in seeds):
            raise ValueError("ZIMAGE_WEBHOOK_KEY: each key must be 64 hexadecimal digits")
        keys = [Ed25519PrivateKey.from_private_bytes(bytes.fromhex(seed)) for seed in seeds]
        return cls(keys) if keys else None

    def _signing(self, now: float) -> Ed25519PrivateKey:
        return self._keys[0]

    def _published(self, now: float) -> list[Ed25519PrivateKey]:
        return list(self._keys)


@dataclass(frozen=True, slots=True)
class _Key:
    starts: int
    private: Ed25519PrivateKey


class DirectorySigner(Signer):
    """The keys of one home. Makes the first one when there is none."""

    def __init__(self, directory: Path, now: float) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._loaded: tuple[int, list[_Key]] = (0, [])
        if not self._keys():
            self._add(int(now))

    def rotate(self, now: float) -> int:
        """Make a new key; returns the time from which it signs. Running servers take notice."""
        starts = int(now) + CACHED_SECONDS
        self._add(starts)
        return starts

    def _signing(self, now: float) -> Ed25519PrivateKey:
        *_, key = (key for key in self._keys() if key.starts <= now)
        return key.private

    def _published(self, now: float) -> list[Ed25519PrivateKey]:
        keys = self._keys()
        ends = [key.starts for key in keys[1:]] + [int(now)]  # a key ends where the next starts
        return [
            key.private
            for key, end in reversed(list(zip(keys, ends, strict=True)))
            if end > now - PUBLISHED_SECONDS
        ]

    def _keys(self) -> list[_Key]:
        """Oldest first; read again when the directory has changed."""
        changed = self._directory.stat().st_mtime_ns
        if changed != self._loaded[0]:
            paths = sorted(self._directory.glob("*.pem"))
            self._loaded = (changed, [_Key(int(path.stem), _load(path)) for path in paths])
        return self._loaded[1]

    def _add(self, starts: int) -> None:
        private = Ed25519PrivateKey.generate()
        pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path = self._directory / f"{starts:012d}.pem"
        descriptor = os.open(path.with_suffix(".part"), os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
        path.with_suffix(".part").rename(path)  # whole, or not there


def _load(path: Path) -> Ed25519PrivateKey:
    key = load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path} is not an Ed25519 key")
    return key


def _jwk(private: Ed25519PrivateKey) -> dict[str, str]:
    raw = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    x = base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
    kid = hashlib.sha256(raw).hexdigest()[:16]
    return {"kty": "OKP", "crv": "Ed25519", "use": "sig", "alg": "EdDSA", "kid": kid, "x": x}
