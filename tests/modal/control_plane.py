"""A small Modal control plane on loopback, speaking the client's own gRPC.

It accepts a deploy and remembers what was asked for. Everything the client needs to go on is answered
as the real one would; what no test needs is UNIMPLEMENTED, by name, so that a gap is a loud one.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import modal  # noqa: F401  (modal_proto must not be imported first)
from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError
from grpclib.const import Status
from grpclib.server import Server, Stream
from modal_proto import api_pb2 as api
from modal_proto.api_grpc import ModalClientBase


class Plane:
    """The handlers, and a record of what came: `functions` by name, `classes`, `volumes`, …"""

    def __init__(self) -> None:
        self.functions: dict[str, api.Function | api.FunctionData] = {}
        self.parameters: dict[str, bytes] = {}
        self.classes: list[str] = []
        self.secrets: dict[str, list[str]] = {}
        self.secret_names: dict[str, str] = {}
        self.volumes: dict[str, int] = {}
        self.entries: dict[str, dict[bytes, bytes]] = {}
        self.images: dict[str, api.Image] = {}
        self.published = False
        self.web_url = "http://zimage.example"
        self.failing: dict[str, list[Status]] = {}
        """What calls of an RPC are to be answered with, one after the other."""
        self._ids = 0
        self._servers: list[Server] = []

    def new_id(self, prefix: str) -> str:
        self._ids += 1
        return f"{prefix}-{self._ids}"

    async def ClientHello(self, request: Any) -> Any:
        return api.ClientHelloResponse()

    async def AppGetByDeploymentName(self, request: Any) -> Any:
        return api.AppGetByDeploymentNameResponse()

    async def AppCreate(self, request: Any) -> Any:
        return api.AppCreateResponse(app_id="ap-1", app_page_url="http://app")

    async def AppGetOrCreate(self, request: Any) -> Any:
        return api.AppGetOrCreateResponse(app_id="ap-1")

    async def AppHeartbeat(self, request: Any) -> Any:
        return Empty()

    async def AppClientDisconnect(self, request: Any) -> Any:
        return Empty()

    async def EnvironmentGetOrCreate(self, request: Any) -> Any:
        settings = api.EnvironmentSettings(image_builder_version="2025.06")
        metadata = api.EnvironmentMetadata(name="main", settings=settings)
        return api.EnvironmentGetOrCreateResponse(environment_id="en-1", metadata=metadata)

    async def SecretGetOrCreate(self, request: Any) -> Any:
        self.secrets[request.deployment_name] = list(request.required_keys)
        secret_id = self.new_id("st")
        self.secret_names[secret_id] = request.deployment_name
        return api.SecretGetOrCreateResponse(secret_id=secret_id)

    async def VolumeGetOrCreate(self, request: Any) -> Any:
        self.volumes[request.deployment_name] = request.version
        metadata = api.VolumeMetadata(version=request.version)
        return api.VolumeGetOrCreateResponse(
            volume_id=f"vo-{request.deployment_name}", version=request.version, metadata=metadata
        )

    async def DictGetOrCreate(self, request: Any) -> Any:
        dict_id = f"di-{request.deployment_name}"
        self.entries.setdefault(dict_id, {})
        return api.DictGetOrCreateResponse(dict_id=dict_id)

    async def DictGet(self, request: Any) -> Any:
        value = self.entries[request.dict_id].get(request.key)
        return api.DictGetResponse(found=value is not None, value=value)

    async def DictUpdate(self, request: Any) -> Any:
        entries, created = self.entries[request.dict_id], False
        for update in request.updates:
            if update.key not in entries or not request.if_not_exists:
                created = created or update.key not in entries
                entries[update.key] = update.value
        return api.DictUpdateResponse(created=created)

    async def DictPop(self, request: Any) -> Any:
        value = self.entries[request.dict_id].pop(request.key, None)
        return api.DictPopResponse(found=value is not None, value=value)

    async def DictContents(self, request: Any) -> AsyncIterator[Any]:
        for key, value in list(self.entries[request.dict_id].items()):
            yield api.DictEntry(key=key, value=value)

    async def MountGetOrCreate(self, request: Any) -> Any:
        metadata = api.MountHandleMetadata(content_checksum_sha256_hex="0" * 64)
        return api.MountGetOrCreateResponse(mount_id=self.new_id("mo"), handle_metadata=metadata)

    async def MountBatchedCheckExistence(self, request: Any) -> Any:
        return api.MountBatchedCheckExistenceResponse()

    async def MountPutFile(self, request: Any) -> Any:
        return api.MountPutFileResponse(exists=True)

    async def ImageGetOrCreate(self, request: Any) -> Any:
        image_id = self.new_id("im")
        self.images[image_id] = request.image
        result = api.GenericResult(status=api.GenericResult.GENERIC_STATUS_SUCCESS)
        return api.ImageGetOrCreateResponse(image_id=image_id, result=result)

    async def FunctionPrecreate(self, request: Any) -> Any:
        return api.FunctionPrecreateResponse(
            function_id=f"fu-{request.function_name}", handle_metadata=self._metadata(request)
        )

    async def FunctionCreate(self, request: Any) -> Any:
        # A choice of GPUs comes as function_data, everything else as function.
        ranked = bool(request.function_data.function_name)
        definition = request.function_data if ranked else request.function
        name = definition.function_name
        self.functions[name] = definition
        data = api.FunctionData()
        data.CopyFrom(request.function_data)
        if not data.ranked_functions:
            data.ranked_functions.add()
        return api.FunctionCreateResponse(
            function_id=f"fu-{name}",
            function=request.function,
            function_data=data,
            handle_metadata=self._metadata(definition),
        )

    def _metadata(self, function: Any) -> Any:
        metadata = api.FunctionHandleMetadata(
            function_name=function.function_name, function_type=function.function_type
        )
        if not isinstance(function, api.FunctionPrecreateRequest):
            metadata.class_parameter_info.CopyFrom(function.class_parameter_info)
        if function.webhook_config.type:
            metadata.web_url = self.web_url
        for name, definition in function.method_definitions.items():
            metadata.method_handle_metadata[name].CopyFrom(
                api.FunctionHandleMetadata(
                    function_name=definition.function_name,
                    function_type=definition.function_type,
                    use_method_name=name,
                )
            )
        return metadata

    async def FunctionBindParams(self, request: Any) -> Any:
        """A class with given parameters is a function of its own, named after them."""
        name = request.function_id.removeprefix("fu-")
        given = api.ClassParameterSet.FromString(request.serialized_params).parameters
        bound = f"{name}({', '.join(each.string_value for each in given)})"
        self.parameters[bound] = request.serialized_params
        return api.FunctionBindParamsResponse(
            bound_function_id=f"fu-{bound}", handle_metadata=self._metadata(self.functions[name])
        )

    async def ClassCreate(self, request: Any) -> Any:
        self.classes.append(request.app_id)
        return api.ClassCreateResponse(class_id=self.new_id("cs"))

    async def AppPublish(self, request: Any) -> Any:
        self.published = True
        return api.AppPublishResponse(url="http://app", deployed_at=1.0)

    async def listen(self, task_id: str = "") -> str:
        """Serve on a port of its own, so that whoever calls there is known; returns the URL."""
        server = Server([_service(self, task_id)])
        await server.start("127.0.0.1", 0)
        self._servers.append(server)
        port = server._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        return f"http://127.0.0.1:{port}"

    async def close(self) -> None:
        for server in self._servers:
            server.close()


P = TypeVar("P", bound=Plane)


@contextmanager
def running(plane: P) -> Iterator[tuple[P, str, asyncio.AbstractEventLoop]]:
    """The plane, its URL and its event loop, which has a thread of its own until the block ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def do(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    async def cancel_all() -> None:
        await plane.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    try:
        yield plane, do(plane.listen()), loop
    finally:
        do(cancel_all())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def control_plane() -> Iterator[tuple[Plane, str]]:
    """A running plane that accepts a deploy, and its URL."""
    with running(Plane()) as (plane, url, _):
        yield plane, url


def _service(plane: Plane, task_id: str) -> Any:
    """ModalClientBase with our handlers, everything else refused by name."""

    def handler(name: str) -> Any:
        method = getattr(plane, name, None)
        knows_task = method is not None and "task_id" in inspect.signature(method).parameters
        bound = functools.partial(method, task_id=task_id) if method and knows_task else method

        async def handle(self: Any, stream: Stream[Any, Any]) -> None:
            request = await stream.recv_message()
            if bound is None:
                raise GRPCError(Status.UNIMPLEMENTED, f"the test's control plane has no {name}")
            if plane.failing.get(name):
                raise GRPCError(plane.failing[name].pop(0), f"{name} fails, as asked")
            if inspect.isasyncgenfunction(method):
                async for message in bound(request):
                    await stream.send_message(message)
            else:
                await stream.send_message(await bound(request))

        return handle

    names = ModalClientBase.__abstractmethods__
    return type("Service", (ModalClientBase,), {name: handler(name) for name in names})()
