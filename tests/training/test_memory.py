"""Freed memory is kept during training, and given back at its end."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="of glibc alone"
)
# in a process of its own: what is mapped depends on all that was freed before
SCRIPT = """
import json, resource
import torch
from trilevel.training.memory import freed_memory_kept

def faults():
    # pages that the system had to bring for a tensor of 160 MiB that was freed before
    torch.ones(40 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(40 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = [faults()]
with freed_memory_kept():
    found.append(faults())
found.append(faults())
try:
    with freed_memory_kept():
        raise ValueError
except ValueError:
    found.append(faults())
print(json.dumps(found))
"""


def test_large_tensors_come_from_what_was_freed() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120)
    outside, inside, behind, failed = json.loads(done.stdout)
    # with huge pages 80 and more are brought, without 40,960
    assert inside < 20
    assert min(outside, behind, failed) > 40
