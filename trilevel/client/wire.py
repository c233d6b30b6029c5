"""Requests and results as the protocol writes them: JSON, and behind it the tensors' bytes."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.client.faults import FailedError
from trilevel.errors import InputError

Array = npt.NDArray[Any]
LENGTH_HEADER = "Inference-Header-Content-Length"
_DATATYPES = {
    "bool": "BOOL",
    **{f"uint{bits}": f"UINT{bits}" for bits in (8, 16, 32, 64)},
    **{f"int{bits}": f"INT{bits}" for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"FP{bits}" for bits in (16, 32, 64)},
    "object": "BYTES",
}
_NUMPY = {name: dtype for dtype, name in _DATATYPES.items()}
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a model answered.

    Attributes:
        model, version: that answered.
        id: of the request.
        outputs: by name; of BYTES arrays of `bytes`.
        paths: the path of each row; empty from other servers.
        milliseconds: by stage, as the server took them.
        explanations: of each row, where asked for.
    """

    model: str
    version: str
    id: str
    outputs: Mapping[str, Array]
    paths: tuple[str, ...]
    milliseconds: Mapping[str, float]
    explanations: tuple[Mapping[str, Any], ...]


def encode(
    inputs: Mapping[str, npt.ArrayLike], outputs: Sequence[str], parameters: Mapping[str, Any], request_id: str
) -> tuple[bytes, dict[str, str]]:
    """The body of a request and its headers; raises InputError for an array whose type the protocol lacks."""
    described, tail = [], []
    for name, given in inputs.items():
        array = np.asarray(given)
        datatype = "BYTES" if array.dtype.kind in "OSU" else _DATATYPES.get(array.dtype.name)
        if datatype is None:
            raise InputError(f"input {name!r} is {array.dtype}; send one of {', '.join(_DATATYPES)}.")
        tail.append(_to_bytes(array))
        size = {"binary_data_size": len(tail[-1])}
        described.append({"name": name, "datatype": datatype, "shape": array.shape, "parameters": size})
    sent: dict[str, Any] = {"inputs": described, "parameters": {"binary_data_output": True, **parameters}}
    if outputs:
        sent["outputs"] = [{"name": name} for name in outputs]
    if request_id:
        sent["id"] = request_id
    head = json.dumps(sent).encode()
    headers = {"Content-Type": "application/octet-stream", LENGTH_HEADER: str(len(head))}
    return b"".join([head, *tail]), headers


def decode(body: bytes, json_length: str | None) -> Result:
    """A result out of the body of an answer; raises FailedError where it is not as the protocol says."""
    try:
        length = len(body) if json_length is None else int(json_length)
        said = json.loads(body[:length])
        outputs, tail = {}, memoryview(body)[length:]
        for output in said["outputs"]:
            size = output.get("parameters", {}).get("binary_data_size")
            dtype, shape = np.dtype(_NUMPY[output["datatype"]]).newbyteorder("<"), tuple(output["shape"])
            if size is None:
                array = _of_values(output["data"], dtype)
            else:
                array, tail = _of_bytes(tail[:size], dtype), tail[size:]
            outputs[output["name"]] = array.reshape(shape)
        parameters = said.get("parameters") or {}
        paths = parameters.get("paths", "")
        return Result(
            model=said["model_name"],
            version=said.get("model_version", ""),
            id=said.get("id") or "",
            outputs=outputs,
            paths=tuple(paths.split(",")) if paths else (),
            milliseconds={name[:-3]: value for name, value in parameters.items() if name.endswith("_ms")},
            explanations=tuple(json.loads(parameters.get("explanations", "[]"))),
        )
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, UnicodeError) as error:
        raise FailedError(f"the answer is not of the Open Inference Protocol ({error!r}); is it its server?") from error


def _to_bytes(array: Array) -> bytes:
    if array.dtype.kind not in "OSU":
        return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    elements = [one if isinstance(one, bytes) else str(one).encode() for one in array.flat]
    return b"".join(part for one in elements for part in (_LENGTH.pack(len(one)), one))


def _of_values(values: list[Any], dtype: np.dtype[Any]) -> Array:
    if dtype.kind == "f":
        # JSON has no NaN
        return np.array([math.nan if one is None else one for one in np.ravel(np.array(values, object))], dtype)
    if dtype.kind == "O":
        return _objects([str(one).encode() for one in np.ravel(np.array(values, object))])
    return np.ravel(np.array(values, dtype))


def _of_bytes(data: memoryview, dtype: np.dtype[Any]) -> Array:
    if dtype.kind != "O":
        # a copy may be written to, and lies where its type wants it
        return np.frombuffer(data, dtype).astype(dtype.newbyteorder("="))
    elements, at = [], 0
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        elements.append(bytes(data[at : at + length]))
        at += length
    return _objects(elements)


def _objects(elements: list[bytes]) -> Array:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array
