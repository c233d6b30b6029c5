"""What each method of the Open Inference Protocol's service does, whatever server of gRPC takes the call."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple, final

from trilevel import __version__
from trilevel.serving.front import TRACE_HEADERS, Call, Front, new_id
from trilevel.serving.protocol import open_inference_pb2 as messages
from trilevel.serving.protocol.grpc_infer import decode_infer, encode_infer, parse
from trilevel.serving.protocol.json_infer import check_id
from trilevel.serving.protocol.tensors import datatype_of
from trilevel.serving.requests import OverloadedError, UnknownModelError
from trilevel.serving.rest_routes import EXTENSIONS, check_parameters, versions_of
from trilevel.serving.status import message_of, status_of

SERVICE = "inference.GRPCInferenceService"
OPEN = ("ServerLive", "ServerReady")
"""Methods that need no key."""
_MESSAGE_CHARACTERS = 1000
Metadata = tuple[tuple[str, str], ...]


class Refusal(NamedTuple):
    """A status by its name, a message, and what follows it."""

    status: str
    message: str
    trailer: Metadata


@final
class Methods:
    """See the module.

    Attributes:
        names: of the methods.
    """

    names = (
        "ServerLive",
        "ServerReady",
        "ModelReady",
        "ServerMetadata",
        "ModelMetadata",
        "ModelInfer",
        "RepositoryIndex",
        "RepositoryModelLoad",
        "RepositoryModelUnload",
    )

    def __init__(self, front: Front) -> None:
        self.front = front
        self._handlers: dict[str, Callable[[Any, Call], Awaitable[Any]]] = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._metadata,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._infer,
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
        }

    async def answer(
        self, name: str, data: bytes, metadata: Iterable[tuple[str, str]], timeout_s: float | None = None
    ) -> Any | Refusal:
        """The message that answers a call, or what is said in its place.

        Args:
            name: of the method.
            data: the message as it came: what cannot be parsed is the client's fault, which gRPC would call INTERNAL.
            metadata: that came with it.
            timeout_s: that the client left.
        """
        front = self.front
        call = Call(protocol="grpc", route="infer" if name == "ModelInfer" else name, timeout_s=timeout_s)
        front.in_flight += 1
        try:
            sent = dict(metadata)
            call.id = check_id(sent["x-request-id"], "x-request-id") if "x-request-id" in sent else new_id()
            if name not in OPEN:
                if front.tracer is not None:
                    call.span = front.tracer.begin(call, {key: sent.get(key, "") for key in TRACE_HEADERS})
                call.key = front.keys.check(sent.get("authorization"))
            said = await self._handlers[name](parse(getattr(messages, f"{name}Request"), data), call)
        except asyncio.CancelledError:
            front.gone(call, "CANCELLED")
            raise
        except Exception as error:
            status = status_of(error).grpc
            front.finished(call, status, error)
            return Refusal(status, message_of(error, call.id)[:_MESSAGE_CHARACTERS], _trailer(error))
        finally:
            front.in_flight -= 1
        front.finished(call, "OK")
        return said

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
        self.front.keys.check_admin(call.key)
        name = _named(message)
        await self.front.engine.load(name)
        return messages.RepositoryModelLoadResponse(model_name=name, isLoaded=True)

    async def _unload(self, message: Any, call: Call) -> Any:
        self.front.keys.check_admin(call.key)
        name = _named(message)
        await self.front.engine.unload(name)
        return messages.RepositoryModelUnloadResponse(model_name=name, isUnloaded=True)


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
