"""The gRPC front end: the Open Inference Protocol's service around the same engine as REST."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, final

import grpc  # type: ignore[import-untyped]
from grpc import aio

from trilevel import __version__
from trilevel.errors import ConfigError
from trilevel.serving.front import Call, Front, new_id
from trilevel.serving.protocol import open_inference_pb2 as messages
from trilevel.serving.protocol.grpc_infer import decode_infer, encode_infer, parse
from trilevel.serving.protocol.json_infer import check_id
from trilevel.serving.protocol.tensors import datatype_of
from trilevel.serving.requests import OverloadedError, UnknownModelError
from trilevel.serving.rest_routes import EXTENSIONS, check_parameters, versions_of
from trilevel.serving.status import KeyRefusedError, message_of, status_of
from trilevel.serving.tls import Tls

SERVICE = "inference.GRPCInferenceService"
_OPEN = {f"/{SERVICE}/ServerLive", f"/{SERVICE}/ServerReady"}
_MESSAGE_CHARACTERS = 1000
Handler = Callable[[Any, Call], Awaitable[Any]]
Metadata = Sequence[tuple[str, str]]


@final
class GrpcServer:
    """Listens for calls, and lets them end."""

    def __init__(self, front: Front, tls: Tls | None = None) -> None:
        self.front = front
        self._tls = tls
        size = front.limits.body_bytes
        self._server = aio.server(
            interceptors=[_KeyCheck(front)] if front.keys else [],
            options=[
                ("grpc.max_receive_message_length", size),
                ("grpc.max_send_message_length", -1),
                # a second server at the same port is a mistake that would share its clients at random
                ("grpc.so_reuseport", 0),
                ("grpc.max_connection_idle_ms", int(front.limits.idle_s * 1000)),
            ],
            maximum_concurrent_rpcs=front.limits.calls,
        )
        handlers = {name: _unary(front, name, kind, handler) for name, (kind, handler) in self._methods().items()}
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])

    async def start(self, host: str, port: int) -> int:
        """Listen; the port, which 0 leaves to the system; raises ConfigError where the address cannot be had."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._tls is None:
                found: int = self._server.add_insecure_port(address)
            else:
                found = self._server.add_secure_port(address, self._tls.credentials())
        except RuntimeError as error:
            raise ConfigError(f"gRPC cannot listen at {address} ({error}); choose another address.") from error
        await self._server.start()
        return found

    async def stop(self, timeout_s: float) -> None:
        """Take no calls, and wait for those that run; what still runs after `timeout_s` is cut off."""
        await self._server.stop(timeout_s)

    def _methods(self) -> dict[str, tuple[Any, Handler]]:
        return {
            "ServerLive": (messages.ServerLiveRequest, self._live),
            "ServerReady": (messages.ServerReadyRequest, self._ready),
            "ModelReady": (messages.ModelReadyRequest, self._model_ready),
            "ServerMetadata": (messages.ServerMetadataRequest, self._metadata),
            "ModelMetadata": (messages.ModelMetadataRequest, self._model_metadata),
            "ModelInfer": (messages.ModelInferRequest, self._infer),
            "RepositoryIndex": (messages.RepositoryIndexRequest, self._index),
            "RepositoryModelLoad": (messages.RepositoryModelLoadRequest, self._load),
            "RepositoryModelUnload": (messages.RepositoryModelUnloadRequest, self._unload),
        }

    async def _live(self, message: Any, call: Call) -> Any:
        return messages.ServerLiveResponse(live=True)

    async def _ready(self, message: Any, call: Call) -> Any:
        return messages.ServerReadyResponse(ready=self.front.is_ready)

    async def _model_ready(self, message: Any, call: Call) -> Any:
        info = self.front.engine.model(message.name, message.version)
        return messages.ModelReadyResponse(ready=info.state == "READY" and not self.front.is_draining)

    async def _metadata(self, message: Any, call: Call) -> Any:
        return messages.ServerMetadataResponse(name="trilevel", version=__version__, extensions=EXTENSIONS)

    async def _model_metadata(self, message: Any, call: Call) -> Any:
        info = self.front.engine.model(message.name, message.version)
        said = messages.ModelMetadataResponse(name=info.name, platform="trilevel")
        said.versions.extend(versions_of(self.front, info))
        for specs, field in ((info.inputs, said.inputs), (info.outputs, said.outputs)):
            for spec in specs:
                field.add(name=spec.name, datatype=datatype_of(spec.dtype), shape=spec.shape)
        return said

    async def _infer(self, message: Any, call: Call) -> Any:
        decoded = decode_infer(message, self.front.limits)
        reply, wanted = await self.front.infer(call, message.model_name, message.model_version, decoded)
        return encode_infer(reply, decoded, wanted)

    async def _index(self, message: Any, call: Call) -> Any:
        said = messages.RepositoryIndexResponse()
        for info in self.front.engine.models():
            if info.state == "READY" or not message.ready:
                said.models.add(name=info.name, version=info.version, state=info.state, reason=info.reason)
        return said

    async def _load(self, message: Any, call: Call) -> Any:
        name = _named(message)
        await self.front.engine.load(name)
        return messages.RepositoryModelLoadResponse(model_name=name, isLoaded=True)

    async def _unload(self, message: Any, call: Call) -> Any:
        name = _named(message)
        await self.front.engine.unload(name)
        return messages.RepositoryModelUnloadResponse(model_name=name, isUnloaded=True)


@final
class _KeyCheck(aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without a key before their message is read."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Go on, or refuse."""
        if details.method in _OPEN:
            return await continuation(details)
        metadata = dict(details.invocation_metadata)
        try:
            self._front.keys.check(metadata.get("authorization"))
        except KeyRefusedError as error:
            return grpc.unary_unary_rpc_method_handler(self._refusal(error))
        return await continuation(details)

    def _refusal(self, error: KeyRefusedError) -> Any:
        async def refuse(data: bytes, context: Any) -> None:
            self._front.finished(Call(protocol="grpc", route="", id=new_id()), "UNAUTHENTICATED", error)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))

        return refuse


def _unary(front: Front, name: str, kind: Any, handler: Handler) -> Any:
    async def run(data: bytes, context: Any) -> bytes:
        call = Call(protocol="grpc", route="infer" if name == "ModelInfer" else name)
        front.in_flight += 1
        try:
            call.timeout_s = context.time_remaining()
            call.id = _id(context.invocation_metadata()) or new_id()
            said: bytes = (await handler(parse(kind, data), call)).SerializeToString()
        except asyncio.CancelledError:
            front.gone(call, "CANCELLED")
            raise
        except Exception as error:
            status = status_of(error).grpc
            front.finished(call, status, error)
            text = message_of(error, call.id or "")[:_MESSAGE_CHARACTERS]
            await context.abort(getattr(grpc.StatusCode, status), text, _trailer(error))
            raise
        finally:
            front.in_flight -= 1
        front.finished(call, "OK")
        return said

    # bytes come as they are: what cannot be parsed is the client's fault, which gRPC would call INTERNAL
    return grpc.unary_unary_rpc_method_handler(run)


def _id(metadata: Metadata) -> str:
    for key, value in metadata:
        if key == "x-request-id":
            return check_id(value, "x-request-id")
    return ""


def _named(message: Any) -> str:
    check_parameters(dict(message.parameters))
    # KServe's first field is the model's name, Triton's the repository's, which nobody sends
    name: str = message.model_name or message.repository_name
    if not name:
        raise UnknownModelError("model_name is empty; name one of those that RepositoryIndex lists.")
    return name


def _trailer(error: Exception) -> Metadata:
    if not isinstance(error, OverloadedError):
        return ()
    wait = max(1, math.ceil(error.retry_after_s * 1000))
    # the second is read by the retries that gRPC's own clients can be told to make
    return (("retry-after", str(math.ceil(error.retry_after_s))), ("grpc-retry-pushback-ms", str(wait)))
