"""Keep what `trilevel evaluate classification` measured on IMDB as a result file.

    trilevel evaluate classification CONVERTED --compare DENSE --json | python scripts/imdb_result.py

Reads the last line of standard input, adds the bar and published figures, writes `benchmarks/results/imdb.json`. Exits
1 when the bar does not hold.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trilevel.bench.harness import write_json

OUT = Path(__file__).parents[1] / "benchmarks" / "results" / "imdb.json"
BAR = -0.5
SOURCE = "published, 25,000 training reviews (Sanh et al. 2019, arXiv 1910.01108)"
PUBLISHED = (
    {"classifier": "BERT-base, 110 M parameters", "accuracy": 0.9346, "trained": SOURCE},
    {"classifier": "DistilBERT, 66 M parameters", "accuracy": 0.9282, "trained": SOURCE},
)


def result(found: Mapping[str, Any]) -> dict[str, Any]:
    """The result document: the converted encoder, the dense one fine-tuned alike, and what others published."""
    dense = found["compare"]
    points, interval = dense["difference"]["points"], dense["difference"]["points_interval"]
    rows = [
        {
            "classifier": name,
            "accuracy": own["accuracy"],
            "accuracy_interval": own["accuracy_interval"],
            "log_loss": own["log_loss"],
            "test_reviews": own["rows"],
            "max_tokens": own["max_tokens"],
            "trained": f"here, {found['steps']} steps (docs/classification.md)",
        }
        for name, own in (("MiniLM converted, 6:3:1", found), ("MiniLM dense", dense))
    ]
    bar = {"name": "imdb_points_vs_dense", "value": points, "op": ">=", "bar": BAR, "holds": points >= BAR}
    return {
        "case": "imdb",
        "machine": found["machine"],
        "settings": {"points_interval": interval, "split": found["split"]},
        "rows": [*rows, *PUBLISHED],
        "bars": [bar],
    }


def main() -> int:
    """Read the evaluation and write the result file."""
    document = result(json.loads(sys.stdin.read().splitlines()[-1]))
    write_json(OUT, document)
    return int(not all(bar["holds"] for bar in document["bars"]))


if __name__ == "__main__":
    sys.exit(main())
