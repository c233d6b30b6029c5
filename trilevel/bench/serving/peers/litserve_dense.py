"""LitServe with its batching around a dense model: `litserve_dense.py PORT SPEC`, SPEC of `DenseSpec` as JSON.

A request names the sample, which the server has already: nothing is read, parsed or sent but the answer.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, D101, D102
from __future__ import annotations

import sys

import litserve as ls

from trilevel.bench.serving.dense import DenseSpec, open_dense

PORT, SPEC = int(sys.argv[1]), DenseSpec.parse(sys.argv[2])


class Dense(ls.LitAPI):
    def setup(self, device):
        self.run = open_dense(SPEC)

    def decode_request(self, request):
        return int(request["sample"])

    def batch(self, inputs):
        return inputs

    def predict(self, samples):
        return self.run(samples if isinstance(samples, list) else [samples])

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        # without batching LitServe hands the whole list on
        row = output[0] if output and isinstance(output[0], list) else output
        return {"outputs": [{"name": "scores", "data": row}]}


if __name__ == "__main__":
    api = Dense(max_batch_size=SPEC.max_batch, batch_timeout=0.01 if SPEC.max_batch > 1 else 0.0)
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=SPEC.workers, timeout=False)
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False, log_level="warning", access_log=False)
