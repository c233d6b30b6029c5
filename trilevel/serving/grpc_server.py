"""The gRPC front end: the Open Inference Protocol's service around the same engine as REST."""

from __future__ import annotations

from typing import Any, final

import grpc  # type: ignore[import-untyped]
from grpc import aio

from trilevel.errors import ConfigError
from trilevel.serving.front import Call, Front, new_id
from trilevel.serving.grpc_methods import OPEN, SERVICE, Methods, Refusal
from trilevel.serving.status import KeyRefusedError
from trilevel.serving.tls import Tls


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
        methods = Methods(front)
        handlers = {name: _unary(methods, name) for name in methods.names}
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


@final
class _KeyCheck(aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without a key before their message is read."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Go on, or refuse."""
        if details.method.rpartition("/")[2] in OPEN:
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


def _unary(methods: Methods, name: str) -> Any:
    async def run(data: bytes, context: Any) -> bytes:
        said = await methods.answer(name, data, context.invocation_metadata(), context.time_remaining())
        if not isinstance(said, Refusal):
            answer: bytes = said.SerializeToString()
            return answer
        await context.abort(getattr(grpc.StatusCode, said.status), said.message, said.trailer)
        raise AssertionError("abort raises")

    return grpc.unary_unary_rpc_method_handler(run)
