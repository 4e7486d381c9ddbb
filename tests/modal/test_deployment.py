"""The whole deployment at work: HTTP in, pictures out, through the real container entrypoint.

One cloud for the module; its containers start when they are first needed.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import pickle
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
from grpclib.const import Status
from modal._serialization import deserialize
from modal_proto import api_pb2 as api
from PIL import Image
from safetensors.torch import save as save_tensors

from gateway.platforms.modal_ledger import Pending
from gateway.platforms.modal_records import Finished
from inference.engine import Engine
from tests.conftest import CAT, I2I, T2I, encoded, opened
from tests.gateway.receiver import receiving
from tests.gateway.test_endpoints import hub
from tests.gateway.test_webhooks import verify
from tests.inference.lora_files import pairs, weights, written
from tests.modal.cloud import Call, Deployed, deployed

KEY = "alice:a-secret-long-enough"
SECRETS = {"zimage-keys": {"ZIMAGE_KEYS": KEY, "ZIMAGE_WEBHOOK_KEY": "ab" * 32}}
SETTINGS = {
    "ZIMAGE_WEIGHTS": "demo",
    "ZIMAGE_WARM_UP": "64x64",
    "ZIMAGE_FETCH_ALLOW": "127.0.0.0/8",
    "ZIMAGE_CONCURRENCY": "2",
}
MACHINE = {"ZIMAGE_DEVICE": "cpu"}
GPU = "Generator.*(turbo)"
SMALL = {"prompt": "x", "image_size": {"width": 64, "height": 64}, "seed": 1}
LONG = {"prompt": "x", "image_size": {"width": 384, "height": 384}, "num_images": 4}


SCHEDULES = """
[[schedule]]
name = "burst"
cron = "*/5 * * * *"
endpoint = "fal-ai/z-image/turbo"
key = "alice"
output = "burst/{date}"
[schedule.arguments]
prompt = ["one", "two", "three"]
seed = [1, 2, 3, 4]
image_size = { width = 64, height = 64 }
num_inference_steps = 1
"""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp("cloud")
    (folder / "schedules.toml").write_text(SCHEDULES)
    settings = {**SETTINGS, "ZIMAGE_SCHEDULES": str(folder / "schedules.toml")}
    with deployed(folder, SECRETS, settings, MACHINE) as deployment:
        deployment.cloud.local_files["/schedules.toml"] = settings["ZIMAGE_SCHEDULES"]
        deployment.http.headers["Authorization"] = f"Key {KEY}"
        yield deployment


def submit(deployment: Deployed, body: Any, **options: Any) -> dict[str, str]:
    answer = deployment.http.post(f"/queue{T2I}", json=body, **options)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def until(deployment: Deployed, urls: dict[str, str], condition: Any) -> dict[str, Any]:
    while not condition(
        status := deployment.http.get(urls["status_url"], params={"logs": 1}).json()
    ):
        time.sleep(0.05)
    return dict(status)


def completed(status: dict[str, Any]) -> bool:
    return bool(status["status"] == "COMPLETED")


def denoising(status: dict[str, Any]) -> bool:
    return "progress" in status


def urls_done(deployment: Deployed, urls: dict[str, str]) -> bool:
    return completed(deployment.http.get(urls["status_url"]).json())


def calls(deployment: Deployed, function: str, since: int = 0) -> list[Call]:
    return [c for c in deployment.cloud.calls.values() if c.function == function][since:]


def run(deployment: Deployed, function: str) -> int:
    """As its cron, or `modal run`, would; returns how many such calls there were before."""
    before = len(calls(deployment, function))
    call = deployment.do(deployment.cloud.run(function))
    assert deployment.do(deployment.cloud.finished(call)).status == 1, deployment.cloud.log()
    return before


def test_a_picture_from_a_picture(deployment: Deployed) -> None:
    url = "data:image/jpeg;base64," + base64.b64encode(CAT.read_bytes()).decode()
    answer = deployment.http.post(I2I, json={"prompt": "x", "image_url": url, "seed": 1})
    assert answer.status_code == 200, deployment.cloud.log()
    (image,) = answer.json()["images"]
    assert image["url"].startswith(f"{deployment.url}/files/")
    assert opened(deployment.http.get(image["url"]).content).size == (451, 300)
    assert float(answer.headers["x-fal-billable-units"]) == pytest.approx(451 * 300 / 2**20)


def test_the_same_picture_as_on_one_machine(deployment: Deployed, engine: Any) -> None:
    """Modal changes where things run, not what they make. Its engine may choose another dtype."""
    answer = deployment.http.post(T2I, json={**SMALL, "sync_mode": True}).json()
    data = base64.b64decode(answer["images"][0]["url"].partition(",")[2])
    again = deployment.http.post(T2I, json={**SMALL, "sync_mode": True}).json()
    assert again["images"] == answer["images"]
    from gateway.inputs import make_task, parse
    from schemas.endpoints import ENDPOINTS
    from schemas.sizes import Size

    class Defaults:
        acceleration_default = "regular"

    params = parse(ENDPOINTS[T2I[1:]], json.dumps(SMALL).encode())
    task = make_task(params, None, None, Size(64, 64), ENDPOINTS[T2I[1:]], Defaults())  # type: ignore[arg-type]
    here = np.asarray(opened(engine(task).images[0].data), int)
    assert np.abs(here - np.asarray(opened(data), int)).mean() < 8


def test_the_queue(deployment: Deployed) -> None:
    urls = submit(deployment, {**SMALL, "num_images": 3})
    status = until(deployment, urls, completed)
    assert status["metrics"]["inference_time"] > 0
    result = deployment.http.get(urls["response_url"])
    assert len(result.json()["images"]) == 3
    assert deployment.http.put(urls["cancel_url"]).json() == {"status": "ALREADY_COMPLETED"}
    other = deployment.http.get(urls["status_url"], headers={"Authorization": "Key b:nobody"})
    assert other.status_code == 401


def test_errors_cost_no_gpu(deployment: Deployed) -> None:
    before = len(calls(deployment, GPU))
    broken = "data:image/png;base64,AAAA"
    answer = deployment.http.post(I2I, json={"prompt": "x", "image_url": broken})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "image_url"]
    assert len(calls(deployment, GPU)) == before


def test_events(deployment: Deployed) -> None:
    body = {**SMALL, "image_size": {"width": 256, "height": 256}, "num_images": 4}
    with deployment.http.stream("POST", f"{T2I}/stream", json=body) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line[:5] == "data:"]
    assert "images" in events[-1] and any("progress" in event for event in events[:-1])
    urls = submit(deployment, SMALL)
    answer = deployment.http.get(f"{urls['status_url']}/stream")
    assert '"COMPLETED"' in answer.text.splitlines()[-2]


def test_four_megabytes_in_and_out(deployment: Deployed) -> None:
    """Beyond what travels inline: blob storage, on both ways."""
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), np.uint8)
    data = encoded(Image.fromarray(noise))
    assert len(data) > 4_000_000
    body = {
        "prompt": "x",
        "image_url": "data:image/png;base64," + base64.b64encode(data).decode(),
        "strength": 0,
        "sync_mode": True,
        "enable_safety_checker": False,
    }
    answer = deployment.http.post(I2I, json=body)
    assert answer.status_code == 200, answer.text
    url = answer.json()["images"][0]["url"]
    assert len(url) > 4_000_000
    out = opened(base64.b64decode(url.partition(",")[2]))
    assert np.array_equal(np.asarray(out), noise)


def test_an_upload_is_an_input(deployment: Deployed) -> None:
    wanted = {"content_type": "image/jpeg", "file_name": "cat.jpg"}
    urls = deployment.http.post("/rest/storage/upload/initiate", json=wanted).json()
    assert deployment.http.put(urls["upload_url"], content=CAT.read_bytes()).status_code == 200
    assert deployment.http.get(urls["file_url"]).content == CAT.read_bytes()
    body = {**SMALL, "image_url": urls["file_url"]}
    assert deployment.http.post(I2I, json=body).status_code == 200


def test_cancel_stops_between_two_steps(deployment: Deployed) -> None:
    urls = submit(deployment, LONG)
    until(deployment, urls, denoising)
    (engine_call,) = calls(deployment, GPU)[-1:]
    assert deployment.http.put(urls["cancel_url"]).status_code == 202
    result = deployment.http.get(urls["response_url"])
    assert (result.status_code, result.json()["error_type"]) == (499, "client_cancelled")
    ended = deployment.do(deployment.cloud.finished(engine_call))
    assert ended.status == api.GenericResult.GENERIC_STATUS_TERMINATED
    assert deployment.http.post(T2I, json=SMALL).status_code == 200  # the engine is well


def test_base_has_containers_of_its_own(deployment: Deployed) -> None:
    answer = deployment.http.post(
        "/fal-ai/z-image/base", json={**SMALL, "num_inference_steps": 2, "guidance_scale": 3}
    )
    assert answer.status_code == 200, answer.text + deployment.cloud.log()
    assert len(calls(deployment, "Generator.*(base)")) == 1


def test_a_lora_goes_by_the_volume(deployment: Deployed, engine: Engine) -> None:
    """The job fetches it; the GPU's container finds it, or says that it does not fit."""
    changes = written("fused", pairs(weights(engine.models.transformer), seed=3))
    good = {name: tensor.clone() for name, tensor in changes.items()}
    misfit = {name.replace("layers.5", "layers.29"): tensor for name, tensor in good.items()}
    path = "/fal-ai/z-image/turbo/lora"
    with hub() as (url, site):
        site.files |= {"/good": save_tensors(good), "/misfit": save_tensors(misfit)}
        answers = [
            deployment.http.post(path, json={**SMALL, "sync_mode": True, "loras": loras})
            for loras in ([], [{"path": f"{url}/good"}], [{"path": f"{url}/misfit"}], [])
        ]
    plain, adapted, refused, again = answers
    assert [answer.status_code for answer in answers] == [200, 200, 422, 200], refused.text
    assert plain.json()["images"] == again.json()["images"] != adapted.json()["images"]
    (detail,) = refused.json()["detail"]
    assert detail["loc"] == ["body", "loras", 0, "path"] and "layers.29" in detail["msg"]


@pytest.mark.parametrize("machine", [GPU, "job"])
def test_a_preempted_machine_costs_nothing_but_time(deployment: Deployed, machine: str) -> None:
    before = len(calls(deployment, GPU))
    urls = submit(deployment, LONG)
    until(deployment, urls, denoising)
    deployment.do(deployment.cloud.preempt(machine))
    assert "error" not in until(deployment, urls, completed), deployment.cloud.log()
    assert len(calls(deployment, GPU, before)) == 1  # a new job goes on with the old GPU call
    rows = counted(deployment)
    (row,) = (row for row in rows if row["request_id"] == urls["request_id"])
    assert row["units"] == 4 * 384**2 / 2**20


def counted(deployment: Deployed) -> list[dict[str, Any]]:
    """All rows of usage, after a round of housekeeping."""
    run(deployment, "housekeeping")
    files = deployment.cloud.volume_files["vo-zimage-usage"]
    rows: list[dict[str, Any]] = []
    for data, _ in files.values():
        rows += parquet.read_table(io.BytesIO(data)).to_pylist()
    assert len({row["request_id"] for row in rows}) == len(rows)
    return rows


def test_an_input_that_is_delivered_twice_is_performed_once(deployment: Deployed) -> None:
    urls = submit(deployment, SMALL)
    until(deployment, urls, completed)
    before = len(calls(deployment, GPU))
    first = deployment.http.get(urls["response_url"]).json()
    (job,) = calls(deployment, "job")[-1:]
    deployment.do(deployment.cloud.twice(job.id))
    while job.outputs < 2:
        time.sleep(0.02)
    assert len(calls(deployment, GPU)) == before
    assert deployment.http.get(urls["response_url"]).json() == first


def test_an_engine_that_kills_its_machine_does_so_three_times(deployment: Deployed) -> None:
    urls = submit(deployment, LONG)
    for _ in range(3):
        until(deployment, urls, denoising)
        deployment.do(deployment.cloud.preempt(GPU))
        deployment.do(forget_progress(deployment))
    status = until(deployment, urls, completed)
    assert status["error"] == "The runner disconnected 3 times"
    assert status["error_type"] == "runner_disconnected"


async def forget_progress(deployment: Deployed) -> None:
    entries = deployment.cloud.entries["di-zimage-requests"]
    for key in [key for key in entries if b"progress" in key]:
        del entries[key]


def test_no_retry(deployment: Deployed) -> None:
    urls = submit(deployment, LONG, headers={"X-Fal-No-Retry": "1"})
    until(deployment, urls, denoising)
    deployment.do(deployment.cloud.preempt(GPU))
    assert until(deployment, urls, completed)["error_type"] == "runner_disconnected"


def test_a_failing_dict_loses_nothing(deployment: Deployed) -> None:
    """The outcome could not be written: Modal performs the job again, with the GPU's work kept."""
    before = len(calls(deployment, GPU))
    urls = submit(deployment, LONG)
    until(deployment, urls, denoising)
    time.sleep(0.2)
    deployment.cloud.failing["DictUpdate"] = [Status.INTERNAL] * 40
    while not calls(deployment, GPU, before)[0].result:
        time.sleep(0.02)
    while not calls(deployment, "job")[-1].retries:
        time.sleep(0.02)
    deployment.cloud.failing.clear()
    assert "error" not in until(deployment, urls, completed)
    assert len(calls(deployment, GPU, before)) == 1


def test_a_job_that_cannot_be_performed_is_lost_and_stops_nobody(deployment: Deployed) -> None:
    """Dicts that fail for longer than Modal repeats the job: it ends, and housekeeping goes on."""
    with receiving() as receiver:
        urls = submit(deployment, LONG, params={"fal_webhook": receiver.url})
        until(deployment, urls, denoising)
        deployment.cloud.failing["DictUpdate"] = [Status.INTERNAL] * 500
        (job,) = calls(deployment, "job")[-1:]
        assert deployment.do(deployment.cloud.finished(job)).status == 2
        deployment.cloud.failing.clear()
        make_older(deployment, urls["request_id"])
        run(deployment, "housekeeping")
        ((_, body),) = receiver.wait(1)
    assert json.loads(body)["payload"]["error_type"] == "runner_disconnected"
    status = deployment.http.get(urls["status_url"]).json()
    assert (status["status"], status["error_type"]) == ("COMPLETED", "runner_disconnected")


def make_older(deployment: Deployed, request_id: str) -> None:
    """Let a request have come a minute ago."""
    entries = deployment.cloud.entries["di-zimage-requests"]
    for key, value in list(entries.items()):
        if request_id.encode() in key and key.endswith(b"job\x94\x86\x94."):
            job, *rest = pickle.loads(value)
            job.created -= 60
            entries[key] = pickle.dumps((job, *rest))


def test_a_full_queue_is_a_429(deployment: Deployed) -> None:
    deployment.cloud.full = True
    try:
        answer = deployment.http.post(f"/queue{T2I}", json=SMALL)
    finally:
        deployment.cloud.full = False
    assert answer.status_code == 429 and answer.headers["x-fal-needs-retry"] == "1"
    assert answer.json()["error_type"] == "concurrent_requests_limit"


def test_the_same_idempotency_key_is_the_same_request(deployment: Deployed) -> None:
    headers = {"Idempotency-Key": "once"}
    before = len(calls(deployment, "job"))
    first, second = (submit(deployment, SMALL, headers=headers) for _ in range(2))
    assert first["request_id"] == second["request_id"]
    assert len(calls(deployment, "job")) == before + 1
    other = deployment.http.post(f"/queue{T2I}", json=LONG, headers=headers)
    assert other.status_code == 422
    until(deployment, first, completed)


def test_a_request_that_did_not_begin_in_time(deployment: Deployed) -> None:
    blocking = [submit(deployment, LONG) for _ in range(2)]
    for urls in blocking:
        until(deployment, urls, lambda status: status["status"] == "IN_PROGRESS")
    answer = deployment.http.post(T2I, json=SMALL, headers={"X-Fal-Request-Timeout": "0.5"})
    assert (answer.status_code, answer.json()["error_type"]) == (504, "request_timeout")
    assert answer.headers["x-fal-request-timeout-type"] == "user"
    assert not any(urls_done(deployment, urls) for urls in blocking)  # answered when it was due
    for urls in blocking:
        deployment.http.put(urls["cancel_url"])


def test_the_position_in_the_queue(deployment: Deployed) -> None:
    running = [submit(deployment, LONG) for _ in range(2)]
    for urls in running:
        until(deployment, urls, lambda status: status["status"] == "IN_PROGRESS")
    waiting = [submit(deployment, LONG) for _ in range(3)]
    time.sleep(1.2)
    last = submit(deployment, LONG)
    status = deployment.http.get(last["status_url"]).json()
    assert (status["status"], status["queue_position"]) == ("IN_QUEUE", 3)
    for urls in (*running, *waiting, last):
        deployment.http.put(urls["cancel_url"])


def test_low_priority_waits_for_the_others(deployment: Deployed) -> None:
    running = [submit(deployment, LONG) for _ in range(3)]
    low = submit(deployment, SMALL, headers={"X-Fal-Queue-Priority": "low"})
    time.sleep(1.5)
    normal = submit(deployment, SMALL)
    for urls in running:
        deployment.http.put(urls["cancel_url"])
    until(deployment, normal, completed)
    assert deployment.http.get(low["status_url"]).json()["status"] != "COMPLETED"
    until(deployment, low, completed)


def test_webhooks_are_signed_and_repeated(deployment: Deployed) -> None:
    with receiving(500, 200) as receiver:
        urls = submit(deployment, SMALL, params={"fal_webhook": receiver.url})
        (_, first), (headers, body) = receiver.wait(2)
    assert first == body
    assert json.loads(body)["payload"] == deployment.http.get(urls["response_url"]).json()
    verify(deployment.http.get("/.well-known/jwks.json").json(), headers, body)


def test_a_webhook_nobody_saw_to_is_sent_by_housekeeping(deployment: Deployed) -> None:
    with receiving() as receiver:
        urls = submit(deployment, LONG, params={"fal_webhook": receiver.url})
        until(deployment, urls, denoising)
        deployment.cloud.failing["FunctionMap"] = [Status.RESOURCE_EXHAUSTED] * 2
        deployment.http.put(urls["cancel_url"])
        time.sleep(0.2)
        deployment.cloud.failing.clear()
        assert not receiver.got
        age_webhooks(deployment)
        run(deployment, "housekeeping")
        ((_, body),) = receiver.wait(1)
    assert json.loads(body)["error"] == "Invalid status code: 499"


def age_webhooks(deployment: Deployed) -> None:
    """Make every pending delivery an hour older."""
    entries = deployment.cloud.entries["di-zimage-ledger"]
    for key, value in entries.items():
        pending = pickle.loads(value)
        if isinstance(pending, Pending) and pending.due is not None:
            entries[key] = pickle.dumps(dataclasses.replace(pending, due=pending.due - 3600))


def test_a_request_is_forgotten_when_its_time_is_over(deployment: Deployed) -> None:
    urls = submit(deployment, SMALL, headers={"X-Fal-Store-IO": "0"})
    until(deployment, urls, completed)
    entries = deployment.cloud.entries["di-zimage-requests"]
    for key, value in list(entries.items()):
        if urls["request_id"].encode() in key and b"Finished" in value:
            found: Finished = pickle.loads(value)
            entries[key] = pickle.dumps(dataclasses.replace(found, at=found.at - 601))
    assert deployment.http.get(urls["response_url"]).status_code == 404
    run(deployment, "housekeeping")  # counts it
    run(deployment, "housekeeping")  # forgets it
    assert not [key for key in entries if urls["request_id"].encode() in key]


def test_the_report(deployment: Deployed) -> None:
    answer = deployment.http.post(T2I, json=SMALL)
    assert answer.status_code == 200
    run(deployment, "housekeeping")
    (call,) = calls(deployment, "report", run(deployment, "report"))
    text = deserialize(call.result.result.data, None) if call.result else ""
    today = datetime.now(UTC).date().isoformat()
    (line,) = (line for line in text.splitlines() if line.startswith(f"{today}  alice"))
    assert float(line.split()[4]) >= 64 * 64 / 2**20
    assert "started from their snapshot (cpu), 0 had to load anew" in text


def test_a_schedule_makes_its_burst_once(deployment: Deployed) -> None:
    function = deployment.cloud.definition("schedule_burst")
    assert function.schedule.cron.cron_string == "*/5 * * * *"
    before = len(calls(deployment, GPU))
    for _ in range(2):  # Modal's cron, and its retry
        run(deployment, "schedule_burst")
    files = deployment.cloud.volume_files["vo-zimage-scheduled"]
    rounds = len(calls(deployment, GPU, before)) // 12
    assert rounds in (1, 2)  # two if the clock passed a fifth minute between them
    assert len(files) == 12 * rounds
    assert {opened(data).size for data, _ in files.values()} == {(64, 64)}


def test_two_gateways_serve_each_others_requests(deployment: Deployed) -> None:
    deployment.cloud.wanted["gateway"] = 2
    urls = [submit(deployment, SMALL) for _ in range(3)]
    while deployment.cloud.started.count("gateway") < 2:
        time.sleep(0.02)
    time.sleep(2)  # until the second one takes requests
    for each in urls * 4:
        until(deployment, each, completed)
        picture = deployment.http.get(each["response_url"]).json()["images"][0]["url"]
        assert deployment.http.get(picture).status_code == 200
    served = [
        len(c.served) for c in deployment.cloud.containers.values() if c.function == "gateway"
    ]
    assert len(served) == 2 and min(served) > 5


def test_the_logs_name_no_secret(deployment: Deployed) -> None:
    assert deployment.http.post(T2I, json=SMALL).status_code == 200
    log = deployment.cloud.log()
    assert "a-secret-long-enough" not in log and "ab" * 32 not in log
    assert not re.search("Unclosed|never awaited", log), log


@pytest.mark.parametrize("mode", ["gpu", "off"])  # the module's own deployment has mode cpu
def test_snapshot_modes(tmp_path: Path, mode: str) -> None:
    settings = {**SETTINGS, "ZIMAGE_SNAPSHOT": mode}
    with deployed(tmp_path, SECRETS, settings, MACHINE) as deployment:
        deployment.http.headers["Authorization"] = f"Key {KEY}"
        assert deployment.http.post(T2I, json=SMALL).status_code == 200, deployment.cloud.log()
        assert deployment.cloud.checkpoints == ([GPU] if mode == "gpu" else [])


def test_a_private_repository(tmp_path: Path, engine: Engine) -> None:
    """Read with the token in a secret of the deployment's, which no log has."""
    lora = written("fused", pairs(weights(engine.models.transformer), seed=3))
    with hub() as (url, site):
        site.files["/me/mine/resolve/main/a.safetensors"] = save_tensors(
            {name: tensor.clone() for name, tensor in lora.items()}
        )
        secrets = {**SECRETS, "my-hub": {"HF_TOKEN": "hf_of_the_operator", "HF_ENDPOINT": url}}
        settings = {**SETTINGS, "ZIMAGE_HUB_SECRET": "my-hub"}
        with deployed(tmp_path, secrets, settings, MACHINE) as deployment:
            deployment.http.headers["Authorization"] = f"Key {KEY}"
            body = {**SMALL, "loras": [{"path": "me/mine/a.safetensors"}]}
            answer = deployment.http.post("/fal-ai/z-image/turbo/lora", json=body)
            assert answer.status_code == 200, answer.text + deployment.cloud.log()
            assert "hf_of_the_operator" not in deployment.cloud.log()
        assert site.shown == ["Bearer hf_of_the_operator"]


BREAKS_ONCE = """
import importlib.abc, importlib.util, os, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "inference.snapshot":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def patched(module):
            run(module)
            after_restore = module.SnapshotEngine.after_restore
            def broken_later(self):
                served = after_restore(self)
                if os.path.exists(FLAG):
                    os.remove(FLAG)
                    self.engine.models.transformer = None  # as after an error of the GPU
                return served
            module.SnapshotEngine.after_restore = broken_later
        spec.loader.exec_module = patched
        return spec

sys.meta_path.insert(0, Finder())
"""


def test_a_gpu_that_breaks_is_replaced(tmp_path: Path) -> None:
    """The first container's engine fails at every task. It is given up; another does the work."""
    flag = tmp_path / "flag"
    flag.touch()
    (tmp_path / "sitecustomize.py").write_text(f"FLAG = {str(flag)!r}\n{BREAKS_ONCE}")
    machine = {**MACHINE, "PYTHONPATH": str(tmp_path)}
    with deployed(tmp_path / "cloud", SECRETS, SETTINGS, machine) as deployment:
        deployment.http.headers["Authorization"] = f"Key {KEY}"
        answer = deployment.http.post(T2I, json=SMALL)
        assert answer.status_code == 200, deployment.cloud.log()
        assert deployment.cloud.started.count(GPU) == 2 and not flag.exists()
        assert [each.function for each in deployment.cloud.stopping] == [GPU]
        assert any("EngineBroken" in each.exception for each in deployment.cloud.failures)


def test_missing_keys_stop_the_gateway_with_a_sentence(tmp_path: Path) -> None:
    with deployed(tmp_path, {"zimage-keys": {"ZIMAGE_KEYS": ""}}, SETTINGS, MACHINE) as deployment:
        assert deployment.http.get("/health").status_code == 500
        (failure,) = deployment.cloud.failures
    assert "ZIMAGE_KEYS" in failure.exception
