"""Compile the kernels for an H100 on a machine that has none: `python -m tests.attention.triton_compile KIND ...`.

Prints a line a kernel, and fails where one does not compile or takes more shared memory than a block can have. A kind
is a name of `KINDS`, a type and a head size: `union_causal:bf16:64`.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trilevel.attention.impl import triton_backward, triton_kernels
from trilevel.attention.impl.triton_launch import tiles

SWITCHES = ("TABLE", "CAUSAL", "TAIL", "TAIL_BIAS", "REGION", "REST", "REST_ROWS")
KINDS = {
    "window": (),
    "local": ("REST",),
    "local_causal": ("TABLE", "CAUSAL", "REST", "REST_ROWS"),
    "regional": ("REGION",),
    "global": ("TAIL", "TAIL_BIAS", "REST"),
    "packed": ("TABLE", "TAIL", "TAIL_BIAS", "REST", "REST_ROWS"),
    "union_causal": SWITCHES,
}
FLOAT32 = {"lse", "up_lse", "rest_logit", "delta", "share", "slope", "tail_bias", "key_sum", "value_sum", "grad_bias"}
INT32 = {"rows", "tail_rank", "region_span", "readers"}
SHARED_MEMORY = 227 * 1024


def compiled(kernel: Any, kind: str, dtype: str, dim: int) -> Any:
    size = 4 if dtype == "fp32" else 2
    constants: dict[str, Any] = {name: name in KINDS[kind] for name in SWITCHES}
    constants |= {**tiles(dim, size, radius=16), "UP": False, "UP_LSE": True}
    warps = constants.pop("num_warps")
    # sums of parts are float32, other gradients have the type of what they belong to
    in_parts = kernel in (triton_backward.backward_tail, triton_backward.backward_region)
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in INT32:
            signature[name] = "*i32"
        elif name in FLOAT32 or (in_parts and name in ("grad_k", "grad_v")):
            signature[name] = "*fp32"
        elif name == "scale":
            signature[name] = "fp32"
        elif name in ("q", "k", "v", "out", "up") or name.startswith(("tail_", "region_", "grad_")):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "i32"
    used = {name: value for name, value in constants.items() if name in signature}
    source = ASTSource(kernel, signature, constexprs=used)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 2})


def main(wanted: list[str]) -> None:
    for text in wanted:
        kind, dtype, dim = text.split(":")
        kernels = [triton_kernels.forward, triton_backward.backward_query, triton_backward.backward_near]
        kernels += [triton_backward.backward_tail] if "TAIL" in KINDS[kind] else []
        kernels += [triton_backward.backward_region] if "REGION" in KINDS[kind] else []
        for kernel in kernels:
            made = compiled(kernel, kind, dtype, int(dim))
            print(text, kernel.__name__, f"{made.metadata.shared} bytes of shared memory", flush=True)  # noqa: T201
            if made.metadata.shared > SHARED_MEMORY:
                sys.exit(f"{text} {kernel.__name__} needs more than {SHARED_MEMORY} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
