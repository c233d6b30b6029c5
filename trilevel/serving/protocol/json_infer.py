"""Requests and replies of the protocol as JSON, with or without the tensors' bytes behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from trilevel.errors import InputError
from trilevel.serving.limits import Limits
from trilevel.serving.protocol.parameters import Parameters, read_parameters
from trilevel.serving.protocol.tensors import (
    Array,
    check_shape,
    datatype_of,
    from_bytes,
    from_values,
    to_bytes,
    to_values,
)
from trilevel.serving.requests import Arrays, Reply

LENGTH_HEADER = "Inference-Header-Content-Length"
"""How much of a body is JSON, where bytes follow it."""
ID_CHARACTERS = 128
_DUMP = orjson.OPT_SERIALIZE_NUMPY


@dataclass(frozen=True, slots=True, kw_only=True)
class Infer:
    """A request as it was sent, before any model has seen it.

    Attributes:
        id: of the client; empty for none.
        outputs: that were asked for, and whether as bytes; empty for all.
        is_binary: whether outputs go as bytes where they do not say.
    """

    id: str
    inputs: Arrays
    outputs: Mapping[str, bool]
    is_binary: bool
    parameters: Parameters


def read_json(body: bytes | memoryview, limits: Limits) -> Any:
    """A body that is JSON; raises InputError where it is none, is too large or too deep."""
    value = _parsed(body, limits)
    _check_depth(value, limits.json_depth)
    return value


def _parsed(body: bytes | memoryview, limits: Limits) -> Any:
    if len(body) > limits.json_bytes:
        raise InputError(
            f"{len(body)} bytes of JSON were sent; at most {limits.json_bytes} may be. Send large tensors as bytes, "
            f"with {LENGTH_HEADER} and binary_data_size."
        )
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InputError(f"the body is no JSON: {error}."[:300]) from error


def decode_infer(body: bytes, json_length: int | None, limits: Limits) -> Infer:
    """A request out of its body, whose first `json_length` bytes are JSON (None for all).

    Raises:
        InputError: anything in it is not as the protocol says.
    """
    data = memoryview(body)
    length = len(data) if json_length is None else json_length
    if not 0 <= length <= len(data):
        raise InputError(f"{LENGTH_HEADER}={length} must lie in 0 to {len(data)}, the length of the body.")
    # nothing nested but tensors is read below, and these by their shapes: no look at the depth is needed
    sent = _object(_parsed(data[:length], limits), "the body")
    _only(sent, "the body", "id", "parameters", "inputs", "outputs", "model_name", "model_version")
    parameters = dict(_object(sent.get("parameters"), "parameters", {}))
    is_binary = _truth(parameters.pop("binary_data_output", False), "binary_data_output")
    return Infer(
        id=_id(sent.get("id")),
        inputs=_inputs(sent.get("inputs"), data[length:], limits),
        outputs=_outputs(sent.get("outputs"), is_binary, limits),
        is_binary=is_binary,
        parameters=read_parameters(parameters),
    )


def encode_infer(reply: Reply, request: Infer, wanted: tuple[str, ...]) -> tuple[bytes, int | None]:
    """A reply as its body, and how much of it is JSON where bytes follow."""
    outputs, tail = [], []
    for name in wanted:
        array: Array = reply.outputs[name]
        output: dict[str, Any] = {"name": name, "datatype": datatype_of(array.dtype), "shape": array.shape}
        if request.outputs.get(name, request.is_binary):
            tail.append(to_bytes(array))
            output["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            output["data"] = to_values(array)
        outputs.append(output)
    sent = {
        "model_name": reply.model,
        "model_version": reply.version,
        "id": request.id,
        "parameters": reply_parameters(reply),
        "outputs": outputs,
    }
    head = orjson.dumps(sent, option=_DUMP)
    return (b"".join([head, *tail]), len(head)) if tail else (head, None)


def reply_parameters(reply: Reply) -> dict[str, str | float]:
    """What a reply says beside its tensors: the path of each row, milliseconds by stage, and why, as JSON."""
    said: dict[str, str | float] = {"paths": ",".join(reply.paths)}
    for stage, seconds in reply.seconds.items():
        said[f"{stage}_ms"] = round(seconds * 1000, 3)
    if reply.explanations:
        said["explanations"] = orjson.dumps(list(reply.explanations), option=_DUMP).decode()
    return said


def check_id(given: str, what: str) -> str:
    """An id as it was given; raises InputError where it is too long or no plain text."""
    if len(given) > ID_CHARACTERS or not given.isprintable():
        raise InputError(f"{what} must be at most {ID_CHARACTERS} printable characters.")
    return given


def _inputs(sent: object, tail: memoryview, limits: Limits) -> dict[str, Array]:
    inputs: dict[str, Array] = {}
    for tensor in _list(sent, "inputs", limits.tensors):
        _only(tensor, "an input", "name", "datatype", "shape", "parameters", "data")
        name = _name(tensor, inputs)
        parameters = _object(tensor.get("parameters"), f"parameters of input {name!r}", {})
        _only(parameters, f"parameters of input {name!r}", "binary_data_size")
        shape, size = check_shape(name, tensor.get("shape"), limits), parameters.get("binary_data_size")
        if size is None:
            inputs[name] = from_values(name, tensor.get("datatype"), shape, tensor.get("data"), limits)
            continue
        if tensor.get("data") is not None:
            raise InputError(f"input {name!r} has both data and binary_data_size; send one of them.")
        if type(size) is not int or not 0 <= size <= len(tail):
            raise InputError(f"input {name!r}: binary_data_size must lie in 0 to {len(tail)}, the bytes that are left.")
        inputs[name] = from_bytes(name, tensor.get("datatype"), shape, tail[:size], limits)
        tail = tail[size:]
    if tail:
        raise InputError(f"{len(tail)} bytes follow the last input; binary_data_size of all must add up to the body.")
    if not inputs:
        raise InputError("a request needs one input at least; inputs is empty.")
    return inputs


def _outputs(sent: object, is_binary: bool, limits: Limits) -> dict[str, bool]:
    outputs: dict[str, bool] = {}
    for tensor in _list(sent, "outputs", limits.tensors) if sent is not None else ():
        _only(tensor, "an output", "name", "parameters")
        name = _name(tensor, outputs)
        parameters = _object(tensor.get("parameters"), f"parameters of output {name!r}", {})
        _only(parameters, f"parameters of output {name!r}", "binary_data")
        outputs[name] = _truth(parameters.get("binary_data", is_binary), "binary_data")
    return outputs


def _check_depth(value: object, most: int) -> None:
    level = [value]
    for _ in range(most):
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [one for many in inner for one in many if isinstance(one, dict | list)]
        if not level:
            return
    raise InputError(f"the body has more than {most} lists and objects within each other.")


def _object(value: object, what: str, absent: dict[str, Any] | None = None) -> dict[str, Any]:
    if value is None and absent is not None:
        return absent
    if not isinstance(value, dict):
        raise InputError(f"{what} must be a JSON object, as in {{...}}; a {type(value).__name__} was sent.")
    return value


def _list(value: object, what: str, most: int) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > most:
        raise InputError(f"{what} must be a list of at most {most} tensors.")
    return [_object(one, f"each of {what}") for one in value]


def _only(sent: Mapping[str, object], what: str, *known: str) -> None:
    for name in sent:
        if name not in known:
            raise InputError(f"{name[:80]!r} in {what} is none of {', '.join(known)}.")


def _name(tensor: Mapping[str, object], seen: Mapping[str, object]) -> str:
    name = tensor.get("name")
    if not isinstance(name, str) or not name or len(name) > ID_CHARACTERS:
        raise InputError(f"the name of a tensor must be text of 1 to {ID_CHARACTERS} characters.")
    if name in seen:
        raise InputError(f"tensor {name!r} was sent twice.")
    return name


def _id(given: object) -> str:
    if given is None:
        return ""
    if not isinstance(given, str):
        raise InputError(f"id must be text; a {type(given).__name__} was sent.")
    return check_id(given, "id")


def _truth(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{what} must be true or false.")
    return value
