"""Short-lived tokens for those who cannot send a key: browsers, upload URLs. JWT, HS256, ours alone."""

from __future__ import annotations

import time
from typing import Any, Literal

import jwt

from gateway.auth import Unauthorized

Use = Literal["upload", "cdn", "realtime"]
_ALGORITHM = "HS256"


class Tokens:
    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def issue(self, use: Use, key_id: str, seconds: float, **claims: Any) -> str:
        """A token for one use, on behalf of a key, for some seconds."""
        body = {**claims, "aud": use, "sub": key_id, "exp": int(time.time() + seconds)}
        return jwt.encode(body, self._secret, _ALGORITHM)

    def read(self, token: str, use: Use) -> dict[str, Any]:
        """The claims. Raises Unauthorized for a token that is forged, expired or for another use."""
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                self._secret,
                algorithms=[_ALGORITHM],
                audience=use,
                options={"require": ["exp", "sub", "aud"]},
            )
        except jwt.InvalidTokenError:
            raise Unauthorized("Invalid or expired token") from None
        return claims
