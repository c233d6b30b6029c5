"""What was measured on IMDB as a result file with its bar."""

from __future__ import annotations

from typing import Any

import pytest

from scripts import imdb_result

RUN: dict[str, Any] = {
    "accuracy": 0.9,
    "accuracy_interval": [0.89, 0.91],
    "log_loss": 0.25,
    "rows": 1_000,
    "max_tokens": 512,
}


def document(points: float) -> dict[str, Any]:
    difference = {"points": points, "points_interval": [points - 1, points + 1]}
    other = {**RUN, "run": "/somewhere/dense", "accuracy": 0.88, "difference": difference}
    found = {
        **RUN,
        "run": "/somewhere",
        "data": "/somewhere/imdb",
        "steps": 7,
        "split": "test",
        "machine": {"cpu": "C"},
    }
    return imdb_result.result({**found, "compare": other})


@pytest.mark.parametrize(("points", "holds"), [(0.5, True), (-0.5, True), (-0.51, False)])
def test_the_bar(points: float, holds: bool) -> None:
    (bar,) = document(points)["bars"]
    assert bar == {"name": "imdb_points_vs_dense", "value": points, "op": ">=", "bar": -0.5, "holds": holds}


def test_ours_stand_before_what_others_published_and_no_path_is_kept() -> None:
    rows = document(0.0)["rows"]
    assert [row["accuracy"] for row in rows] == [0.9, 0.88, 0.9346, 0.9282]
    assert "somewhere" not in str(document(0.0))
