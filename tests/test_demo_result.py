"""The demo's figures as a result file with bars."""

from __future__ import annotations

from typing import Any

import pytest

from scripts import demo_result

FIGURES = {
    "tokens": 13_007,
    "memory_tokens": 7_001,
    "trilevel_s": 0.5,
    "sdpa_s": 3.0,
    "focus_s": None,
    "materialised_s": 9.0,
    "trilevel_peak_bytes": 300,
    "sdpa_peak_bytes": 310,
    "materialised_peak_bytes": 3_000,
    "empty_peak_bytes": 200,
    "speedup": 6.0,
    "memory_ratio": 0.05,
    "memory_vs_sdpa": 0.9,
    "report": "out/demo/report.html",
}


def document(**changed: Any) -> dict[str, Any]:
    return demo_result.result({**FIGURES, **changed}, {"cpu": "Some CPU"})


def test_rows_name_each_way_with_the_length_it_ran_at() -> None:
    rows = {row["way"]: row for row in document()["rows"]}
    assert rows["dense, SDPA"] == {"way": "dense, SDPA", "tokens": 13_007, "seconds": 3.0, "peak_bytes": 310}
    assert rows["dense, materialised"]["tokens"] == 7_001
    assert "trilevel, focus on a fifth" not in rows


def test_no_path_is_kept() -> None:
    assert "report" not in document()["figures"]


@pytest.mark.parametrize(
    ("name", "value", "holds"),
    [
        ("speedup", 4.0, True),
        ("speedup", 3.99, False),
        ("memory_ratio", 0.25, True),
        ("memory_ratio", 0.26, False),
        ("memory_vs_sdpa", 1.05, True),
        ("memory_vs_sdpa", 1.06, False),
        ("speedup", None, False),
    ],
)
def test_bars_hold_at_their_edge(name: str, value: float | None, holds: bool) -> None:
    [bar] = [bar for bar in document(**{name: value})["bars"] if bar["name"] == name]
    assert bar["holds"] is holds
