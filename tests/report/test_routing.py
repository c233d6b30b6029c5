"""The picture of an artifact with paths: no name covers another, and ours is not the one that gives way."""

from __future__ import annotations

from typing import Any

from trilevel.report.plots import time_and_loss


def row(name: str, kind: str, ms: float, loss: float) -> dict[str, Any]:
    return {"name": name, "kind": kind, "ms": {"1": ms, "8": 0.0}, "loss": loss, "is_proved": True}


def test_names_give_way_to_those_that_matter_more() -> None:
    rows = [
        row("by length", "rival", 10.0, 0.01),
        row("fixed path", "fixed", 10.1, 0.01),
        row("ours", "dynamic", 10.0, 0.0101),
        row("far away", "rival", 90.0, 0.09),
    ]
    picture = time_and_loss(rows)
    assert [name for name in ("by length", "fixed path", "ours", "far away") if f">{name}<" in picture] == [
        "ours",
        "far away",
    ]
