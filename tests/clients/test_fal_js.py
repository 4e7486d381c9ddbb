"""fal's own JavaScript client, unmodified, in node: by middleware and through `proxyUrl`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.conftest import KEY, Place
from tests.clients.npm import FAL_CLIENT, install, node
from tests.clients.readme import pointing
from tests.conftest import CAT, ENDS, Server

PRELUDE = """
import {{ createFalClient }} from "@fal-ai/client";
import {{ readFileSync }} from "node:fs";
const ID = "fal-ai/z-image/turbo/image-to-image";
const CAT = readFileSync({cat!r});
const SMALL = {{
  prompt: "x", seed: 4, image_size: {{ width: 64, height: 48 }},
  image_url: "data:image/jpeg;base64," + CAT.toString("base64"),
}};
const host = {url!r};
const byMiddleware = {{ requestMiddleware: async (request) => ({{ ...request, url: request.url
  .replace("https://queue.fal.run", host + "/queue")
  .replace("https://rest.fal.ai", host + "/rest")
  .replace("https://fal.run", host) }}) }};
const byProxy = {{ {proxy} }};
const fal = createFalClient({{ credentials: {key!r}, ...{way} }});
const show = (value) => console.log(JSON.stringify(value));
"""

WAYS = ["byMiddleware", "byProxy"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("npm"), FAL_CLIENT)


@pytest.fixture(params=WAYS)
def prelude(request: pytest.FixtureRequest, place: Place) -> str:
    return written(place, request.param)


def written(server: Place | Server, way: str) -> str:
    (proxy,) = pointing("@fal-ai/client", server.url)
    return PRELUDE.format(cat=str(CAT), url=server.url, key=KEY, way=way, proxy=proxy)


def test_run(project: Path, prelude: str) -> None:
    output = node(
        project,
        prelude
        + """
const { data, requestId } = await fal.run(ID, { input: SMALL });
show([data.seed, data.images[0].width, requestId.length]);
""",
    )
    assert output == [4, 64, 36]


@pytest.mark.parametrize("mode", ["polling", "streaming"])
def test_subscribe(project: Path, prelude: str, mode: str) -> None:
    output = node(
        project,
        prelude
        + f"""
const seen = [];
const {{ data, requestId }} = await fal.subscribe(ID, {{
  input: {{ ...SMALL, num_images: 2 }}, logs: true, mode: {mode!r}, pollInterval: 20,
  onEnqueue: (id) => seen.push(id),
  onQueueUpdate: (update) => seen.push(update.status),
}});
show([data.images.length, seen[0] === requestId, seen.at(-1)]);
""",
    )
    assert output == [2, True, "COMPLETED"]


def test_the_queue_by_hand(project: Path, prelude: str) -> None:
    output = node(
        project,
        prelude
        + """
const { request_id } = await fal.queue.submit(ID, { input: SMALL, priority: "low" });
const status = await fal.queue.subscribeToStatus(ID, { requestId: request_id, logs: true, pollInterval: 20 });
const { data } = await fal.queue.result(ID, { requestId: request_id });
show([status.status, status.logs.length > 0, data.seed]);
""",
    )
    assert output == ["COMPLETED", True, 4]


def test_cancel(project: Path, prelude: str) -> None:
    output = node(
        project,
        prelude
        + """
const input = { ...SMALL, image_size: "square", num_images: 4 };
const { request_id } = await fal.queue.submit(ID, { input });
await fal.queue.cancel(ID, { requestId: request_id });
await fal.queue.subscribeToStatus(ID, { requestId: request_id, pollInterval: 20 });
try { await fal.queue.result(ID, { requestId: request_id }); }
catch (error) { show([error.name, error.status, error.message]); }
""",
    )
    assert output == ["ApiError", 499, "Request was cancelled by the client"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("end", ENDS)
def test_an_end_without_pictures(project: Path, local: Server, way: str, end: str) -> None:
    program = """
try { await fal.subscribe(ID, { input: SMALL, pollInterval: 20 }); }
catch (error) { show([error.status, error.message]); }
"""
    with local.ending(end, KEY):
        assert tuple(node(project, written(local, way) + program)) == ENDS[end]


def test_a_422_shows_its_detail(project: Path, prelude: str) -> None:
    output = node(
        project,
        prelude
        + """
try { await fal.run(ID, { input: { ...SMALL, strength: 2 } }); }
catch (error) {
  show([error.name, error.status, error.message, error.getFieldErrors("strength").length]);
}
""",
    )
    message = "strength: Input should be less than or equal to 1"
    assert output == ["ValidationError", 422, message, 1]


def test_a_blob_in_the_input_is_uploaded(project: Path, prelude: str, place: Place) -> None:
    output = node(
        project,
        prelude
        + """
const input = { ...SMALL, image_url: new Blob([CAT], { type: "image/jpeg" }) };
const { data } = await fal.run(ID, { input });
const url = await fal.storage.upload(new Blob([CAT], { type: "image/jpeg" }));
show([data.images.length, url]);
""",
    )
    assert output[0] == 1
    assert place.http.get(output[1]).content == CAT.read_bytes()


def test_stream(project: Path, prelude: str) -> None:
    output = node(
        project,
        prelude
        + """
const input = { ...SMALL, image_size: { width: 256, height: 256 } };
const stream = await fal.stream(ID, { input });
const steps = [];
for await (const event of stream) if (event.progress) steps.push(event.progress.step);
const last = await stream.done();
show([steps, last.images.length]);
""",
    )
    steps, images = output
    assert steps and steps == sorted(steps) and images == 1


def test_realtime(project: Path, place: Place) -> None:
    """The client's WebSocket host is fixed; only that is replaced, below it."""
    prelude = written(place, "byMiddleware")
    output = node(
        project,
        """
const Socket = globalThis.WebSocket;
globalThis.WebSocket = class extends Socket {
  constructor(url, ...rest) { super(String(url).replace("wss://fal.run", process.env.WS), ...rest); }
};
"""
        + prelude
        + """
const seeds = [];
const connection = fal.realtime.connect(ID, {
  throttleInterval: 0,
  onResult: (result) => {
    seeds.push(result.seed);
    if (result.seed === 9) { show(seeds); connection.close(); process.exit(0); }
  },
  onError: (error) => { console.error(error); process.exit(1); },
});
connection.send({ ...SMALL, seed: 1 });
setTimeout(() => connection.send({ ...SMALL, seed: 9 }), 500);
""",
        WS=place.url.replace("http", "ws"),
        NODE_OPTIONS="--experimental-websocket",  # node 20 has it behind this flag
    )
    assert output[-1] == 9
