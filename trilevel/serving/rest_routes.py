"""What each address of the Open Inference Protocol does."""

from __future__ import annotations

from trilevel import __version__
from trilevel.errors import InputError
from trilevel.serving.front import Front
from trilevel.serving.protocol.json_infer import LENGTH_HEADER, decode_infer, encode_infer, read_json
from trilevel.serving.protocol.tensors import datatype_of
from trilevel.serving.requests import ModelInfo, TensorSpec
from trilevel.serving.rest_exchange import JSON, Exchange, Response, json_response

EXTENSIONS = ("binary_tensor_data", "model_repository", "model_repository(unload_dependents)")
"""By Triton's names; the last says no more than that the parameter is taken."""
_LENGTH = LENGTH_HEADER.lower().encode()
_BYTES = (b"content-type", b"application/octet-stream")


async def live(exchange: Exchange) -> Response:
    """`GET /v2/health/live`."""
    return json_response({"live": True})


async def ready(exchange: Exchange) -> Response:
    """`GET /v2/health/ready`: 503 while it is not."""
    is_ready = exchange.front.is_ready
    return json_response({"ready": is_ready}, 200 if is_ready else 503)


async def server_metadata(exchange: Exchange) -> Response:
    """`GET /v2`."""
    return json_response({"name": "trilevel", "version": __version__, "extensions": EXTENSIONS})


async def model_metadata(exchange: Exchange, name: str, version: str = "") -> Response:
    """`GET /v2/models/NAME[/versions/VERSION]`."""
    info = exchange.front.engine.model(name, version)
    return json_response(
        {
            "name": info.name,
            "versions": versions_of(exchange.front, info),
            "platform": "trilevel",
            "inputs": [_metadata(spec) for spec in info.inputs],
            "outputs": [_metadata(spec) for spec in info.outputs],
            "parameters": {"task": info.task, "paths": ",".join(info.paths)},
        }
    )


async def model_ready(exchange: Exchange, name: str, version: str = "") -> Response:
    """`GET /v2/models/NAME[/versions/VERSION]/ready`: 503 while it is not."""
    info = exchange.front.engine.model(name, version)
    is_ready = info.state == "READY" and not exchange.front.is_draining
    said = {"name": info.name, "ready": is_ready, **({} if is_ready else {"reason": info.reason or info.state})}
    return json_response(said, 200 if is_ready else 503)


async def infer(exchange: Exchange, name: str, version: str = "") -> Response:
    """`POST /v2/models/NAME[/versions/VERSION]/infer`."""
    front, given = exchange.front, exchange.headers.get(_LENGTH)
    if given is not None and not (given.isdigit() and len(given) <= 12):
        raise InputError(f"{LENGTH_HEADER} must be a number of bytes.")
    decoded = decode_infer(await exchange.body(), None if given is None else int(given), front.limits)
    reply, wanted = await exchange.unless_gone(front.infer(exchange.call, name, version, decoded))
    body, json_length = encode_infer(reply, decoded, wanted)
    if json_length is None:
        return Response(200, body)
    return Response(200, body, (_BYTES, (_LENGTH, b"%d" % json_length)))


async def index(exchange: Exchange) -> Response:
    """`POST /v2/repository/index`, with `{"ready": true}` for those alone that are."""
    sent = await _sent(exchange, "ready")
    only_ready = sent.get("ready", False)
    if not isinstance(only_ready, bool):
        raise InputError("ready must be true or false.")
    found = [info for info in exchange.front.engine.models() if info.state == "READY" or not only_ready]
    return json_response(
        [{"name": one.name, "version": one.version, "state": one.state, "reason": one.reason} for one in found]
    )


async def load(exchange: Exchange, name: str) -> Response:
    """`POST /v2/repository/models/NAME/load`."""
    exchange.front.keys.check_admin(exchange.call.key)
    check_parameters((await _sent(exchange, "parameters")).get("parameters", {}))
    await exchange.front.engine.load(name)
    return Response(200, b"", (JSON,))


async def unload(exchange: Exchange, name: str) -> Response:
    """`POST /v2/repository/models/NAME/unload`."""
    exchange.front.keys.check_admin(exchange.call.key)
    check_parameters((await _sent(exchange, "parameters")).get("parameters", {}))
    await exchange.front.engine.unload(name)
    return Response(200, b"", (JSON,))


def check_parameters(given: object) -> None:
    """Raises InputError: something is to be loaded that the server was not started with; no request names files."""
    names = list(given) if isinstance(given, dict) else ["parameters"]
    refused = [str(name)[:80] for name in names if name != "unload_dependents"]
    if refused:
        raise InputError(f"{', '.join(refused[:8])} cannot be set; models lie where the server was told at its start.")


def versions_of(front: Front, info: ModelInfo) -> list[str]:
    """All versions of a model."""
    return [one.version for one in front.engine.models() if one.name == info.name]


async def _sent(exchange: Exchange, *known: str) -> dict[str, object]:
    body = await exchange.body()
    sent = read_json(body, exchange.front.limits) if body else {}
    if not isinstance(sent, dict) or not sent.keys() <= set(known):
        raise InputError(f"the body must be empty or a JSON object with {', '.join(known)} alone.")
    return sent


def _metadata(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "datatype": datatype_of(spec.dtype), "shape": spec.shape}
