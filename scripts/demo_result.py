"""Keep the figures of the demo as a result file.

    trilevel demo --json | python scripts/demo_result.py

Reads the last line of standard input, adds the machine and the bars, writes `benchmarks/results/demo.json`. Exits 1
when a bar does not hold.
"""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trilevel.bench.harness import write_json
from trilevel.report.machine import machine_block

OUT = Path(__file__).parents[1] / "benchmarks" / "results" / "demo.json"
COMPARE = {">=": operator.ge, "<=": operator.le}
BARS = (("speedup", ">=", 4.0), ("memory_ratio", "<=", 0.25), ("memory_vs_sdpa", "<=", 1.05))
LABELS = {
    "trilevel": "trilevel",
    "focus": "trilevel, focus on a fifth",
    "bfloat16": "trilevel, bfloat16",
    "int8": "trilevel, INT8 artifact",
    "sdpa": "dense, SDPA",
    "materialised": "dense, materialised",
}


def result(figures: Mapping[str, Any], machine: Mapping[str, Any]) -> dict[str, Any]:
    """The result document: one row for each way of computing, and the bars; peaks are those of whole processes."""
    rows = [
        {
            "way": label,
            "tokens": figures["memory_tokens"] if name == "materialised" else figures["tokens"],
            "seconds": figures[f"{name}_s"],
            "peak_bytes": figures.get(f"{name}_peak_bytes"),
        }
        for name, label in LABELS.items()
        if figures.get(f"{name}_s") is not None
    ]
    rows.append({"way": "empty process", "peak_bytes": figures["empty_peak_bytes"]})
    bars = []
    for name, op, bar in BARS:
        value = figures[name]
        holds = value is not None and COMPARE[op](value, bar)
        bars.append({"name": name, "value": value, "op": op, "bar": bar, "holds": holds})
    # where the report was written is of no interest to a reader elsewhere
    kept = {name: value for name, value in figures.items() if name != "report"}
    return {"case": "demo", "machine": dict(machine), "figures": kept, "rows": rows, "bars": bars}


def main() -> int:
    """Read the demo's figures and write the result file."""
    document = result(json.loads(sys.stdin.read().splitlines()[-1]), machine_block())
    write_json(OUT, document)
    return int(not all(bar["holds"] for bar in document["bars"]))


if __name__ == "__main__":
    sys.exit(main())
