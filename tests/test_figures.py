"""The README's figures come from the result files and from nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import figures

RESULT = {
    "machine": {"cpu": "Some CPU", "cores": 2, "torch": "2.13.0", "isa": ["avx2"]},
    "rows": [
        {"name": "dense", "tokens": 8192, "latency_ms": 334.21, "peak_bytes": 3 * 2**20, "extra": {"a": 1}, "note": ""},
        {"name": "absent peer"},
    ],
    "bars": [{"name": "speedup", "value": 12.345, "op": ">=", "bar": 4, "holds": True}],
}


def test_the_readme_is_up_to_date() -> None:
    readme = (figures.ROOT / "README.md").read_text(encoding="utf-8")
    text = figures.figures(figures.ROOT / "benchmarks" / "results")
    assert figures.updated(readme, text) == readme, "run python scripts/figures.py"


def test_every_result_file_is_a_document_with_its_bars() -> None:
    for file in (figures.ROOT / "benchmarks" / "results").glob("*.json"):
        document = json.loads(file.read_text(encoding="utf-8"))
        assert {"machine", "rows", "bars"} <= set(document), file.name
        for bar in document["bars"]:
            assert set(bar) == {"name", "value", "op", "bar", "holds"}, file.name


def test_a_section_shows_machine_rows_and_bars(tmp_path: Path) -> None:
    (tmp_path / "attention.json").write_text(json.dumps(RESULT))
    text = figures.figures(tmp_path)
    assert "Measured on Some CPU, 2 cores, torch 2.13.0." in text
    assert "| name | tokens | latency ms | peak MiB |" in text
    assert "| dense | 8,192 | 334 | 3 |" in text
    assert "| absent peer | – | – | – |" in text
    assert "| `speedup` | 12.3 | >= 4 | yes |" in text


def test_rows_that_are_left_out_are_counted(tmp_path: Path) -> None:
    rows = [{"n": n} for n in range(figures.MAX_ROWS + 3)]
    (tmp_path / "levels.json").write_text(json.dumps({**RESULT, "rows": rows}))
    assert "3 more rows are in the result file." in figures.figures(tmp_path)


def test_an_interval_stands_beside_its_value(tmp_path: Path) -> None:
    rows = [{"rouge1": 34.51, "rouge1_interval": [33.569, 35.44]}]
    (tmp_path / "documents.json").write_text(json.dumps({**RESULT, "rows": rows}))
    assert "| rouge1 |\n| --- |\n| 34.5 [33.6, 35.4] |" in figures.figures(tmp_path)


def test_absent_results_leave_nothing(tmp_path: Path) -> None:
    assert figures.figures(tmp_path) == ""


def test_only_what_stands_between_the_markers_changes() -> None:
    readme = f"before\n{figures.BEGIN}\nold\n{figures.END}\nafter\n"
    new = figures.updated(readme, "new")
    assert new.startswith("before\n")
    assert new.endswith(f"{figures.END}\nafter\n")
    assert "old" not in new
    assert figures.updated(new, "new") == new


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(SystemExit, match="figures:begin"):
        figures.updated("no markers", "new")
