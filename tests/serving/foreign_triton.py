"""Runs with NVIDIA's tritonclient, in an environment of its own: `foreign_triton.py REST_PORT GRPC_PORT`."""

# mypy: ignore-errors
from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

X = np.array([[1.5, -2, 3], [4, 5, 6]], np.float32)
TEXTS = np.array(["ä", "", "\u0000b"], object)
IDS = np.arange(6, dtype=np.int64).reshape(3, 2) - 2**62
IS = np.array([True, False, True])


def tensor(kind: Any, name: str, values: Any, datatype: str, **how: Any) -> Any:
    one = kind.InferInput(name, list(values.shape), datatype)
    one.set_data_from_numpy(values, **how)
    return one


def refused(call: Callable[[], object], part: str) -> None:
    try:
        call()
    except InferenceServerException as error:
        said = f"{error.status()} {error.message()}"
    else:
        said = "nothing was refused"
    assert part in said, said


def check(client: Any, kind: Any, ways: list[dict[str, bool]]) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("double")
    assert client.is_model_ready("double", "1")
    for way in ways:
        asked = [kind.InferRequestedOutput("y", **way)]
        got = client.infer("double", [tensor(kind, "x", X, "FP32", **way)], outputs=asked, request_id="7")
        np.testing.assert_array_equal(got.as_numpy("y"), X * 2)
        assert got.as_numpy("sum") is None
        inputs = [
            tensor(kind, "text", TEXTS, "BYTES", **way),
            tensor(kind, "ids", IDS, "INT64", **way),
            tensor(kind, "is", IS, "BOOL", **way),
        ]
        asked = [kind.InferRequestedOutput(name, **way) for name in ("text", "ids", "is")]
        got = client.infer("texts", inputs, outputs=asked)
        texts = [one.decode() if isinstance(one, bytes) else one for one in got.as_numpy("text")]
        assert texts == list(TEXTS), texts
        np.testing.assert_array_equal(got.as_numpy("ids"), IDS)
        np.testing.assert_array_equal(got.as_numpy("is"), IS)
    got = client.infer("double", [tensor(kind, "x", X, "FP32")], model_version="1", timeout=5_000_000, priority=3)
    np.testing.assert_array_equal(got.as_numpy("sum"), X.sum(axis=1, dtype=np.float64))
    refused(lambda: client.infer("none", [tensor(kind, "x", X, "FP32")]), "no model 'none'")
    refused(lambda: client.infer("double", [tensor(kind, "z", X, "FP32")]), "has the inputs x; z were sent")
    refused(lambda: client.infer("double", [tensor(kind, "x", X[:, :2], "FP32")]), "shape")
    client.load_model("double")
    client.unload_model("double")
    refused(lambda: client.load_model("broken"), "model.onnx is missing")
    refused(lambda: client.load_model("double", config="{}"), "cannot be set")


def main() -> None:
    rest, rpc = sys.argv[1:]
    client = triton_http.InferenceServerClient(f"127.0.0.1:{rest}")
    check(client, triton_http, [{"binary_data": True}, {"binary_data": False}])
    assert client.get_model_metadata("double")["inputs"][0]["shape"] == [-1, 3]
    assert len(client.get_model_repository_index()) == 3
    client = triton_grpc.InferenceServerClient(f"127.0.0.1:{rpc}")
    check(client, triton_grpc, [{}])
    assert client.get_model_metadata("double").inputs[0].shape == [-1, 3]
    assert len(client.get_model_repository_index().models) == 3
    assert client.get_server_metadata().name == "trilevel"
    sys.stdout.write("all as expected\n")


if __name__ == "__main__":
    main()
