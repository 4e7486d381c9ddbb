"""One request of every endpoint to a deployment, through its public URL: does it work, how long, how much.

    python scripts/smoke.py https://you--zimage.modal.run --key id:secret-long-enough

Each endpoint is asked twice: the first answer may wait for a machine to start, the second shows a warm
one. Fails if any answer is not a picture of the size that was asked for.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx2
from PIL import Image

from schemas.endpoints import ENDPOINTS
from schemas.inputs import ImageToImageInput

APPLE = Path(__file__).parent.parent / "examples" / "apple.png"
SIZE = (512, 512)


@dataclass(frozen=True, slots=True)
class Answer:
    """seconds: as the caller waits. inference: on the GPU. overhead is the rest."""

    endpoint: str
    seconds: float
    inference: float
    units: float


class Broken(Exception):
    """The deployment did not do what it should; the message is for people."""


class NotServed(Broken):
    """The deployment has no weights for the endpoint."""


def ask(client: httpx2.Client, endpoint: str, deadline: float) -> Answer:
    """Queue a request, follow it, look at its picture. Raises Broken."""
    body: dict[str, object] = {
        "prompt": "a red apple on a white background",
        "image_size": {"width": SIZE[0], "height": SIZE[1]},
        "seed": 1,
    }
    if issubclass(ENDPOINTS[endpoint].input, ImageToImageInput):
        picture = base64.b64encode(APPLE.read_bytes()).decode()
        body["image_url"] = f"data:image/png;base64,{picture}"
    began = time.perf_counter()
    urls = _get(client, "POST", f"/queue/{endpoint}", json=body).json()
    while _get(client, "GET", urls["status_url"]).json()["status"] != "COMPLETED":
        if time.perf_counter() - began > deadline:
            raise Broken(f"{endpoint}: not finished after {deadline:.0f} s ({urls['status_url']})")
        time.sleep(0.2)
    answer = _get(client, "GET", urls["response_url"])
    seconds, output = time.perf_counter() - began, answer.json()
    picture_bytes = _get(client, "GET", output["images"][0]["url"]).content
    with Image.open(io.BytesIO(picture_bytes)) as image:
        if image.size != SIZE:
            raise Broken(f"{endpoint}: asked for {SIZE}, got {image.size}")
    units = float(answer.headers["x-fal-billable-units"])
    return Answer(endpoint, seconds, output["timings"]["inference"], units)


def _get(client: httpx2.Client, method: str, url: str, **options: object) -> httpx2.Response:
    try:
        answer = client.request(method, url, **options)  # type: ignore[arg-type]
    except httpx2.TransportError as error:
        raise Broken(f"{method} {url}: {error!r}") from None
    if answer.status_code == 404 and "does not serve" in answer.text:
        raise NotServed(answer.json()["detail"])
    if answer.status_code >= 300:
        raise Broken(f"{method} {url}: {answer.status_code} {answer.text[:300]}")
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", help="the gateway's")
    parser.add_argument("--key", help="id:secret, where keys are on")
    parser.add_argument("--price", type=float, default=0.001097, help="dollars per GPU second")
    parser.add_argument("--deadline", type=float, default=900, help="seconds for one request")
    given = parser.parse_args()
    headers = {"Authorization": f"Key {given.key}"} if given.key else {}
    print(
        f"{'endpoint':40} {'':6} {'seconds':>8} {'on GPU':>8} {'MP':>6} {'GPU $':>9} {'fal $':>9}"
    )
    with httpx2.Client(base_url=given.url, headers=headers, timeout=160) as client:
        for endpoint in ENDPOINTS.values():
            for word in ("first", "warm"):
                try:
                    answer = ask(client, endpoint.id, given.deadline)
                except NotServed as error:
                    print(error)
                    break
                except Broken as error:
                    print(error, file=sys.stderr)
                    return 1
                print(
                    f"{endpoint.id:40} {word:6} {answer.seconds:8.2f} {answer.inference:8.2f} "
                    f"{answer.units:6.2f} {answer.inference * given.price:9.6f} "
                    f"{answer.units * endpoint.price:9.6f}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
