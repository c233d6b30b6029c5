"""Requests and replies of the protocol as messages of protobuf."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from trilevel.errors import InputError
from trilevel.serving.limits import Limits
from trilevel.serving.protocol.json_infer import ID_CHARACTERS, Infer, check_id, reply_parameters
from trilevel.serving.protocol.open_inference_pb2 import ModelInferResponse
from trilevel.serving.protocol.parameters import read_parameters
from trilevel.serving.protocol.tensors import (
    Array,
    check_shape,
    datatype_of,
    from_bytes,
    numpy_type,
    of_elements,
    to_bytes,
)
from trilevel.serving.requests import Reply

_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
# what clients that also speak REST may leave in; over gRPC every tensor is bytes
_OF_REST = frozenset({"binary_data", "binary_data_size", "binary_data_output"})


def parse(kind: Any, data: bytes) -> Any:
    """A message of this kind; raises InputError where the bytes are none."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InputError(f"the {len(data)} bytes that were sent are no {kind.DESCRIPTOR.name}: {error}.") from error


def decode_infer(message: Any, limits: Limits) -> Infer:
    """A request out of a `ModelInferRequest`; raises InputError where anything in it is not as the protocol says."""
    names = _names(message.inputs, "inputs", limits)
    if not names:
        raise InputError("a request needs one input at least; inputs is empty.")
    for tensor in message.inputs:
        _check_parameters(tensor)
    for tensor in message.outputs:
        _check_parameters(tensor)
    return Infer(
        id=check_id(message.id, "id"),
        inputs=dict(zip(names, _arrays(message, limits), strict=True)),
        outputs=dict.fromkeys(_names(message.outputs, "outputs", limits), True),
        is_binary=True,
        parameters=read_parameters(_values(message.parameters)),
    )


def encode_infer(reply: Reply, request: Infer, wanted: tuple[str, ...]) -> Any:
    """A reply as a `ModelInferResponse`, every tensor as bytes."""
    message = ModelInferResponse(model_name=reply.model, model_version=reply.version, id=request.id)
    for name, value in reply_parameters(reply).items():
        if isinstance(value, str):
            message.parameters[name].string_param = value
        else:
            message.parameters[name].double_param = value
    for name in wanted:
        array = reply.outputs[name]
        message.outputs.add(name=name, datatype=datatype_of(array.dtype), shape=array.shape)
        message.raw_output_contents.append(to_bytes(array))
    return message


def _arrays(message: Any, limits: Limits) -> list[Array]:
    raw = message.raw_input_contents
    if not raw:
        return [_of_contents(tensor, limits) for tensor in message.inputs]
    if len(raw) != len(message.inputs) or any(tensor.HasField("contents") for tensor in message.inputs):
        raise InputError(
            f"{len(raw)} raw_input_contents for {len(message.inputs)} inputs were sent; send one for each input in "
            "their order, and no contents beside them."
        )
    return [
        from_bytes(tensor.name, tensor.datatype, check_shape(tensor.name, list(tensor.shape), limits), data, limits)
        for tensor, data in zip(message.inputs, raw, strict=True)
    ]


def _of_contents(tensor: Any, limits: Limits) -> Array:
    name, datatype = tensor.name, tensor.datatype
    dtype, shape = numpy_type(name, datatype), check_shape(name, list(tensor.shape), limits)
    field = _CONTENTS.get(datatype)
    filled = [one.name for one, _ in tensor.contents.ListFields()]
    if field is None or any(one != field for one in filled):
        where = f"in {field}" if field else "as raw_input_contents"
        raise InputError(f"input {name!r}: elements of {datatype} belong {where}; sent were {', '.join(filled)}.")
    flat, count = getattr(tensor.contents, field), math.prod(shape)
    if len(flat) != count:
        raise InputError(f"input {name!r}: {len(flat)} elements were sent; shape {list(shape)} has {count}.")
    return of_elements(name, datatype, dtype, list(flat), limits).reshape(shape)


def _names(tensors: Sequence[Any], what: str, limits: Limits) -> list[str]:
    if len(tensors) > limits.tensors:
        raise InputError(f"{len(tensors)} {what} were sent; at most {limits.tensors} may be.")
    names = [tensor.name for tensor in tensors]
    if any(not 1 <= len(name) <= ID_CHARACTERS for name in names) or len(set(names)) < len(names):
        raise InputError(f"names of {what} must differ and have 1 to {ID_CHARACTERS} characters.")
    return names


def _check_parameters(tensor: Any) -> None:
    for name in tensor.parameters:
        if name not in _OF_REST:
            raise InputError(f"parameter {name[:80]!r} of tensor {tensor.name!r} is not known; leave it out.")


def _values(parameters: Mapping[str, Any]) -> dict[str, object]:
    values: dict[str, object] = {}
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise InputError(f"parameter {name[:80]!r} has no value.")
        if name not in _OF_REST:
            values[name] = getattr(parameter, kind)
    return values
