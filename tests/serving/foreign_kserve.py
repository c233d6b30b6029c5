"""Runs with KServe's client, in an environment of its own: `foreign_kserve.py REST_PORT GRPC_PORT`."""

# mypy: ignore-errors
from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from typing import Any

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

X = np.array([[1.5, -2, 3], [4, 5, 6]], np.float32)
TEXTS = np.array(["ä", "", "b"], object)
IDS = np.arange(6, dtype=np.int64).reshape(3, 2) - 2**62
IS = np.array([True, False, True])


def tensor(name: str, values: Any, datatype: str, *, is_binary: bool) -> InferInput:
    one = InferInput(name, list(values.shape), datatype)
    one.set_data_from_numpy(values, binary_data=is_binary)
    return one


def doubled(*, is_binary: bool, name: str = "x") -> InferRequest:
    return InferRequest("double", [tensor(name, X, "FP32", is_binary=is_binary)], request_id="7")


def echoed(*, is_binary: bool) -> InferRequest:
    inputs = [("text", TEXTS, "BYTES"), ("ids", IDS, "INT64"), ("is", IS, "BOOL")]
    return InferRequest("texts", [tensor(*one, is_binary=is_binary) for one in inputs])


def check(got: Any, texts: Any) -> None:
    np.testing.assert_array_equal(got.get_output_by_name("y").as_numpy(), X * 2)
    np.testing.assert_array_equal(got.get_output_by_name("sum").as_numpy(), X.sum(axis=1, dtype=np.float64))
    assert got.id == "7"
    assert got.model_name == "double"
    np.testing.assert_array_equal(texts.get_output_by_name("ids").as_numpy(), IDS)
    np.testing.assert_array_equal(texts.get_output_by_name("is").as_numpy(), IS)
    said = [one.decode() if isinstance(one, bytes) else one for one in texts.get_output_by_name("text").as_numpy()]
    assert said == list(TEXTS), said


async def refused(call: Awaitable[object], *parts: str) -> None:
    # httpx and gRPC have errors of their own
    try:
        await call
    except Exception as error:
        said = str(error)
    else:
        said = "nothing was refused"
    assert all(part in said for part in parts), said


async def rest(url: str) -> None:
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    assert await client.is_server_live(url)
    assert await client.is_server_ready(url)
    assert await client.is_model_ready(url, "double")
    for is_binary in (True, False):
        got = await client.infer(url, doubled(is_binary=is_binary), model_name="double")
        check(got, await client.infer(url, echoed(is_binary=is_binary), model_name="texts"))
    asked = doubled(is_binary=True)
    asked.request_outputs = [RequestedOutput("y", {"binary_data": True})]
    got = await client.infer(url, asked, model_name="double")
    np.testing.assert_array_equal(got.get_output_by_name("y").as_numpy(), X * 2)
    await refused(client.infer(url, doubled(is_binary=False), model_name="none"), "no model 'none'", "404")
    await refused(client.infer(url, doubled(is_binary=True, name="z"), model_name="double"), "z were sent", "400")
    await client.close()


async def rpc(url: str) -> None:
    async with InferenceGRPCClient(url) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("double")
        for is_binary in (True, False):
            check(await client.infer(doubled(is_binary=is_binary)), await client.infer(echoed(is_binary=is_binary)))
        await refused(client.infer(doubled(is_binary=True, name="z")), "z were sent", "INVALID_ARGUMENT")


async def main() -> None:
    rest_port, grpc_port = sys.argv[1:]
    await rest(f"http://127.0.0.1:{rest_port}")
    await rpc(f"127.0.0.1:{grpc_port}")
    sys.stdout.write("all as expected\n")


if __name__ == "__main__":
    asyncio.run(main())
