"""fal's own Python client, unmodified, over TLS with a throw-away certificate authority."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import KEY, Place
from tests.clients.python import python
from tests.clients.readme import pointing
from tests.conftest import CAT, ENDS, Server

PRELUDE = f"""
import fal_client, json, os, sys
CAT = fal_client.encode_file({str(CAT)!r})
ID = "fal-ai/z-image/turbo/image-to-image"
SMALL = {{"prompt": "x", "image_url": CAT, "image_size": {{"width": 64, "height": 48}}, "seed": 4}}
"""


def client(place: Place, program: str, key: str = KEY) -> Any:
    """Run a program against the server as its user would; returns the JSON it prints last."""
    run_host, queue_host, *uploads = pointing("fal-client", place.url)
    environment = dict(line.split("=") for line in (run_host, queue_host))
    environment |= {"FAL_KEY": key, "SSL_CERT_FILE": str(place.ca)}
    return python(PRELUDE + "\n".join([*uploads, program]), **environment)


def test_run(place_tls: Place) -> None:
    output = client(place_tls, "print(json.dumps(fal_client.run(ID, arguments=SMALL)))")
    assert output["seed"] == 4 and output["images"][0]["width"] == 64


def test_subscribe_with_logs(place_tls: Place) -> None:
    output = client(
        place_tls,
        """
seen = []
def update(status):
    seen.append(type(status).__name__)
    seen.extend(entry["message"] for entry in getattr(status, "logs", None) or [])
result = fal_client.subscribe(
    ID, arguments={**SMALL, "num_images": 2}, with_logs=True, on_queue_update=update)
print(json.dumps([seen, result]))
""",
    )
    seen, result = output
    assert seen[0] in ("Queued", "InProgress") and "Completed" in seen
    assert "image 2/2: step 5/5" in seen
    assert len(result["images"]) == 2


def test_submit_status_result(place_tls: Place) -> None:
    output = client(
        place_tls,
        """
handle = fal_client.submit(ID, arguments=SMALL)
for event in handle.iter_events(with_logs=True, interval=0.02):
    pass
again = fal_client.result(ID, handle.request_id)
print(json.dumps([handle.get() == again, type(handle.status()).__name__]))
""",
    )
    assert output == [True, "Completed"]


def test_a_422_shows_its_detail(place_tls: Place) -> None:
    output = client(
        place_tls,
        """
try:
    fal_client.run(ID, arguments={**SMALL, "num_inference_steps": 50})
except fal_client.FalClientHTTPError as error:
    print(json.dumps([error.status_code, error.response.json()["detail"][0]["loc"], str(error)]))
""",
    )
    status, loc, message = output
    assert (status, loc) == (422, ["body", "num_inference_steps"])
    assert "less than or equal to 8" in message


def test_cancel(place_tls: Place) -> None:
    output = client(
        place_tls,
        """
big = {**SMALL, "image_size": "square", "num_images": 4}
handle = fal_client.submit(ID, arguments=big)
handle.cancel()
for event in handle.iter_events(interval=0.02):
    pass
try:
    handle.get()
except fal_client.FalClientHTTPError as error:
    print(json.dumps([error.status_code, error.error_type]))
""",
    )
    assert output == [499, "client_cancelled"]


@pytest.mark.parametrize("end", ENDS)
def test_an_end_without_pictures(local_tls: Server, ca: Path, end: str) -> None:
    place = Place(local_tls.url, local_tls.http, ca)
    with local_tls.ending(end, KEY):
        output = client(
            place,
            """
try:
    fal_client.subscribe(ID, arguments=SMALL)
except fal_client.FalClientHTTPError as error:
    print(json.dumps([error.status_code, error.message]))
""",
        )
    assert tuple(output) == ENDS[end]


def test_a_wrong_key(place_tls: Place) -> None:
    output = client(
        place_tls,
        """
try:
    fal_client.run(ID, arguments=SMALL)
except fal_client.FalClientHTTPError as error:
    print(json.dumps([error.status_code, error.message]))
""",
        key="alice:not-the-secret-at-all",
    )
    assert output == [401, "No user found for Key ID and Secret"]


def test_async_client(place_tls: Place) -> None:
    output = client(
        place_tls,
        """
import asyncio
async def main():
    return await asyncio.gather(*(
        fal_client.subscribe_async(ID, arguments={**SMALL, "seed": seed}) for seed in range(3)))
print(json.dumps([result["seed"] for result in asyncio.run(main())]))
""",
    )
    assert output == [0, 1, 2]


@pytest.mark.parametrize("threshold", [100_000_000, 1000], ids=["whole", "in parts"])
def test_upload(place_tls: Place, threshold: int) -> None:
    output = client(
        place_tls,
        f"""
fal_client.client.MULTIPART_THRESHOLD = {threshold}
url = fal_client.upload_file({str(CAT)!r})
result = fal_client.run(ID, arguments={{**SMALL, "image_url": url}})
print(json.dumps([url, len(result["images"])]))
""",
    )
    url, images = output
    assert images == 1
    assert place_tls.http.get(url).content == CAT.read_bytes()


def test_stream(place_tls: Place) -> None:
    output = client(
        place_tls,
        """
seen = {**SMALL, "image_size": {"width": 256, "height": 256}}
events = list(fal_client.stream(ID, arguments=seen))
print(json.dumps([[e["progress"]["step"] for e in events[:-1]], len(events[-1]["images"])]))
""",
    )
    steps, images = output
    assert steps and steps == sorted(steps) and images == 1


@pytest.mark.parametrize("use_jwt", [True, False])
def test_realtime(place_tls: Place, use_jwt: bool) -> None:
    output = client(
        place_tls,
        f"""
seeds = []
with fal_client.realtime(ID, use_jwt={use_jwt}) as connection:
    for seed in (1, 2):
        connection.send({{**SMALL, "seed": seed}})
        seeds.append(connection.recv()["seed"])
    connection.send({{**SMALL, "strength": 2}})
    try:
        connection.recv()
    except Exception as error:
        seeds.append(str(error))
print(json.dumps(seeds))
""",
    )
    assert output[:2] == [1, 2]
    assert "strength" in output[2]
