"""Write the tables of `docs/documents.md` from `benchmarks/results/documents.json`.

`python -m scripts.documents_table` rewrites what stands between the markers; with `--check` it exits 1 when the page
differs from the result.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.figures import BEGIN, END, machine, table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "documents.md"
RESULT = ROOT / "benchmarks" / "results" / "documents.json"
MEASURES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}

NAMES = {
    "trilevel": "**trilevel**, trained on 2,048 tokens",
    "dense": "dense twin, trained alike",
    "shipped": "**shipped** (with the long phase)",
    "shipped+focus": "**shipped**, a fifth of the sentences deep",
    "lead": "Lead",
    "random": "Random",
    "lexrank": "LexRank (sumy)",
    "textrank": "TextRank (sumy)",
    "oracle": "greedy oracle, no limit of words",
}


def with_interval(row: Mapping[str, Any], measure: str, digits: int) -> str:
    """A value and its 95% interval."""
    low, high = row[f"{measure}_interval"]
    return f"{row[measure]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def tables(result: Mapping[str, Any]) -> str:
    """Scores, ratios and bars in markdown."""
    scores = [
        [NAMES.get(row["system"], row["system"]), *(with_interval(row, m, 2) for m in MEASURES), f"{row['words']:.0f}"]
        for row in result["rows"]
    ]
    ratios = [
        [NAMES.get(row["over"], row["over"]), *(with_interval(row, m, 3) for m in MEASURES)]
        for row in result["ratios"]
        if row["over"] != "oracle"
    ]
    bars = [[f"`{b['name']}`", f"{b['value']:.3f}", f"{b['op']} {b['bar']:g}", b["holds"]] for b in result["bars"]]
    heading = [*MEASURES.values()]
    return "\n\n".join([
        f"{result['documents']} documents, {result['split']} split. {machine(result)}",
        table(["system", *heading, "words"], scores),
        "Ratio of *trilevel, trained on 2,048 tokens* to the others, paired bootstrap over documents:",
        table(["over", *heading], ratios),
        table(["bar", "measured", "wanted", "holds"], bars),
    ])  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Rewrite the page, or with `--check` say whether it is up to date."""
    old = PAGE.read_text(encoding="utf-8")
    head, _, rest = old.partition(BEGIN)
    text = tables(json.loads(RESULT.read_text(encoding="utf-8")))
    new = f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"
    if "--check" in arguments:
        print("up to date" if new == old else "out of date: run python -m scripts.documents_table")
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
