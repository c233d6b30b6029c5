"""LitServe with the product of the trivial model, batching on: `litserve_linear.py PORT FEATURES CLASSES`."""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, D101, D102
from __future__ import annotations

import sys

import litserve as ls
import numpy as np

PORT, FEATURES, CLASSES = map(int, sys.argv[1:])


class Linear(ls.LitAPI):
    def setup(self, device):
        self.w = ((np.arange(FEATURES * CLASSES).reshape(FEATURES, CLASSES) * 7) % 11 - 5).astype(np.float32)

    def decode_request(self, request):
        return np.asarray(request["inputs"][0]["data"], np.float32)

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, x):
        return x @ self.w

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {"outputs": [{"name": "y", "datatype": "FP32", "shape": [1, CLASSES], "data": output.tolist()}]}


if __name__ == "__main__":
    api = Linear(max_batch_size=32, batch_timeout=0.002)
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False, log_level="warning", access_log=False)
