"""Frames between the supervisor and a worker: a header in JSON, then arrays as they lie in memory. No pickles."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt

from trilevel.serving.requests import Arrays

_PREFIX = struct.Struct("<4sIQ")
_MAGIC = b"TLF1"
_ALIGN = 16
_SCRATCH_BYTES = 1 << 16
MAX_HEADER_BYTES = 1 << 20
MAX_BODY_BYTES = 1 << 32
MAX_AXES = 8
DTYPES = frozenset(
    {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"}
)


class FrameError(ValueError):
    """Bytes that are no frame: the other side is damaged, and its connection is closed."""


class Frame(NamedTuple):
    """What one side tells the other."""

    fields: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]]


def encode(fields: Mapping[str, Any], arrays: Arrays | None = None) -> list[bytes | memoryview]:
    """Buffers to write one after another; those of large arrays are not copied.

    Raises:
        FrameError: an array is of a type that is not sent, or the whole is too large.
    """
    entries, parts, size = [], [], 0
    for name, array in (arrays or {}).items():
        if array.dtype.name not in DTYPES or array.ndim > MAX_AXES:
            raise FrameError(f"array {name!r} is {array.dtype} of {array.ndim} axes; sent are {', '.join(DTYPES)}.")
        entries.append((name, array.dtype.name, array.shape))
        native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
        # an empty array has no bytes that could be cast
        parts.append(native.reshape(-1).view(np.uint8).data if native.size else memoryview(b""))
        parts.append(memoryview(bytes(-native.nbytes % _ALIGN)))
        size += native.nbytes + -native.nbytes % _ALIGN
    header = json.dumps({"fields": fields, "arrays": entries}, allow_nan=False, separators=(",", ":")).encode()
    # arrays begin at a multiple of the alignment
    header += b" " * (-(len(header) + _PREFIX.size) % _ALIGN)
    if len(header) > MAX_HEADER_BYTES or size > MAX_BODY_BYTES:
        raise FrameError(f"a frame of {len(header)} + {size} bytes is too large.")
    first = _PREFIX.pack(_MAGIC, len(header), size) + header
    if len(first) + size <= _SCRATCH_BYTES:
        return [b"".join([first, *parts])]
    return [first, *(part for part in parts if len(part))]


@final
class Reader:
    """Makes frames of bytes as they come: fill `buffer`, then say how many bytes with `filled`.

    Small frames are read many at a time; a large one is received into its own memory, where its arrays stay.
    """

    def __init__(self) -> None:
        self._scratch = np.empty(_SCRATCH_BYTES, np.uint8)
        self._start = self._end = 0
        self._large: npt.NDArray[np.uint8] | None = None
        self._have = 0

    @property
    def buffer(self) -> memoryview:
        """Where the next bytes belong, one at least."""
        if self._large is not None:
            return self._large.data[self._have :]
        return self._scratch.data[self._end :]

    def filled(self, count: int) -> list[Frame]:
        """The frames that these bytes completed.

        Raises:
            FrameError: they are no frames.
        """
        if self._large is not None:
            self._have += count
            if self._have < len(self._large):
                return []
            whole, self._large = self._large, None
            return [_decode(whole)]
        self._end += count
        frames = []
        while (size := self._next_size()) is not None and self._start + size <= self._end:
            frames.append(_decode(self._scratch[self._start : self._start + size].copy()))
            self._start += size
        rest = self._scratch[self._start : self._end].copy()
        self._start = self._end = 0
        if size is not None and size > _SCRATCH_BYTES:
            self._large, self._have = np.empty(size, np.uint8), len(rest)
            self._large[: len(rest)] = rest
        else:
            self._scratch[: len(rest)] = rest
            self._end = len(rest)
        return frames

    def _next_size(self) -> int | None:
        if self._end - self._start < _PREFIX.size:
            return None
        header, body = _sizes(self._scratch, self._start)
        return _PREFIX.size + header + body


def _sizes(data: npt.NDArray[np.uint8], at: int = 0) -> tuple[int, int]:
    magic, header, body = _PREFIX.unpack_from(data.data, at)
    if magic != _MAGIC or header > MAX_HEADER_BYTES or body > MAX_BODY_BYTES:
        raise FrameError(f"bytes that begin with {magic!r}, {header} and {body} are no frame.")
    return header, body


def _decode(data: npt.NDArray[np.uint8]) -> Frame:
    header, _ = _sizes(data)
    at = _PREFIX.size + header
    try:
        values = json.loads(bytes(data[_PREFIX.size : at]))
        fields, entries = values["fields"], values["arrays"]
        if not isinstance(fields, dict) or len({name for name, _, _ in entries}) < len(entries):
            raise FrameError("a frame's fields are no table, or an array stands twice in it.")
        arrays = {}
        for name, dtype, shape in entries:
            arrays[name], at = _array(data, at, str(dtype), shape)
    except (KeyError, TypeError, ValueError) as error:
        raise FrameError(f"the header of a frame is damaged ({error}).") from error
    if at != len(data):
        raise FrameError(f"a frame of {len(data)} bytes has arrays for {at}.")
    return Frame(fields, arrays)


def _array(data: npt.NDArray[np.uint8], at: int, dtype: str, shape: Any) -> tuple[npt.NDArray[Any], int]:
    is_right = dtype in DTYPES and isinstance(shape, list) and len(shape) <= MAX_AXES
    if not is_right or any(type(size) is not int or size < 0 for size in shape):
        raise FrameError(f"an array of {dtype} and shape {shape} is none.")
    kind = np.dtype(dtype)
    count = math.prod(shape)
    size = count * kind.itemsize
    if at + size > len(data):
        raise FrameError(f"an array of {size} bytes does not fit into what is left.")
    array = np.frombuffer(data, kind, count, at) if count else np.empty(0, kind)
    return array.reshape(shape), at + size + -size % _ALIGN
