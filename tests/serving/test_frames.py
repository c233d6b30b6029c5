"""Frames between processes: what goes in comes out, in any pieces; damage is refused."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trilevel.serving.frames import DTYPES, Frame, FrameError, Reader, encode

ARRAYS = st.dictionaries(
    st.text(max_size=7),
    hnp.arrays(
        st.sampled_from(sorted(DTYPES)).map(np.dtype), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
    ),
    max_size=3,
)


def read(data: bytes, piece: int) -> list[Frame]:
    reader, found = Reader(), []
    while data:
        room = reader.buffer
        count = min(piece, len(room), len(data))
        room[:count] = data[:count]
        found += reader.filled(count)
        data = data[count:]
    return found


def joined(fields: Mapping[str, object], arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    return b"".join(bytes(part) for part in encode(fields, arrays))


@given(frames=st.lists(ARRAYS, min_size=1, max_size=4), piece=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_what_goes_in_comes_out(frames: list[dict[str, npt.NDArray[np.generic]]], piece: int) -> None:
    data = b"".join(joined({"n": number}, arrays) for number, arrays in enumerate(frames))
    found = read(data, piece)
    assert [frame.fields for frame in found] == [{"n": number} for number in range(len(frames))]
    for frame, arrays in zip(found, frames, strict=True):
        assert list(frame.arrays) == list(arrays)
        for name, array in arrays.items():
            assert frame.arrays[name].dtype == array.dtype
            assert frame.arrays[name].shape == array.shape
            np.testing.assert_array_equal(frame.arrays[name], array)
            assert frame.arrays[name].flags.aligned


@pytest.mark.parametrize("piece", [7_919, 65_536, 1 << 22])
def test_large_frames_among_small_ones(piece: int) -> None:
    large: dict[str, npt.NDArray[Any]] = {"x": np.arange(100_003, dtype=np.float64), "y": np.arange(13)[::-1]}
    data = joined({"n": 0}, {}) + joined({"n": 1}, large) + joined({"n": 2}, large) + joined({"n": 3}, {})
    found = read(data, piece)
    assert [frame.fields["n"] for frame in found] == [0, 1, 2, 3]
    np.testing.assert_array_equal(found[2].arrays["x"], large["x"])
    np.testing.assert_array_equal(found[2].arrays["y"], large["y"])


def test_an_array_that_is_not_contiguous_or_of_the_other_order() -> None:
    x = np.arange(35, dtype=">i4").reshape(5, 7)[:, ::2]
    (frame,) = read(joined({}, {"x": x}), 11)
    np.testing.assert_array_equal(frame.arrays["x"], x)


def test_objects_are_not_sent() -> None:
    with pytest.raises(FrameError, match="is object"):
        encode({}, {"x": np.array([{}])})


def header(values: object, body: bytes = b"") -> bytes:
    text = json.dumps(values).encode()
    return struct.pack("<4sIQ", b"TLF1", len(text), len(body)) + text + body


@pytest.mark.parametrize(
    "data",
    [
        b"PICK" + bytes(12),
        struct.pack("<4sIQ", b"TLF1", 1 << 30, 0),
        struct.pack("<4sIQ", b"TLF1", 2, 1 << 60),
        header([]),
        header({"fields": [], "arrays": []}),
        header({"fields": {}, "arrays": [["x", "float32", [2]]]}, bytes(4)),
        header({"fields": {}, "arrays": [["x", "float32", [-1]]]}, bytes(4)),
        header({"fields": {}, "arrays": [["x", "object", [1]]]}, bytes(8)),
        header({"fields": {}, "arrays": [["x", "int8", [True]]]}, bytes(16)),
        header({"fields": {}, "arrays": [["x", "int8", [1]], ["x", "int8", [1]]]}, bytes(32)),
        header({"fields": {}, "arrays": [["x", "int8", [1 << 40, 1 << 40]]]}, bytes(16)),
        header({"fields": {}, "arrays": []}, bytes(16)),
    ],
    ids=range(12),
)
def test_damage_is_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        read(data, 1 << 16)


@given(place=st.integers(0, 200), value=st.integers(0, 255))
@settings(max_examples=100, deadline=None)
def test_a_changed_byte_never_ends_in_another_error(place: int, value: int) -> None:
    data = bytearray(joined({"job": 3}, {"x": np.arange(17, dtype=np.int32)}))
    data[place % len(data)] = value
    with contextlib.suppress(FrameError):
        read(bytes(data), 1 << 16)
