"""Run the native kernels between pages that nobody may touch: python -m tests.attention.native_guards.

Every tensor of a call ends right before such a page, then starts right after one, so a read outside it ends this
process. What lies between the rows of a tensor is NaN. Results must be those of the same call in ordinary memory, bit
for bit.
`--fault` reads one byte too far, to show that the pages guard.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import random
import sys
from typing import Any, Literal

import torch
from torch import Tensor

from tests.attention.native_cases import DTYPES, cast, draw_arguments, rows
from trilevel.attention.api import multi_level_attention
from trilevel.attention.levels import LevelRatio, Levels

Side = Literal["end", "start"]
_NO_ACCESS, _FAILED = 0, ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guarded:
    """Memory for tensors between guard pages; `close` gives it back, after which they must not be used."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self._mapped: list[tuple[int, int]] = []

    def copy(self, x: Tensor) -> Tensor:
        """The tensor at the same strides."""
        length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        memory = (ctypes.c_char * (length * x.element_size())).from_address(self._map(length * x.element_size()))
        flat = torch.frombuffer(memory, dtype=x.dtype, count=length)
        if x.is_floating_point():
            flat.fill_(torch.nan)
        return flat.as_strided(x.shape, x.stride()).copy_(x)

    def _map(self, size: int) -> int:
        page = mmap.PAGESIZE
        inside = (size + page - 1) // page * page
        total = inside + 2 * page
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        base = _libc.mmap(None, total, mmap.PROT_READ | mmap.PROT_WRITE, kind, -1, 0)
        assert base not in (None, _FAILED), "mmap failed"
        for guard in (base, base + page + inside):
            assert _libc.mprotect(guard, page, _NO_ACCESS) == 0, "mprotect failed"
        self._mapped.append((base, total))
        return int(base + page + (inside - size if self.side == "end" else 0))

    def close(self) -> None:
        """Unmap all."""
        for base, total in self._mapped:
            _libc.munmap(base, total)
        self._mapped.clear()


def run(arguments: dict[str, Any], grad_out: Tensor, grad_lse: Tensor) -> list[Tensor]:
    """Results and gradients of one call."""
    leaves = [x.requires_grad_() for x in arguments.values() if isinstance(x, Tensor) and x.is_floating_point()]
    results = multi_level_attention(**arguments, impl="native", return_lse=True)
    gradients = torch.autograd.grad(results, leaves, (grad_out, grad_lse), allow_unused=True)
    return [x.detach() for x in (*results, *gradients) if x is not None]


def is_the_same_between_guards(arguments: dict[str, Any], side: Side) -> bool:
    """Whether a call in guarded memory gives what it gives elsewhere."""
    query = arguments["query"]
    grad_out, grad_lse = torch.randn(query.shape).to(query.dtype), torch.zeros(query.shape[:3])
    wanted = run({name: x.clone() if isinstance(x, Tensor) else x for name, x in arguments.items()}, grad_out, grad_lse)
    memory = Guarded(side)
    guarded = {name: memory.copy(x) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    found = run(guarded, memory.copy(grad_out), memory.copy(grad_lse))
    found = [x.clone() for x in found]
    memory.close()
    return all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def projections() -> list[dict[str, Any]]:
    """Lengths around tiles and blocks, in the memory of one (batch, tokens, 3, heads, dim) projection and plain."""
    levels = Levels(ratio=LevelRatio(1, 1, 1), window=33, region_size=8, num_global_tokens=5)
    return [
        {"query": query, "key": key, "value": value, "levels": levels, "is_causal": is_causal}
        for dtype in DTYPES
        for tokens in (1, 7, 16, 17, 33, 130)
        for dim in (8, 16, 33, 64, 72)
        for layout in ("fused", "plain")
        for is_causal in (False, True)
        for query, key, value in [[cast(x, dtype) for x in rows(layout, 1, 3, 3, tokens, dim)]]
    ]


def main() -> int:
    """Run the calls; the exit status tells whether results differed, a fault ends the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--fault", action="store_true")
    asked = parser.parse_args()
    if asked.fault:
        edge = Guarded("end").copy(torch.zeros(3, dtype=torch.uint8))
        ctypes.string_at(edge.data_ptr(), 4)
        return 0
    draw = random.Random(7)
    torch.manual_seed(7)
    calls = projections() + [draw_arguments(draw) for _ in range(asked.count)]
    failed = 0
    for side in ("end", "start"):
        for arguments in calls:
            # shown before it may fault
            told = {name: (x.shape, x.dtype) if isinstance(x, Tensor) else x for name, x in arguments.items()}
            sys.stdout.write(f"{side}: {told}\n")
            sys.stdout.flush()
            same = is_the_same_between_guards(arguments, "end" if side == "end" else "start")
            sys.stdout.write("the same\n" if same else "DIFFERS\n")
            failed += not same
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
