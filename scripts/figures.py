"""Write the measured figures of the README from `benchmarks/results/*.json`.

    python scripts/figures.py            rewrite what stands between the markers
    python scripts/figures.py --check    exit 1 when the README differs from the results

Each result is one document as `trilevel ... --json` prints it: `machine`, `rows`, `bars`. Absent results are left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
MAX_ROWS = 48

TITLES = {
    "demo": "A whole document: dense against trilevel (`make demo`)",
    "documents": "Extractive summarisation (`trilevel evaluate documents`)",
    "attention": "One attention layer (`trilevel bench attention`)",
    "encoders": "A converted MiniLM on 8,192 tokens (`trilevel bench encoders`)",
    "compression": "A document to its vector in 8 bits, MiniLM's size (`trilevel bench compression`)",
    "compression-applications": "Applications in 8 bits (`trilevel bench compression --applications`)",
    "paths": "Paths of their own, against the best fixed path with the same proof (`trilevel bench paths`)",
    "serving": "The server (`trilevel bench serving`)",
    "retrieval": "Does a converted MiniLM find what it should? (`trilevel bench retrieval`)",
    "imdb": "A converted MiniLM fine-tuned on IMDB (docs/classification.md)",
    "calibrate": "The cost model, fitted to this machine (`trilevel bench calibrate`)",
    "levels": "Do the levels earn their place? (`trilevel bench levels`)",
}

Result = Mapping[str, Any]


def number(value: Any) -> str:
    """A figure as the README shows it: three significant digits, no exponent below a million."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "–" if value in (None, "") else str(value)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in markdown."""
    lines = [list(header), ["---"] * len(header), *([number(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bars(result: Result) -> str:
    """The bars of a result, each with what was measured."""
    rows = [(f"`{bar['name']}`", bar["value"], f"{bar['op']} {bar['bar']:g}", bar["holds"]) for bar in result["bars"]]
    return table(["bar", "measured", "wanted", "holds"], rows)


def measured(result: Result) -> str:
    """The rows of a result, with the columns that hold one figure or word and say something in some row."""
    rows = result["rows"][:MAX_ROWS]
    columns = [
        column
        for column in dict.fromkeys(key for row in rows for key in row)
        if any(row.get(column) not in (None, "") for row in rows)
        and not any(isinstance(row.get(column), dict | list) for row in rows)
    ]
    text = table([heading(column) for column in columns], [[cell(row, column) for column in columns] for row in rows])
    left_out = len(result["rows"]) - len(rows)
    return f"{text}\n\n{left_out} more rows are in the result file." if left_out else text


def heading(column: str) -> str:
    """The column's name for a reader; bytes are shown in MiB."""
    return (f"{column.removesuffix('_bytes')} MiB" if column.endswith("_bytes") else column).replace("_", " ")


def cell(row: Mapping[str, Any], column: str) -> Any:
    """The value in the unit that `heading` names, with its interval when the row has one."""
    value, interval = row.get(column), row.get(f"{column}_interval")
    if interval:
        return f"{number(value)} [{', '.join(number(end) for end in interval)}]"
    return value / 2**20 if column.endswith("_bytes") and isinstance(value, int | float) else value


def machine(result: Result) -> str:
    """One line about the machine that measured."""
    block = result["machine"]
    words = [str(block[key]) for key in ("cpu", "gpu") if block.get(key)]
    words += [f"{block['cores']} cores"] if "cores" in block else []
    words += [f"{key} {block[key]}" for key in ("torch", "python", "commit") if block.get(key)]
    return f"Measured on {', '.join(words)}."


def section(name: str, result: Result) -> str:
    """The part of the README about one result."""
    parts = [f"### {TITLES.get(name, name)}", machine(result)]
    parts += [measured(result)] if result.get("rows") else []
    parts += [bars(result)] if result.get("bars") else []
    return "\n\n".join(parts)


def figures(folder: Path) -> str:
    """What stands between the markers, from the results in `folder`; titles fix the order."""
    names = [*TITLES, *sorted(file.stem for file in folder.glob("*.json") if file.stem not in TITLES)]
    files = [folder / f"{name}.json" for name in names]
    return "\n\n".join(section(f.stem, json.loads(f.read_text(encoding="utf-8"))) for f in files if f.is_file())


def updated(readme: str, text: str) -> str:
    """The README with `text` between the markers."""
    head, found, rest = readme.partition(BEGIN)
    if not found or END not in rest:
        raise SystemExit(f"error: the README needs the lines {BEGIN} and {END}, in this order.")
    return f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


def main(arguments: Sequence[str]) -> int:
    """Rewrite the README, or with `--check` say whether it is up to date."""
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = updated(old, figures(ROOT / "benchmarks" / "results"))
    if "--check" in arguments:
        print("up to date" if new == old else "out of date: run python scripts/figures.py")
        return int(new != old)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
