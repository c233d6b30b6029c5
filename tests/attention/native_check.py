"""Hold the native kernels against the reference, in a process of its own: python -m tests.attention.native_check.

Prints each call that disagrees and exits 1, so that a test may set what must be set before a process starts: the
instruction set, the number of threads, a sanitizer. `--library` loads one from a path instead.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from unittest import mock

import torch

from tests.attention.native_cases import DTYPES, Problem, differences, drawn, named, results
from trilevel.attention.impl import native
from trilevel.attention.library import active_isa, load


def depends_on_threads(problem: Problem) -> list[str]:
    """The results that are not the same, bit for bit, with one, two and three threads."""
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(problem, "native"))
    torch.set_num_threads(before)
    return [
        f"{name} depends on the number of threads"
        for name, first in found[0].items()
        if any(not torch.equal(first, other[name]) for other in found[1:])
    ]


def main() -> int:
    """Run the calls that the arguments ask for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--named", action="store_true", help="the cases of every implementation too")
    parser.add_argument("--bfloat16", action="store_true", help="calls in bfloat16 alone")
    parser.add_argument("--threads", action="store_true", help="compare numbers of threads too")
    asked = parser.parse_args()
    if asked.library:
        # every call goes to the library of that path
        mock.patch.object(native, "library", return_value=load(asked.library)).start()
    problems = drawn(asked.count, asked.seed)
    if asked.named:
        problems = itertools.chain(problems, *(named(dtype) for dtype in DTYPES))
    if asked.bfloat16:
        problems = (problem for problem in problems if problem.dtype == torch.bfloat16)
    count = failed = 0
    for problem in problems:
        told = differences(problem, results(problem, "native"))
        if asked.threads:
            told += depends_on_threads(problem)
        if told:
            sys.stdout.write(f"{'; '.join(told)}: {problem.name}\n")
        count, failed = count + 1, failed + bool(told)
    sys.stdout.write(f"{asked.library or active_isa()}: {count} calls, {failed} disagree\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
