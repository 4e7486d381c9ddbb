"""Input pictures and other files: from data URIs and from URLs that strangers wrote.

Errors say no more than "could not be downloaded": what the network behind the server looks like is
nobody's business. Bounds: MAX_BYTES of body, FETCH_SECONDS in all, MAX_REDIRECTS, ports 80 and 443.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Callable, Sequence
from urllib.parse import unquote, unquote_to_bytes

import httpx2

from gateway.addresses import Network
from gateway.guarded import UNREACHABLE, Resolve, Unusable, checked_url, guarded_pool, resolve, wire
from media.decode import MAX_BYTES, file_too_large
from schemas.errors import InputError, Loc

FETCH_SECONDS = 20.0
MAX_REDIRECTS = 5
_SMALL_URI = 256 * 1024
"""Characters decoded in less time than a thread takes to start."""
_URL_SAFE = str.maketrans("-_", "+/")
_HEADERS: dict[bytes | str, bytes | str] = {
    "User-Agent": "zimage-endpoint (image fetcher)",
    "Accept": "image/*,*/*;q=0.8",
    "Accept-Encoding": "identity",
}

logger = logging.getLogger(__name__)


class Fetcher:
    """Downloads input pictures. `resolve` is the look-up, replaceable for tests."""

    def __init__(
        self,
        exceptions: Sequence[Network] = (),
        resolve: Resolve = resolve,
        seconds: float = FETCH_SECONDS,
    ) -> None:
        self._seconds = seconds
        self._pool = guarded_pool(exceptions, resolve, connections=32)

    async def close(self) -> None:
        await self._pool.aclose()

    async def __call__(
        self, url: str, loc: Loc = ("body", "image_url"), token: str | None = None
    ) -> bytes:
        """The bytes behind a data URI or an http(s) URL; `loc` names the field in errors.

        Raises InputError: file_download_error (input = the URL), file_too_large (ctx max_size), or
        image_load_error for a data URI that is not one.
        """
        if url[:5].lower() == "data:":
            if len(url) < _SMALL_URI:
                return from_data_uri(url, loc)
            return await asyncio.to_thread(from_data_uri, url, loc)
        body = bytearray()

        def take(chunk: bytes) -> None:
            body.extend(chunk)
            if len(body) > MAX_BYTES:
                raise file_too_large(loc)

        await self.download(url, take, loc, token=token)
        return bytes(body)

    async def download(
        self,
        url: str,
        take: Callable[[bytes], object],
        loc: Loc,
        *,
        seconds: float | None = None,
        named: str | None = None,
        token: str | None = None,
    ) -> None:
        """Hand an http(s) URL's content to `take`, in pieces; what that raises ends it.

        `token` is shown to the URL's own origin, and not to where that redirects to.
        Raises InputError, file_download_error, with what the caller `named` as input.
        """
        try:
            async with asyncio.timeout(seconds or self._seconds):
                await self._download(url, take, token)
        except (*UNREACHABLE, httpx2.InvalidURL, Unusable) as error:
            logger.info("fetch of %.200s failed: %s", url, error or type(error).__name__)
            raise InputError(
                loc, "File download error", "file_download_error", input=named or url
            ) from None

    async def _download(self, url: str, take: Callable[[bytes], object], token: str | None) -> None:
        first = wire(checked_url(url)).origin
        for _ in range(MAX_REDIRECTS + 1):
            target = checked_url(url)
            if wire(target).origin != first:
                token = None
            sent = {**_HEADERS, "Authorization": f"Bearer {token}"} if token else _HEADERS
            async with self._pool.stream(
                "GET", wire(target), headers=sent, extensions={"timeout": self._timeouts}
            ) as response:
                headers = {name.lower(): value for name, value in response.headers}
                if response.status in (301, 302, 303, 307, 308) and b"location" in headers:
                    url = str(target.join(headers[b"location"].decode("latin-1")))
                    continue
                if response.status != 200:
                    raise Unusable(f"status {response.status}")
                if headers.get(b"content-encoding", b"identity").lower() != b"identity":
                    raise Unusable("compressed although asked not to")
                async for chunk in response.aiter_stream():
                    take(chunk)
                return
        raise Unusable("too many redirects")

    @property
    def _timeouts(self) -> dict[str, float]:
        return dict.fromkeys(("connect", "read", "write", "pool"), self._seconds)


def from_data_uri(uri: str, loc: Loc) -> bytes:
    """The payload of a `data:` URI, base64 or percent-encoded. Raises InputError."""
    header, comma, payload = uri.partition(",")
    if not comma:
        raise InputError(loc, "Image load error: a data URI needs a comma", "image_load_error")
    if not header.lower().endswith(";base64"):
        data = unquote_to_bytes(payload[: 3 * MAX_BYTES + 1])
    elif len(payload) > MAX_BYTES * 4 // 3 + 4:
        raise file_too_large(loc)
    else:
        try:
            payload = "".join(unquote(payload).split()).translate(_URL_SAFE)
            data = base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
        except ValueError:
            raise InputError(loc, "Image load error: invalid base64", "image_load_error") from None
    if len(data) > MAX_BYTES:
        raise file_too_large(loc)
    return data
