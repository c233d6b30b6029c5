"""`trilevel bench compression`: a wrong encoder is never timed, peers run, bars from rows."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np
import pytest
import torch

from trilevel.bench import compression
from trilevel.bench.compression import CompressionCase, bars, compression_table, run
from trilevel.bench.compression_encoders import Encoders, contenders
from trilevel.bench.compression_memory import (
    DENSE_OPENVINO,
    DENSE_OURS,
    DENSE_TORCH,
    MATERIALISED,
    OURS_ONNXRUNTIME,
    OURS_OPENVINO,
    one_call,
)
from trilevel.bench.compression_peak import share_of_peak
from trilevel.bench.encoders_contenders import Models
from trilevel.bench.memory import peak_process_bytes
from trilevel.errors import ImplementationError

for package in ("onnx", "onnxruntime", "openvino"):
    pytest.importorskip(package, reason=f"{package} is not installed")


pytestmark = pytest.mark.usefixtures("minilm", "forgotten")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> CompressionCase:
    work = tmp_path_factory.mktemp("graphs")
    return dataclasses.replace(CompressionCase.smoke(), work=work, lengths=(137,))


def test_ours_agree_with_float_and_are_timed(case: CompressionCase) -> None:
    told: list[float] = []
    report = run(case, lambda _, done: told.append(done))
    assert report.broken == []
    assert report.bars == []
    assert [row["status"] for row in report.rows] == ["measured"] * 5
    assert all(row["median_ms"] > 0 and row["cosine"] > 0.98 for row in report.rows)
    assert report.rows[0]["times_faster_than_torch"] == 1
    assert told == sorted(told)
    assert told[-1] == 1
    assert compression_table(report).row_count == 5


def test_a_wrong_encoder_is_not_timed(case: CompressionCase, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(_encoders: Encoders, _tokens: int) -> Any:
        return lambda _ids: np.ones((1, 384), np.float32)

    def absent(_encoders: Encoders, _tokens: int) -> Any:
        raise ImplementationError("not on this processor")

    first, *others = contenders()
    changed = [first, *(dataclasses.replace(own, build=wrong) for own in others if own.name == OURS_OPENVINO)]
    changed.append(dataclasses.replace(first, name="trilevel absent", build=absent))
    monkeypatch.setattr(compression, "contenders", lambda: changed)
    report = run(case)
    assert report.broken == [OURS_OPENVINO]
    assert not report.holds
    rows = {row["contender"]: row for row in report.rows}
    assert "median_ms" not in rows[OURS_OPENVINO]
    assert "below 0.98" in rows[OURS_OPENVINO]["reason"]
    assert rows["trilevel absent"]["status"] == "skipped"


def test_the_share_is_of_integer_products(case: CompressionCase) -> None:
    assert case.work is not None
    encoders = Encoders(case.work, Models(folder=None, tokens=137), num_layers=1)
    found = share_of_peak(encoders, batch=2, tokens=61)
    assert found["share"] == pytest.approx(found["onednn_ms"] / found["linear_ms"])
    assert found["linear_ms"] <= found["profile_ms"].get("FullyConnected", 0) + sum(found["profile_ms"].values())
    assert found["onednn_tops"] > 0


def test_memory_is_of_a_process_that_loads_what_it_needs(case: CompressionCase) -> None:
    work = str(case.work)
    artifact = peak_process_bytes("trilevel.bench.compression_memory:one_call", OURS_ONNXRUNTIME, work, 61, 1)
    dense = peak_process_bytes("trilevel.bench.compression_memory:one_call", DENSE_TORCH, work, 61, 1)
    assert 30e6 < artifact < dense
    # torch is imported by this process, so only the code can be looked at
    assert one_call(OURS_OPENVINO, work, 61, 1)() is not None
    assert one_call(MATERIALISED, work, 61, 1)() is not None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peers are tried on Linux")
def test_peers_run(case: CompressionCase) -> None:
    report = run(dataclasses.replace(case, peers=True))
    wanted = {"measured", "skipped"} if not torch.ops.mkldnn._is_mkldnn_bf16_supported() else {"measured"}
    # one layer of MiniLM in others' 8 bits; what they lose is theirs
    assert {row["status"] for row in report.rows if "bfloat16" in row["contender"]} <= wanted
    assert {row["status"] for row in report.rows if "NNCF" in row["contender"]} == {"measured"}
    assert one_call(DENSE_OPENVINO, str(case.work), 61, 1)() is not None


def test_bars_come_from_the_rows() -> None:
    def row(name: str, tokens: int, ms: float, memory: int) -> dict[str, Any]:
        return {"contender": name, "tokens": tokens, "median_ms": ms, "peak_process_bytes": memory}

    rows = [
        row(DENSE_TORCH, 8_192, 600.0, 1_000),
        row(DENSE_OPENVINO, 8_192, 150.0, 900),
        row(OURS_OPENVINO, 8_192, 30.0, 300),
        row(OURS_ONNXRUNTIME, 8_192, 20.0, 400),
        row(OURS_OPENVINO, 512, 1.0, 1),
        {"contender": MATERIALISED, "tokens": 8_192, "peak_process_bytes": 10_000},
    ]
    found = {bar.name: bar for bar in bars(rows, {"int8_share_of_peak": {"share": 0.4}})}
    assert {name: bar.value for name, bar in found.items()} == {
        "speed_8k_vs_torch_fp32": 30.0,
        "speed_8k_vs_openvino_int8": 7.5,
        "memory_8k_vs_sdpa": 0.4,
        "memory_8k_vs_materialised": 0.04,
        "int8_share_of_peak": 0.4,
    }
    assert [name for name, bar in found.items() if not bar.holds] == ["speed_8k_vs_openvino_int8"]
    # NNCF's answers were wrong, so it was not timed
    rows[1:2] = [{"contender": DENSE_OPENVINO, "tokens": 8_192}, row(DENSE_OURS, 8_192, 400.0, 1)]
    found = {bar.name: bar for bar in bars(rows, {"int8_share_of_peak": {"share": 0.4}})}
    assert found["speed_8k_vs_openvino_int8"].value == 20.0
    assert bars([], {"int8_share_of_peak": {"share": 0.1}})[0].value is None
