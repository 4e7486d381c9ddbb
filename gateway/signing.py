"""Webhook signatures: Ed25519, verifiable with the keys at /.well-known/jwks.json, as fal's are.

Receivers may cache the key set for a day. So a new key is published a day before it signs, and an old
one stays published a week after its last signature. A key is a file in the home, named by the second
from which it signs.
"""

from __future__ import annotations

import base64
import hashlib
import os
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


@dataclass(frozen=True, slots=True)
class _Key:
    starts: int
    private: Ed25519PrivateKey


class Signer:
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

    def headers(self, request_id: str, user_id: str, body: bytes, now: float) -> dict[str, str]:
        """What a webhook carries: the signature of request id, user id, time and SHA-256 of the body."""
        timestamp = str(int(now))
        digest = hashlib.sha256(body).hexdigest()
        message = "\n".join((request_id, user_id, timestamp, digest)).encode()
        *_, key = (key for key in self._keys() if key.starts <= now)
        return {
            "X-Fal-Webhook-Request-Id": request_id,
            "X-Fal-Webhook-User-Id": user_id,
            "X-Fal-Webhook-Timestamp": timestamp,
            "X-Fal-Webhook-Signature": key.private.sign(message).hex(),
        }

    def jwks(self, now: float) -> dict[str, list[dict[str, str]]]:
        """The public keys, newest first, as a JSON Web Key Set (RFC 8037)."""
        keys = self._keys()
        ends = [key.starts for key in keys[1:]] + [int(now)]  # a key ends where the next starts
        published = [
            key for key, end in zip(keys, ends, strict=True) if end > now - PUBLISHED_SECONDS
        ]
        return {"keys": [_jwk(key.private) for key in reversed(published)]}

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
