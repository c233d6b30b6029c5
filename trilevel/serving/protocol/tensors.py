"""Tensors as the protocol writes them: its names of the element types, JSON lists, and little-endian bytes.

Everything a client sends is checked before it is built: no size is believed that the data do not show.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.errors import InputError
from trilevel.serving.limits import Limits

Array = npt.NDArray[Any]
_NUMPY = {
    "BOOL": np.dtype("?"),
    **{f"UINT{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
    "BYTES": np.dtype(object),
}
"""BF16 has no NumPy type, so it is none of them; elements of BYTES are `bytes`."""
_NAMES = {dtype.name: name for name, dtype in _NUMPY.items()} | {"bfloat16": "BF16", "str": "BYTES", "bytes": "BYTES"}
_ELEMENTS: dict[str, set[type]] = {"b": {bool}, "u": {int}, "i": {int}, "f": {int, float}, "O": {str, bytes}}
"""Python's types of elements, by the kind of NumPy's type."""
_LENGTH = struct.Struct("<I")


@functools.lru_cache(maxsize=256)
def datatype_of(dtype: str | np.dtype[Any]) -> str:
    """The protocol's name of a NumPy type, or of the type of this name.

    >>> datatype_of("float32"), datatype_of(np.dtype(object))
    ('FP32', 'BYTES')
    """
    # the name of a type is worked out anew each time it is asked for
    name = dtype if isinstance(dtype, str) else dtype.name
    return _NAMES[name if name in _NAMES else np.dtype(dtype).type.__name__.removesuffix("_")]


def numpy_type(name: str, datatype: object) -> np.dtype[Any]:
    """NumPy's type of the protocol's `datatype`; raises InputError where there is none."""
    found = _NUMPY.get(datatype) if isinstance(datatype, str) else None
    if found is None:
        also = "; convert BF16 to FP32 before sending it" if datatype == "BF16" else ""
        raise InputError(f"input {name!r}: datatype={_short(datatype)} is none of {', '.join(_NUMPY)}{also}.")
    return found


def check_shape(name: str, shape: object, limits: Limits) -> tuple[int, ...]:
    """The shape of an input: at least the rows, every size 1 or more; raises InputError."""
    if not isinstance(shape, Sequence) or isinstance(shape, str) or not 1 <= len(shape) <= limits.axes:
        raise InputError(f"input {name!r}: shape={_short(shape)} must be a list of 1 to {limits.axes} sizes.")
    # a bool is an int to Python, not to the protocol
    if any(type(size) is not int or size < 1 for size in shape):
        raise InputError(f"input {name!r}: shape={_short(shape)} must hold whole numbers of 1 and more.")
    if shape[0] > limits.rows:
        raise InputError(f"input {name!r}: {shape[0]} rows; at most {limits.rows} may be sent at once. Split them.")
    return tuple(shape)


def from_bytes(name: str, datatype: object, shape: tuple[int, ...], data: memoryview | bytes, limits: Limits) -> Array:
    """An input out of its bytes, which it may share; raises InputError."""
    dtype = numpy_type(name, datatype)
    if dtype.kind == "O":
        return _strings(name, shape, data, limits)
    needed = math.prod(shape) * dtype.itemsize
    if len(data) != needed:
        raise InputError(
            f"input {name!r}: {len(data)} bytes were sent; {datatype} of shape {list(shape)} has {needed}."
        )
    array = np.frombuffer(data, dtype)
    if dtype.kind == "b" and array.view(np.uint8).max() > 1:
        raise InputError(f"input {name!r}: a BOOL is a byte of 0 or 1; another value was sent.")
    _check_finite(name, array)
    # bytes lie wherever the ones before them end; not every runtime reads floats from there
    return (array if array.flags.aligned else array.copy()).reshape(shape)


def from_values(name: str, datatype: object, shape: tuple[int, ...], data: object, limits: Limits) -> Array:
    """An input out of JSON, flat or nested as its shape; raises InputError."""
    dtype, count = numpy_type(name, datatype), math.prod(shape)
    flat = _flat(name, shape, data)
    if len(flat) != count:
        raise InputError(f"input {name!r}: {len(flat)} elements were sent; shape {list(shape)} has {count}.")
    return of_elements(name, str(datatype), dtype, flat, limits).reshape(shape)


def of_elements(name: str, datatype: str, dtype: np.dtype[Any], flat: Sequence[Any], limits: Limits) -> Array:
    """Elements of Python's types as a flat array; raises InputError where one is of another type, or out of range."""
    allowed = _ELEMENTS[dtype.kind]
    found = set(map(type, flat))
    if not found <= allowed:
        wrong = ", ".join(sorted(one.__name__ for one in found - allowed))
        raise InputError(f"input {name!r}: elements of {datatype} must not be {wrong}.")
    if dtype.kind == "O":
        return _objects(name, flat, limits)
    if dtype.kind in "ui":
        bounds = np.iinfo(dtype)
        if min(flat) < bounds.min or max(flat) > bounds.max:
            raise InputError(f"input {name!r}: {datatype} holds {bounds.min} to {bounds.max}; an element lies outside.")
    with np.errstate(over="ignore"):
        array = np.array(flat, dtype)
    _check_finite(name, array)
    return array


def to_bytes(array: Array) -> bytes:
    """An output as the protocol's bytes; of BYTES each element after its length."""
    if array.dtype.kind not in "OSU":
        return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    elements = [_encoded(element) for element in array.flat]
    return b"".join(itertools.chain.from_iterable((_LENGTH.pack(len(element)), element) for element in elements))


def to_values(array: Array) -> list[Any]:
    """An output as a flat list for JSON; numbers that JSON lacks (NaN, infinities) become null when it is written.

    Raises:
        InputError: bytes that are no UTF-8 were asked for as JSON.
    """
    if array.dtype.kind not in "OSU":
        values: list[Any] = array.ravel().tolist()
        return values
    try:
        return [_encoded(element).decode() for element in array.flat]
    except UnicodeDecodeError as error:
        raise InputError(f"an output of BYTES is no UTF-8 ({error.reason}); ask for binary_data instead.") from error


def _encoded(element: object) -> bytes:
    return element if isinstance(element, bytes) else str(element).encode()


def _check_finite(name: str, array: Array) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"input {name!r}: NaN, an infinity, or a number that {array.dtype.name} cannot hold was sent.")


def _flat(name: str, shape: tuple[int, ...], data: object) -> list[Any]:
    if not isinstance(data, list):
        raise InputError(f"input {name!r}: data={_short(data)} must be a list, flat or nested as shape {list(shape)}.")
    for axis, size in enumerate(shape[1:], start=1):
        if not data or type(data[0]) is not list:
            break
        if any(type(inner) is not list or len(inner) != size for inner in data):
            raise InputError(f"input {name!r}: lists of axis {axis} must hold {size} elements each, as in its shape.")
        data = list(itertools.chain.from_iterable(data))
    return data


def _objects(name: str, flat: Sequence[str | bytes], limits: Limits) -> Array:
    if len(flat) > limits.strings:
        raise InputError(f"input {name!r}: {len(flat)} strings were sent; at most {limits.strings} may be.")
    array = np.empty(len(flat), object)
    array[:] = [_encoded(element) for element in flat]
    return array


def _strings(name: str, shape: tuple[int, ...], data: memoryview | bytes, limits: Limits) -> Array:
    count, at = math.prod(shape), 0
    found: list[bytes] = []
    # each has at least its length, so a count that the data cannot hold ends here
    while at + _LENGTH.size <= len(data) and len(found) < min(count, limits.strings):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        found.append(bytes(data[at : at + length]))
        at += length
    if len(found) != count or at != len(data):
        raise InputError(
            f"input {name!r}: {len(data)} bytes hold no {count} BYTES of shape {list(shape)}, each after its length in "
            f"4 bytes, little-endian; at most {limits.strings} may be sent."
        )
    return _objects(name, found, limits).reshape(shape)


def _short(value: object) -> str:
    # a client's own data must not fill the log or the reply
    text = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    if isinstance(value, list) and len(value) <= 8 and all(isinstance(one, int | float | str) for one in value):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
