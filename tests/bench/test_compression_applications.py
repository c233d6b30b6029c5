"""What the bench says of compressed applications: ratios, bars, the table; nothing where there are no models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from trilevel.bench.compression_applications import NATIVE, TORCH, Application, applications_table, bars, measure


def application(metric: str = "accuracy", dense: float | None = 0.9) -> Application:
    qualities = [] if dense is None else [0.89, 0.9, 0.895]
    return Application(
        tokens=196,
        dense_bytes=1_000,
        artifact_bytes=[90, 100, 110],
        metric=metric,
        dense_quality=dense,
        qualities=qualities,
        ms={TORCH: 12.0, "onnxruntime": 3.0, "openvino": 2.0},
    )


def test_ratios_are_of_the_mean_of_the_seeds_and_of_the_fastest_runtime() -> None:
    own = application()
    assert own.size_ratio == pytest.approx(0.1)
    assert (own.fastest, own.speed) == ("openvino", 6.0)
    dense, *seeds = own.rows("images")
    assert (dense["accuracy"], dense["median_ms"]) == (0.9, 12.0)
    assert [row["bytes"] for row in seeds] == [90, 100, 110]
    assert [row.get("openvino_median_ms") for row in seeds] == [2.0, None, None]
    native = replace(own, ms={**own.ms, NATIVE: 1.5})
    assert (native.fastest, native.speed) == (NATIVE, 8.0)
    assert native.rows("images")[1]["onnxruntime_native_median_ms"] == 1.5


def test_bars() -> None:
    found = {bar.name: bar for bar in bars({"images": application(), "documents": application("rouge1")})}
    assert found["images_points_lost"].value == pytest.approx(0.5)
    assert found["documents_rouge1_vs_dense"].value == pytest.approx(0.895 / 0.9)
    assert found["size_ratio_images"].holds
    assert found["speed_documents_512"].holds


def test_what_was_not_measured_does_not_hold() -> None:
    assert not any(bar.holds for bar in bars({}))
    found = {bar.name: bar for bar in bars({"images": application(dense=None)})}
    assert found["images_points_lost"].value is None
    assert found["speed_images"].holds


def test_the_table_has_a_row_for_each_seed() -> None:
    console = Console(width=160, record=True)
    console.print(applications_table([*application().rows("images"), *application("rouge1").rows("documents")]))
    text = console.export_text()
    assert [text.count(f"seed {seed}") for seed in range(4)] == [2, 2, 2, 0]
    assert text.count("0.895") == 2


def test_no_models_no_rows(tmp_path: Path) -> None:
    (tmp_path / "images/dense").mkdir(parents=True)
    assert measure(tmp_path, 0.1, lambda _what: None) == {}
