"""Memory grows with the tokens, not with their square."""

from __future__ import annotations

import subprocess
import sys

import pytest

# ru_maxrss counts KiB on Linux
_PROGRAM = """
import resource, sys, torch
from trilevel.attention.layer import MultiLevelAttention
from trilevel.attention.levels import Levels

torch.set_num_threads(1)
causal, tokens = sys.argv[1] == "causal", int(sys.argv[2])
layer = MultiLevelAttention(512, 8, levels=Levels(), is_causal=causal, rope_theta=10_000.0)
x = torch.randn(1, tokens, 512)
with torch.inference_mode():
    out = layer(x)
assert out.isfinite().all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("way", ["both_ways", pytest.param("causal", marks=pytest.mark.slow)])
def test_65536_tokens_run_under_2_gib(way: str) -> None:
    """One layer forward, 8 heads of 64; the whole process counts."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, way, "65536"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 * 2**30
