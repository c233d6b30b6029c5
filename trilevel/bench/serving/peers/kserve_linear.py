"""KServe's Python server with the product of the trivial model: `kserve_linear.py PORT FEATURES CLASSES GRPC_PORT`."""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN204, D101, D102
from __future__ import annotations

import logging
import sys

import numpy as np
from kserve import InferOutput, InferResponse, Model, ModelServer

PORT, FEATURES, CLASSES, GRPC_PORT = map(int, sys.argv[1:])


class Linear(Model):
    def __init__(self):
        super().__init__("linear")
        self.w = ((np.arange(FEATURES * CLASSES).reshape(FEATURES, CLASSES) * 7) % 11 - 5).astype(np.float32)
        self.ready = True

    def predict(self, payload, headers=None, response_headers=None):
        y = payload.inputs[0].as_numpy() @ self.w
        output = InferOutput(name="y", shape=list(y.shape), datatype="FP32")
        output.set_data_from_numpy(y, binary_data=False)
        return InferResponse(response_id=payload.id or "", model_name=self.name, infer_outputs=[output])


if __name__ == "__main__":
    logging.disable(logging.INFO)
    ModelServer(http_port=PORT, grpc_port=GRPC_PORT, workers=1, enable_docs_url=False, access_log_format=None).start(
        [Linear()]
    )
