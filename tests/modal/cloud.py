"""The rest of a small Modal, on loopback: what was deployed runs, in the real container entrypoint.

`control_plane` accepts a deploy; this starts containers for it and passes inputs, results, streams,
blobs, files and cancels between them, as Modal's documentation and client say the real one does. One
container per function unless more are asked for; images' ENV and secrets reach the processes, volumes
that are mounted are folders. It misbehaves on request: `preempt`, `twice`, `fail`, `full`.

Not faithful: autoscaling, leases, restoring a snapshot into another process, resource limits.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import md5, sha256
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import modal  # noqa: F401  (modal_proto must not be imported first)
from aiohttp import web
from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError
from grpclib.const import Status
from modal_proto import api_pb2 as api

from tests.conftest import ROOT
from tests.modal.control_plane import Plane, running
from tests.modal.ingress import Ingress

POLL_SECONDS = 5.0
"""How long a call for inputs, outputs or cancellations is held open."""

DONE, FAILED, TERMINATED = (
    api.GenericResult.GENERIC_STATUS_SUCCESS,
    api.GenericResult.GENERIC_STATUS_FAILURE,
    api.GenericResult.GENERIC_STATUS_TERMINATED,
)


@dataclass
class Call:
    """A function call with its one input."""

    id: str
    function: str
    input: api.FunctionInput
    invocation: int
    task_id: str | None = None
    retries: int = 0
    outputs: int = 0
    result: api.FunctionGetOutputsItem | None = None
    streams: dict[str, list[api.DataChunk]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class Container:
    """A process. `served` are ids of the calls it took, `cancelled` those it is yet to be told of."""

    task_id: str
    function: str
    process: asyncio.subprocess.Process
    served: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)


class Cloud(Plane):
    """All handlers run on one event loop; `do` runs a coroutine there from elsewhere."""

    def __init__(
        self, home: Path, secrets: dict[str, dict[str, str]], environment: dict[str, str]
    ) -> None:
        super().__init__()
        self.home, self.secret_values, self.environment = home, secrets, environment
        self.calls: dict[str, Call] = {}
        self.queues: dict[str, deque[str]] = defaultdict(deque)
        self.containers: dict[str, Container] = {}
        self.processes: list[asyncio.subprocess.Process] = []
        self.stopping: list[Container] = []
        self.started: list[str] = []
        self.checkpoints: list[str] = []
        self.failures: list[api.GenericResult] = []
        self.blobs: dict[str, bytes] = {}
        self.volume_files: dict[str, dict[str, tuple[bytes, float]]] = defaultdict(dict)
        self.wanted: dict[str, int] = defaultdict(lambda: 1)
        self.local_files: dict[str, str] = {}
        """Paths in an image that `add_local_file` filled, and where those files are here."""
        self.full = False
        self.plain_url = self.blob_url = ""
        self._changed = asyncio.Condition()

    async def open(self, certificate: ssl.SSLContext | None) -> web.AppRunner:
        """Listen for blobs, and for requests to the web function."""
        blobs = web.Application(client_max_size=1 << 30)
        blobs.router.add_route("*", "/{name}", self.blob)
        ingress = web.Application(client_max_size=1 << 30)
        ingress.add_subapp("/blobs", blobs)
        ingress.router.add_route("*", "/{path:.*}", Ingress(self, "gateway").handle)
        runner = web.AppRunner(ingress, shutdown_timeout=1)
        await runner.setup()
        plain = web.TCPSite(runner, "127.0.0.1", 0)
        await plain.start()
        self.plain_url = f"http://localhost:{port_of(plain)}"
        self.blob_url = f"{self.plain_url}/blobs"
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=certificate)
        await site.start()
        scheme = "https" if certificate else "http"
        self.web_url = f"{scheme}://localhost:{port_of(site)}"
        return runner

    # ## Calls, from the side that makes them

    async def FunctionMap(self, request: Any) -> Any:
        if self.full:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, "the function's queue is full")
        item, name = request.pipelined_inputs[0], request.function_id.removeprefix("fu-")
        call = await self.enqueue(name, item.input, request.function_call_invocation_type)
        answer = api.FunctionPutInputsResponseItem(input_id=f"in-{call.id}", input_jwt=call.id)
        return api.FunctionMapResponse(
            function_call_id=call.id, pipelined_inputs=[answer], function_call_jwt=call.id
        )

    async def enqueue(
        self,
        name: str,
        given: api.FunctionInput,
        invocation: int = api.FUNCTION_CALL_INVOCATION_TYPE_ASYNC,
    ) -> Call:
        call = Call(self.new_id("fc"), name, given, invocation)
        self.calls[call.id] = call
        await self._queue(call)
        return call

    async def _queue(self, call: Call) -> None:
        call.task_id = None
        self.queues[call.function].append(call.id)
        await self._scale(call.function)
        await self._notify()

    async def FunctionGetOutputs(self, request: Any) -> Any:
        call = self.calls[request.function_call_id]
        await self._until(lambda: call.result is not None, min(request.timeout, POLL_SECONDS))
        if call.result is None:
            return api.FunctionGetOutputsResponse(num_unfinished_inputs=1)
        return api.FunctionGetOutputsResponse(outputs=[call.result])

    async def FunctionCallCancel(self, request: Any) -> Any:
        call = self.calls[request.function_call_id]
        if call.id in self.queues[call.function]:
            self.queues[call.function].remove(call.id)
            await self._finish(call, api.GenericResult(status=TERMINATED))
        elif call.result is None and call.task_id is not None:
            self.containers[call.task_id].cancelled.append(call.id)
            await self._notify()
        return Empty()

    async def FunctionGetCurrentStats(self, request: Any) -> Any:
        name = request.function_id.removeprefix("fu-")
        tasks = sum(each.function == name for each in self.containers.values())
        return api.FunctionStats(backlog=len(self.queues[name]), num_total_tasks=tasks)

    # ## Calls, from the side that performs them

    async def ContainerHello(self, request: Any) -> Any:
        return Empty()

    async def ContainerHeartbeat(self, request: Any, task_id: str) -> Any:
        container = self.containers.get(task_id)
        if container is None:
            return api.ContainerHeartbeatResponse()
        await self._until(lambda: bool(container.cancelled), POLL_SECONDS - 0.2)
        response = api.ContainerHeartbeatResponse()
        if container.cancelled:
            ids = [f"in-{call_id}" for call_id in container.cancelled]
            response.cancel_input_event.input_ids.extend(ids)
            container.cancelled.clear()
        return response

    async def FunctionGetInputs(self, request: Any, task_id: str) -> Any:
        if task_id not in self.containers:  # it asked to be stopped
            stop = api.FunctionGetInputsItem(kill_switch=True)
            return api.FunctionGetInputsResponse(inputs=[stop])
        container = self.containers[task_id]
        queue = self.queues[container.function]
        await self._until(lambda: bool(queue), POLL_SECONDS)
        if not queue or task_id not in self.containers:
            return api.FunctionGetInputsResponse()
        call = self.calls[queue.popleft()]
        call.task_id = task_id
        container.served.append(call.id)
        item = api.FunctionGetInputsItem(
            input_id=f"in-{call.id}",
            input=call.input,
            function_call_id=call.id,
            function_call_invocation_type=call.invocation,
            retry_count=call.retries,
        )
        return api.FunctionGetInputsResponse(inputs=[item])

    async def FunctionGetDynamicConcurrency(self, request: Any) -> Any:
        return api.FunctionGetDynamicConcurrencyResponse(concurrency=request.max_concurrency)

    async def FunctionPutOutputs(self, request: Any, task_id: str) -> Any:
        for output in request.outputs:
            call = self.calls[output.input_id.removeprefix("in-")]
            call.outputs += 1
            if output.result.status == FAILED:
                self.failures.append(output.result)
                policy = self.definition(call.function).retry_policy
                if call.retries < policy.retries:
                    call.retries += 1
                    await asyncio.sleep(0)  # the real one waits for the policy's delay
                    await self._queue(call)
                    continue
            await self._finish(call, output.result, output.data_format)
        return Empty()

    async def _finish(self, call: Call, result: api.GenericResult, data_format: int = 0) -> None:
        if call.result is None:
            call.result = api.FunctionGetOutputsItem(
                result=result,
                data_format=data_format or api.DATA_FORMAT_PICKLE,  # type: ignore[arg-type]
                input_id=f"in-{call.id}",
                task_id=call.task_id or "",
            )
        await self._notify()

    async def TaskResult(self, request: Any, task_id: str) -> Any:
        """A container could not start: so do its inputs end (the real one tries a few times more)."""
        self.failures.append(request.result)
        queue = self.queues[self.containers.pop(task_id).function]
        while queue:
            await self._finish(self.calls[queue.popleft()], request.result)
        return Empty()

    async def ContainerCheckpoint(self, request: Any, task_id: str) -> Any:
        self.checkpoints.append(self.containers[task_id].function)
        return Empty()

    async def ContainerStop(self, request: Any) -> Any:
        """A container that wants no more inputs; it goes on with what it has."""
        self.stopping.append(self.containers.pop(request.task_id))
        await self._notify()
        return api.ContainerStopResponse()

    async def VolumeCommit(self, request: Any) -> Any:
        return api.VolumeCommitResponse()

    async def VolumeReload(self, request: Any) -> Any:
        return Empty()

    # ## Streams: requests into a web function, responses out of it

    async def FunctionCallPutDataOut(self, request: Any) -> Any:
        await self.put(request.function_call_id, "out", request.data_chunks)
        return Empty()

    async def put(self, call_id: str, stream: str, chunks: Any) -> None:
        self.calls[call_id].streams[stream].extend(chunks)
        await self._notify()

    async def FunctionCallGetDataIn(self, request: Any) -> AsyncIterator[Any]:
        async for chunk in self.read(request.function_call_id, "in", request.last_index):
            yield chunk

    async def read(self, call_id: str, stream: str, index: int = 0) -> AsyncIterator[Any]:
        """Chunks as they come, until the call has ended."""
        call = self.calls[call_id]
        chunks = call.streams[stream]
        while True:
            seen = index
            await self._until(lambda: len(chunks) > seen or call.result is not None, POLL_SECONDS)  # noqa: B023
            while len(chunks) > index:
                yield chunks[index]
                index += 1
            if call.result is not None and len(chunks) == index:
                return

    # ## Blobs, and files on volumes, with their bytes over HTTP

    async def BlobCreate(self, request: Any) -> Any:
        blob_id = self.new_id("bl")
        url = f"{self.blob_url}/{blob_id}"
        return api.BlobCreateResponse(blob_ids=[blob_id], upload_urls={"items": [url]})

    async def BlobGet(self, request: Any) -> Any:
        return api.BlobGetResponse(download_url=f"{self.blob_url}/{request.blob_id}")

    async def blob(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if request.method == "PUT":
            data = await request.read()
            self.blobs[name] = data
            return web.Response(text=name, headers={"ETag": f'"{md5(data).hexdigest()}"'})
        return web.Response(body=self.blobs[name])

    async def VolumePutFiles2(self, request: Any) -> Any:
        response, files = api.VolumePutFiles2Response(), self.volume_files[request.volume_id]
        for file_index, file in enumerate(request.files):
            names = [sha256(block.contents_sha256).hexdigest() for block in file.blocks]
            missing = [index for index, name in enumerate(names) if name not in self.blobs]
            for index in missing:
                response.missing_blocks.add(
                    file_index=file_index,
                    block_index=index,
                    put_url=f"{self.blob_url}/{names[index]}",
                )
            if not missing:
                data = b"".join(self.blobs[name] for name in names)
                files[file.path.strip("/")] = (data, time.time())
        return response

    async def VolumeGetFile2(self, request: Any) -> Any:
        data, _ = self._file(request)
        blob_id = self.new_id("bl")
        self.blobs[blob_id] = data
        urls = [f"{self.blob_url}/{blob_id}"] if data else []
        return api.VolumeGetFile2Response(get_urls=urls, size=len(data), len=len(data))

    async def VolumeRemoveFile2(self, request: Any) -> Any:
        self._file(request)
        del self.volume_files[request.volume_id][request.path.strip("/")]
        return Empty()

    def _file(self, request: Any) -> tuple[bytes, float]:
        try:
            return self.volume_files[request.volume_id][request.path.strip("/")]
        except KeyError:
            raise GRPCError(Status.NOT_FOUND, f"no file {request.path}") from None

    async def VolumeListFiles2(self, request: Any) -> AsyncIterator[Any]:
        entries = [
            api.FileEntry(path=path, type=api.FileEntry.FILE, mtime=int(mtime), size=len(data))
            for path, (data, mtime) in self.volume_files[request.volume_id].items()
        ]
        yield api.VolumeListFiles2Response(entries=entries)

    # ## Containers

    def definition(self, name: str) -> api.Function:
        """A function as deployed; of a choice of GPUs, the first."""
        found = self.functions[name.partition("(")[0]]
        return found if isinstance(found, api.Function) else found.ranked_functions[0].function

    async def _scale(self, name: str) -> None:
        running = sum(each.function == name for each in self.containers.values())
        for _ in range(running, self.wanted[name]):
            await self._start(name)

    async def _start(self, name: str) -> None:
        task_id = self.new_id("ta")
        definition = api.Function()
        definition.CopyFrom(self.definition(name))
        definition.function_name = name.partition("(")[0]
        definition.resources.ClearField("gpu_config")  # there is none here
        definition.is_checkpointing_function = definition.checkpointing_enabled
        arguments = api.ContainerArguments(
            task_id=task_id,
            function_id=f"fu-{name}",
            app_id="ap-1",
            function_def=definition,
            serialized_params=self.parameters.get(name, b""),
            environment_name="main",
            checkpoint_id=f"ch-{task_id}",
            app_layout=self.layout(definition),
        )
        folder = self.home / task_id
        folder.mkdir(parents=True)
        (folder / "arguments").write_bytes(arguments.SerializeToString())
        (folder / "restored").write_text("{}")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("ZIMAGE_", "MODAL_"))}
        environment = {
            **kept,
            **self._image_environment(definition),
            **self.environment,
            "HOME": str(folder),
            "MODAL_SERVER_URL": await self.listen(task_id),
            "MODAL_IS_REMOTE": "1",
            "MODAL_TASK_ID": task_id,
            "MODAL_CONTAINER_ARGUMENTS_PATH": str(folder / "arguments"),
            "MODAL_HEARTBEAT_INTERVAL": str(POLL_SECONDS),
            "MODAL_ENABLE_SNAP_RESTORE": "1",
            "MODAL_RESTORE_STATE_PATH": str(folder / "restored"),
        }
        for secret_id in definition.secret_ids:
            environment |= self.secret_values[self.secret_names[secret_id]]
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "modal._container_entrypoint"),
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                # A shell's background job ignores it, and so would what it starts; see `stop`.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        finally:
            os.close(log)
        self.processes.append(process)
        self.containers[task_id] = Container(task_id, name, process)
        self.started.append(name)

    def _image_environment(self, definition: api.Function) -> dict[str, str]:
        """ENV of the function's image; paths on volumes become folders of ours."""
        found: dict[str, str] = {}
        pending = [definition.image_id]
        while pending:
            image = self.images[pending.pop()]
            for command in image.dockerfile_commands:
                for name, value in re.findall(r"^ENV ([A-Z_]+)=(.*)", command):
                    found.setdefault(name, value.strip("'\""))
            pending.extend(base.image_id for base in image.base_images)
        for name, value in found.items():
            found[name] = self.local_files.get(value, value)
        for mount in definition.volume_mounts:
            folder = str(self.home / mount.volume_id)
            for name, value in found.items():
                found[name] = value.replace(mount.mount_path, folder, 1)
        return found

    def layout(self, definition: api.Function) -> api.AppLayout:
        """What a container is told of the app's functions, and of what its own depends on."""
        layout = api.AppLayout()
        for dependency in definition.object_dependencies:
            if dependency.object_id.startswith("vo-"):
                version = self.volumes[dependency.object_id.removeprefix("vo-")]
                metadata = api.VolumeMetadata(version=version)
                layout.objects.add(object_id=dependency.object_id, volume_metadata=metadata)
            else:
                layout.objects.add(object_id=dependency.object_id)
        for name in self.functions:
            metadata = self._metadata(self.functions[name])
            layout.function_ids[name] = f"fu-{name}"
            layout.objects.add(object_id=f"fu-{name}", function_handle_metadata=metadata)
            if name.endswith(".*"):
                layout.class_ids[name.removesuffix(".*")] = f"cs-{name}"
                layout.objects.add(
                    object_id=f"cs-{name}", class_handle_metadata=api.ClassHandleMetadata()
                )
        return layout

    def log(self) -> str:
        return "\n".join(
            f"== {path.parent.name}\n{path.read_text()}" for path in self.home.glob("*/log")
        )

    # ## Trouble, on request

    async def preempt(self, name: str) -> None:
        """Take a function's machines away; what they were at begins again elsewhere."""
        for container in [each for each in self.containers.values() if each.function == name]:
            container.process.kill()
            del self.containers[container.task_id]
            for call_id in container.served:
                if (call := self.calls[call_id]).result is None and call.task_id:
                    await self._queue(call)

    async def twice(self, call_id: str) -> None:
        """Deliver an input a second time, as if a lease had run out."""
        await self._queue(self.calls[call_id])

    async def run(self, name: str, *arguments: Any) -> Call:
        """What a cron, or `modal run`, does."""
        from modal._serialization import serialize

        given = api.FunctionInput(
            args=serialize((arguments, {})), data_format=api.DATA_FORMAT_PICKLE
        )
        return await self.enqueue(name, given)

    async def finished(self, call: Call) -> api.GenericResult:
        await self._until(lambda: call.result is not None, 60)
        assert call.result is not None, self.log()
        return call.result.result

    # ## Waiting

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, condition: Any, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(condition)

    async def stop(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)  # SIGTERM skips exit hooks
        waiting = [asyncio.create_task(process.wait()) for process in self.processes]
        if waiting:
            await asyncio.wait(waiting, timeout=15)
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.kill()
        await asyncio.gather(*waiting)


def port_of(site: web.TCPSite) -> int:
    server: Any = site._server
    return int(server.sockets[0].getsockname()[1])


T = TypeVar("T")


@dataclass
class Deployed:
    """A cloud with the app on it. `url` is the gateway's; `http` asks it."""

    cloud: Cloud
    url: str
    http: httpx2.Client
    _loop: asyncio.AbstractEventLoop

    def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run something of the cloud's where it runs."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(100)


@contextmanager
def deployed(
    home: Path,
    secrets: dict[str, dict[str, str]],
    settings: dict[str, str],
    environment: dict[str, str],
    certificate: ssl.SSLContext | None = None,
) -> Iterator[Deployed]:
    """`modal deploy modal_app.py` with `settings`, on a cloud whose containers also get `environment`."""
    with running(Cloud(home, secrets, environment)) as (cloud, url, loop):
        runner = asyncio.run_coroutine_threadsafe(cloud.open(certificate), loop).result(30)
        try:
            done = deploy(home, url, **settings)
            assert done.returncode == 0, done.stdout + done.stderr
            verify: Any = certificate is None
            with httpx2.Client(base_url=cloud.web_url, timeout=100, verify=verify) as http:
                yield Deployed(cloud, cloud.web_url, http, loop)
        finally:
            asyncio.run_coroutine_threadsafe(cloud.stop(), loop).result(30)
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)


def deploy(home: Path, url: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """`modal deploy`, by the real client, to whatever listens at `url`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ZIMAGE_", "MODAL_"))}
    environment = {
        **kept,
        "HOME": str(home),
        "MODAL_SERVER_URL": url,
        "MODAL_TOKEN_ID": "ak-test",
        "MODAL_TOKEN_SECRET": "as-test",
        "MODAL_DISABLE_API_PROXY": "1",
        **settings,
    }
    command = [sys.executable, "-m", "modal", "deploy", "modal_app.py"]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
