"""Write the tables of `docs/documents.md` and of the model card on MiniLM from `benchmarks/results/documents.json`.

`python -m scripts.documents_table` rewrites what stands between the markers; with `--check` it exits 1 when a page
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
CARD = ROOT / "trilevel" / "applications" / "documents" / "pretrained-minilm" / "MODEL_CARD.md"
RESULT = ROOT / "benchmarks" / "results" / "documents.json"
MEASURES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}

NAMES = {
    "trilevel": "**trilevel**, trained on 2,048 tokens",
    "dense": "dense twin, trained alike",
    "shipped": "**shipped** (with the long phase)",
    "shipped+focus": "**shipped**, a fifth of the sentences deep",
    "minilm": "**minilm**, on a converted MiniLM",
    "lead": "Lead",
    "random": "Random",
    "lexrank": "LexRank (sumy)",
    "textrank": "TextRank (sumy)",
    "centroid": "centroid MiniLM (dense, sentence by sentence)",
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
    bars = [[f"`{b['name']}`", f"{b['value']:.3f}", f"{b['op']} {b['bar']:g}", b["holds"]] for b in result["bars"]]
    heading = [*MEASURES.values()]
    systems = dict.fromkeys(row["system"] for row in result["ratios"])
    return "\n\n".join([
        f"{result['documents']} documents, {result['split']} split. {machine(result)}",
        table(["system", *heading, "words"], scores),
        *(part for system in systems for part in ratios(result, system)),
        table(["bar", "measured", "wanted", "holds"], bars),
    ])  # fmt: skip


def ratios(result: Mapping[str, Any], system: str) -> list[str]:
    """A line and a table: one system over every other."""
    rows = [
        [NAMES.get(row["over"], row["over"]), *(with_interval(row, m, 3) for m in MEASURES)]
        for row in result["ratios"]
        if row["system"] == system and row["over"] != "oracle"
    ]
    name = NAMES.get(system, system).replace("**", "")
    return [
        f"Ratio of *{name}* to the others, paired bootstrap over documents:",
        table(["over", *MEASURES.values()], rows),
    ]


def card(result: Mapping[str, Any]) -> str:
    """What the model on MiniLM weighs and how it does, in markdown."""
    files = [path for path in sorted(CARD.parent.rglob("*")) if path.is_file() and path != CARD]
    sizes = [[f"`{path.relative_to(CARD.parent)}`", f"{path.stat().st_size:,}"] for path in files]
    chosen = [row for row in result["rows"] if row["system"] in ("minilm", "shipped", "centroid", "lead")]
    scores = [[NAMES[row["system"]], *(with_interval(row, m, 2) for m in MEASURES)] for row in chosen]
    return "\n\n".join([
        table(["file", "bytes"], sizes),
        f"{result['documents']} documents, {result['split']} split. {machine(result)}",
        table(["system", *MEASURES.values()], scores),
    ])  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Rewrite the pages, or with `--check` say whether they are up to date."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    differs = False
    pages = [(PAGE, tables(result))]
    # the model on MiniLM may not have been trained yet
    pages += [(CARD, card(result))] if CARD.exists() else []
    for page, text in pages:
        old = page.read_text(encoding="utf-8")
        head, _, rest = old.partition(BEGIN)
        new = f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"
        differs = differs or new != old
        if "--check" not in arguments:
            page.write_text(new, encoding="utf-8")
    if "--check" in arguments:
        print("out of date: run python -m scripts.documents_table" if differs else "up to date")
        return int(differs)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
