"""The codecs: what goes in comes out, in every form; and what is wrong is the client's fault, never a crash."""

from __future__ import annotations

import json
import math
import os
import random
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trilevel.client import wire
from trilevel.client.faults import FailedError
from trilevel.errors import InputError
from trilevel.serving.limits import Limits
from trilevel.serving.protocol import grpc_infer, json_infer
from trilevel.serving.protocol.open_inference_pb2 import ModelInferRequest, ModelInferResponse
from trilevel.serving.protocol.tensors import datatype_of, from_bytes, to_bytes
from trilevel.serving.requests import Reply

LIMITS = Limits(json_bytes=100_000, strings=50, rows=97, axes=4, tensors=5)
NUMBERS = [
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    "float16",
    "float32",
    "float64",
]
CONTENTS = {"bool": "bool", "int64": "int64", "uint64": "uint64", "float32": "fp32", "float64": "fp64"}
FUZZ_S = float(os.environ.get("TRILEVEL_FUZZ_SECONDS", "2")) / 4


def reply_of(outputs: dict[str, Any]) -> Reply:
    rows = len(next(iter(outputs.values())))
    return Reply(model="m", version="3", outputs=outputs, paths=("a", "b") * rows, seconds={"total": 0.25})


def body(**changes: Any) -> bytes:
    tensor = {"name": "x", "shape": [2, 3], "datatype": "FP32", "data": [1, 2.5, 3, 4, 5, 6]} | changes
    return json.dumps({"inputs": [{key: value for key, value in tensor.items() if value is not None}]}).encode()


@st.composite
def tensors(draw: st.DrawFn) -> Any:
    dtype = draw(st.sampled_from([*NUMBERS, "object"]))
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    if dtype == "object":
        flat = draw(st.lists(st.text(max_size=5), min_size=math.prod(shape), max_size=math.prod(shape)))
        array = np.empty(len(flat), object)
        array[:] = [one.encode() for one in flat[: LIMITS.strings]] + [b""] * max(0, len(flat) - LIMITS.strings)
        return array.reshape(shape)
    elements = {"allow_nan": False, "allow_infinity": False} if dtype.startswith("float") else None
    return draw(arrays.arrays(dtype, shape, elements=elements))


def same(got: Any, array: Any) -> None:
    assert got.dtype.name == array.dtype.name
    np.testing.assert_array_equal(got, array)


def test_bytes_are_little_endian_and_row_major() -> None:
    array = from_bytes("x", "INT16", (2, 1), b"\x01\x00\xff\xff", LIMITS)
    same(array, np.array([[1], [-1]], np.int16))
    assert to_bytes(np.array([[1, 2], [3, 4]], ">f4").T) == struct.pack("<4f", 1, 3, 2, 4)
    assert to_bytes(np.array(["ä", b"\xff"], object)) == b"\x02\x00\x00\x00\xc3\xa4\x01\x00\x00\x00\xff"


@given(tensors())
def test_a_request_as_bytes_is_read_as_it_was_written(array: Any) -> None:
    sent, headers = wire.encode(
        {"x": array, "odd": np.array([1, 0], np.int8), "y": array}, ["y"], {"priority": 7}, "id1"
    )
    got = json_infer.decode_infer(sent, int(headers[wire.LENGTH_HEADER]), Limits())
    same(got.inputs["x"], array)
    # bytes of the one before end where they like
    same(got.inputs["y"], array)
    assert got.inputs["y"].flags.aligned
    assert (got.id, dict(got.outputs), got.parameters.priority) == ("id1", {"y": True}, 7)


@given(tensors(), st.booleans())
def test_a_request_as_json_is_read_as_it_was_written(array: Any, is_flat: bool) -> None:
    values = array.ravel() if is_flat else array
    data = json.loads(json.dumps(values.tolist(), default=bytes.decode))
    sent = body(shape=array.shape, datatype=datatype_of(array.dtype.name), data=data)
    same(json_infer.decode_infer(sent, None, Limits()).inputs["x"], array)


@given(tensors(), st.booleans())
def test_a_request_over_grpc_is_read_as_it_was_written(array: Any, is_raw: bool) -> None:
    message = ModelInferRequest(id="id1")
    tensor = message.inputs.add(name="x", datatype=datatype_of(array.dtype.name), shape=array.shape)
    dtype = array.dtype.name
    if is_raw or dtype == "float16":
        message.raw_input_contents.append(to_bytes(array))
    else:
        small = "uint" if dtype.startswith("u") else "int"
        field = "bytes" if dtype == "object" else CONTENTS.get(dtype, small)
        getattr(tensor.contents, f"{field}_contents").extend(array.ravel().tolist())
    got = grpc_infer.decode_infer(grpc_infer.parse(ModelInferRequest, message.SerializeToString()), Limits())
    same(got.inputs["x"], array)
    assert got.id == "id1"


@given(tensors(), st.booleans())
def test_a_reply_is_read_as_it_was_written(array: Any, is_binary: bool) -> None:
    request = json_infer.decode_infer(body(), None, LIMITS)
    request = json_infer.Infer(
        id="7", inputs=request.inputs, outputs={}, is_binary=is_binary, parameters=request.parameters
    )
    sent, length = json_infer.encode_infer(reply_of({"a": array, "b": array}), request, ("b", "a"))
    assert (length is None) is not is_binary
    got = wire.decode(sent, None if length is None else str(length))
    assert list(got.outputs) == ["b", "a"]
    same(got.outputs["a"], array)
    assert (got.model, got.version, got.id, got.milliseconds) == ("m", "3", "7", {"total": 250.0})
    assert got.paths[:2] == ("a", "b")


def test_numbers_that_json_lacks_become_null() -> None:
    request = json_infer.decode_infer(body(), None, LIMITS)
    sent, _ = json_infer.encode_infer(reply_of({"y": np.array([1, math.nan, math.inf])}), request, ("y",))
    assert json.loads(sent)["outputs"][0]["data"] == [1, None, None]
    assert np.isnan(wire.decode(sent, None).outputs["y"][1])


def test_bytes_that_are_no_text_cannot_go_as_json() -> None:
    request = json_infer.decode_infer(body(), None, LIMITS)
    with pytest.raises(InputError, match=r"no UTF-8.*ask for binary_data"):
        json_infer.encode_infer(reply_of({"y": np.array([b"\xff"], object)}), request, ("y",))


def binary(size: int | None = 24, tail: bytes = bytes(24), datatype: str = "FP32", **changes: Any) -> tuple[bytes, int]:
    head = body(data=None, parameters={"binary_data_size": size}, datatype=datatype, **changes)
    return head + tail, len(head)


WRONG: list[tuple[bytes, str]] = [
    (b"", "no JSON"),
    (b"\xff{}", "no JSON"),
    (b'{"inputs": [{"name": "\xff"}]}', "no JSON"),
    (b"[" * 90_000, "no JSON.*depth limit"),
    (b'{"a":' * 5000, "no JSON"),
    (b"[" + b"1," * 60_000 + b"1]", "120003 bytes of JSON were sent; at most 100000"),
    (b"[]", "the body must be a JSON object.*list was sent"),
    (b"{}", "inputs must be a list"),
    (b'{"inputs": []}', "inputs is empty"),
    (b'{"inputs": 3}', "inputs must be a list"),
    (b'{"inputs": [3]}', "each of inputs must be a JSON object"),
    (json.dumps({"inputs": [json.loads(body())["inputs"][0]] * 2}).encode(), "'x' was sent twice"),
    (json.dumps({"inputs": [{}] * 6}).encode(), "at most 5 tensors"),
    (body()[:-1] + b', "more": 1}', "'more' in the body is none of id, parameters"),
    (body()[:-1] + b', "id": 1}', "id must be text; a int"),
    (body()[:-1] + b', "id": "' + b"x" * 200 + b'"}', "id must be at most 128"),
    (body()[:-1] + b', "outputs": [{"name": "y", "parameters": {"classification": 3}}]}', "'classification' in param"),
    (body()[:-1] + b', "outputs": [{"name": "y"}, {"name": "y"}]}', "'y' was sent twice"),
    (body()[:-1] + b', "parameters": []}', "parameters must be a JSON object"),
    (body()[:-1] + b', "parameters": {"max_los": 1}}', "'max_los' is none of priority, max_loss"),
    (body()[:-1] + b', "parameters": {"max_loss": -1}}', "max_loss must be a number of 0"),
    (body()[:-1] + b', "parameters": {"max_loss": true}}', "max_loss must be a number of 0"),
    (body()[:-1] + b', "parameters": {"priority": 1.5}}', "priority must be a whole number"),
    (body()[:-1] + b', "parameters": {"timeout": 0}}', "timeout must be a whole number from 1"),
    (body()[:-1] + b', "parameters": {"explain": 1}}', "explain must be true or false"),
    (body()[:-1] + b', "parameters": {"binary_data_output": 1}}', "binary_data_output must be true"),
    (body(name=""), "name of a tensor must be text"),
    (body(name="x" * 500), "name of a tensor must be text"),
    (body(name=5), "name of a tensor must be text"),
    (body(datatype="FLOAT"), "datatype='FLOAT' is none of BOOL"),
    (body(datatype="BF16"), "convert BF16 to FP32"),
    (body(datatype=["FP32"]), "datatype=.*is none of"),
    (body(shape=[]), r"shape=\[\] must be a list of 1 to 4"),
    (body(shape="23"), "shape='23' must be a list"),
    (body(shape=[1] * 5), "shape=.* must be a list of 1 to 4"),
    (body(shape=[2, -3]), r"shape=\[2, -3\] must hold whole numbers of 1"),
    (body(shape=[0, 3]), "whole numbers of 1"),
    (body(shape=[2, 3.0]), "whole numbers of 1"),
    (body(shape=[True, 6]), "whole numbers of 1"),
    (body(shape=[2, 2**40]), "6 elements were sent; shape .* has 2199"),
    (body(shape=[98, 1]), "98 rows; at most 97"),
    (body(data=None), "data=None must be a list"),
    (body(data={"a": 1}), "data=dict must be a list"),
    (body(data=[1, 2, 3, 4, 5]), "5 elements were sent; shape .* has 6"),
    (body(data=[[1, 2, 3], [4, 5]]), "lists of axis 1 must hold 3"),
    (body(data=[[1, 2], [3, 4], [5, 6]]), "lists of axis 1 must hold 3"),
    (body(data=[[1, 2, 3], 4]), "lists of axis 1 must hold 3"),
    (body(data=[[[1]] * 3] * 2), "must not be list"),
    (body(data=[1, 2, 3, 4, 5, None]), "FP32 must not be NoneType"),
    (body(data=[1, 2, 3, 4, 5, "6"]), "FP32 must not be str"),
    (body(data=[1, 2, 3, 4, 5, True]), "FP32 must not be bool"),
    (body(data=[1, 2, 3, 4, 5, 1e39]), "a number that float32 cannot hold"),
    (body(datatype="FP16", data=[1, 2, 3, 4, 5, 65536]), "a number that float16 cannot hold"),
    (body().replace(b"2.5", b"NaN"), "no JSON"),
    (body().replace(b"2.5", b"-Infinity"), "no JSON"),
    (body(datatype="INT8", data=[1, 2, 3, 4, 5, 128]), "INT8 holds -128 to 127"),
    (body(datatype="UINT64", data=[1, 2, 3, 4, 5, -1]), "UINT64 holds 0 to"),
    (body(datatype="INT64", data=[1, 2, 3, 4, 5, 2**64]), "INT64 must not be float"),
    (body(datatype="INT64", data=[1, 2, 3, 4, 5, 6.0]), "INT64 must not be float"),
    (body(datatype="BOOL", data=[1, 0, 1, 0, 1, 0]), "BOOL must not be int"),
    (body(datatype="BYTES", data=[1, 2, 3, 4, 5, 6]), "BYTES must not be int"),
    (body(datatype="BYTES", shape=[51], data=["a"] * 51), "51 strings were sent; at most 50"),
    (body(parameters={"shared_memory_region": "a"}), "'shared_memory_region' in parameters of input 'x'"),
    (body(parameters={"binary_data_size": 0}), "both data and binary_data_size"),
]
WRONG_BINARY: list[tuple[tuple[bytes, int], str]] = [
    ((body(), 10**6), "Inference-Header-Content-Length=1000000 must lie in 0 to"),
    (binary(size=25), "binary_data_size must lie in 0 to 24"),
    (binary(size=-1), "binary_data_size must lie in"),
    (binary(size=23), "23 bytes were sent; FP32 of shape .* has 24"),
    (binary(tail=bytes(25)), "1 bytes follow the last input"),
    (binary(shape=[2, 2**60]), "24 bytes were sent; FP32 of shape .* has"),
    (binary(tail=struct.pack("<6f", 1, 2, 3, 4, 5, math.nan)), "NaN, an infinity"),
    (binary(tail=struct.pack("<6f", 1, 2, 3, 4, 5, -math.inf)), "NaN, an infinity"),
    (binary(6, b"\x00\x01\x02\x00\x00\x00", "BOOL"), "a BOOL is a byte of 0 or 1"),
    (binary(8, bytes(8), "BYTES"), "8 bytes hold no 6 BYTES"),
    (binary(24, b"\xff" * 24, "BYTES"), "24 bytes hold no 6 BYTES"),
    (binary(25, bytes(25), "BYTES"), "25 bytes hold no 6 BYTES"),
    (binary(24, bytes(24), "BYTES", shape=[97, 2**33]), "24 bytes hold no .* BYTES"),
]


@pytest.mark.parametrize(("sent", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_wrong_json_says_what_is_wrong(sent: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        json_infer.decode_infer(sent, None, LIMITS)


@pytest.mark.parametrize(("sent", "message"), WRONG_BINARY, ids=[message[:40] for _, message in WRONG_BINARY])
def test_wrong_bytes_say_what_is_wrong(sent: tuple[bytes, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        json_infer.decode_infer(*sent, LIMITS)


def test_no_message_repeats_more_than_a_little_of_what_was_sent() -> None:
    long = "y" * 50_000
    for sent in (body(datatype=long), body(shape=long), body(shape=[long]), body(data=long), body(**{long: 1})):
        with pytest.raises(InputError) as caught:
            json_infer.decode_infer(sent, None, LIMITS)
        assert len(str(caught.value)) < 700


def test_json_of_tasks_may_not_be_deep() -> None:
    deep = b"[" * 33 + b"]" * 33
    assert json_infer.read_json(deep[1:-1], LIMITS)
    with pytest.raises(InputError, match="more than 32 lists and objects"):
        json_infer.read_json(deep, LIMITS)


def message(**changes: Any) -> Any:
    made = ModelInferRequest(model_name="m")
    tensor = made.inputs.add(**{"name": "x", "datatype": "FP32", "shape": [2, 3], **changes})
    tensor.contents.fp32_contents.extend(range(6))
    return made


def changed(change: Callable[[Any], object], **changes: Any) -> Any:
    made = message(**changes)
    change(made)
    return made


WRONG_MESSAGES: list[tuple[Any, str]] = [
    (ModelInferRequest(), "inputs is empty"),
    (message(name=""), "names of inputs must differ"),
    (changed(lambda made: made.inputs.append(made.inputs[0])), "names of inputs must differ"),
    (changed(lambda made: made.inputs.extend([made.inputs[0]] * 6)), "7 inputs were sent; at most 5"),
    (message(shape=[2, -3]), "whole numbers of 1"),
    (message(shape=[2, 4]), "6 elements were sent; shape .* has 8"),
    (message(datatype="INT8"), "elements of INT8 belong in int_contents; sent were fp32_contents"),
    (message(datatype="FP16"), "elements of FP16 belong as raw_input_contents"),
    (message(datatype="BF16"), "convert BF16 to FP32"),
    (changed(lambda made: made.raw_input_contents.append(b"")), "no contents beside them"),
    (changed(lambda made: made.raw_input_contents.extend([b"", b""])), "2 raw_input_contents for 1 inputs"),
    (changed(lambda made: made.parameters["no"].Clear()), "parameter 'no' has no value"),
    (changed(lambda made: setattr(made.parameters["max_los"], "double_param", 1)), "'max_los' is none of"),
    (changed(lambda made: setattr(made.parameters["max_loss"], "double_param", math.nan)), "max_loss must be a number"),
    (
        changed(lambda made: setattr(made.inputs[0].parameters["shared_memory_region"], "string_param", "a")),
        "'shared_memory_region' of tensor 'x' is not known",
    ),
    (changed(lambda made: made.inputs[0].contents.fp32_contents.__setitem__(0, math.nan)), "NaN"),
]


@pytest.mark.parametrize(("made", "message"), WRONG_MESSAGES, ids=[message[:40] for _, message in WRONG_MESSAGES])
def test_wrong_messages_say_what_is_wrong(made: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        grpc_infer.decode_infer(grpc_infer.parse(ModelInferRequest, made.SerializeToString()), LIMITS)


def test_what_is_no_message_is_the_clients_fault() -> None:
    with pytest.raises(InputError, match="5 bytes that were sent are no ModelInferRequest"):
        grpc_infer.parse(ModelInferRequest, b"\xff" * 5)
    # a string that is no UTF-8
    with pytest.raises(InputError, match="no ModelInferRequest"):
        grpc_infer.parse(ModelInferRequest, b"\x0a\x01\xff")


def mutants(seeds: list[bytes], seconds: float) -> Iterator[bytes]:
    """Seeds with bytes changed, cut out, doubled or mixed, for so long."""
    draw, ends = random.Random(41), time.monotonic() + seconds
    while time.monotonic() < ends:
        made = bytearray(draw.choice(seeds))
        for _ in range(draw.randint(1, 6)):
            at, size = draw.randrange(len(made) + 1), draw.randint(0, 8)
            part = draw.choice(
                [
                    draw.randbytes(size),
                    bytes(made[at : at + size]) * 2,
                    b"",
                    draw.choice([b"[", b"{", b'"', b"-1", b"1e999", b"null", b"\xff\xff\xff\x7f", b"true", b"\\ud800"]),
                    draw.choice(seeds)[at : at + 20],
                ]
            )
            made[at : at + size] = part
        yield bytes(made)


def survives(decode: Callable[[bytes], object], seeds: list[bytes], allowed: type[Exception]) -> None:
    refused = taken = 0
    for mutant in mutants(seeds, FUZZ_S):
        try:
            decode(mutant)
            taken += 1
        except allowed:
            refused += 1
    # both must happen, else the mutants say nothing
    assert min(refused, taken) > 10, (refused, taken)


def test_fuzz_json() -> None:
    seeds = [body(), body(datatype="BYTES", data=["ä"] * 6), body(datatype="INT8", data=[[1, 2, 3]] * 2)]
    seeds.append(
        json.dumps(
            {**json.loads(body()), "id": "1", "parameters": {"priority": 1}, "outputs": [{"name": "y"}]}
        ).encode()
    )
    survives(lambda sent: json_infer.decode_infer(sent, None, LIMITS), seeds, InputError)


def test_fuzz_bytes_behind_json() -> None:
    seeds = [
        b"%4d" % length + sent
        for sent, length in (binary(), binary(24, bytes(24), "BYTES"), binary(6, bytes(6), "BOOL"))
    ]

    def decode(sent: bytes) -> object:
        return json_infer.decode_infer(sent[4:], int(sent[:4]) if sent[:4].strip().isdigit() else 180, LIMITS)

    survives(decode, seeds, InputError)


def test_fuzz_messages() -> None:
    raw = ModelInferRequest(model_name="m", raw_input_contents=[bytes(24)])
    raw.inputs.add(name="x", datatype="BYTES", shape=[2, 3])
    seeds = [message().SerializeToString(), raw.SerializeToString()]
    survives(lambda sent: grpc_infer.decode_infer(grpc_infer.parse(ModelInferRequest, sent), LIMITS), seeds, InputError)


def test_fuzz_answers() -> None:
    request = json_infer.decode_infer(body(), None, LIMITS)
    outputs = {"y": np.ones((2, 3), np.float32), "t": np.array([b"a", b"bc"], object)}
    seeds = [json_infer.encode_infer(reply_of(outputs), request, ("y", "t"))[0]]
    survives(lambda sent: wire.decode(sent, None), seeds, FailedError)


def test_a_reply_over_grpc_is_all_bytes() -> None:
    request = grpc_infer.decode_infer(message(), LIMITS)
    got = grpc_infer.encode_infer(reply_of({"y": np.ones((2, 3), np.float32)}), request, ("y",))
    got = ModelInferResponse.FromString(got.SerializeToString())
    assert got.raw_output_contents[0] == struct.pack("<6f", *[1] * 6)
    assert (got.outputs[0].datatype, list(got.outputs[0].shape)) == ("FP32", [2, 3])
    assert got.parameters["total_ms"].double_param == 250
