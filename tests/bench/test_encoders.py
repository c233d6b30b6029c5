"""`trilevel bench encoders`: what is compared computes what it says, a wrong encoder is never timed, bars from rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from trilevel.bench import encoders
from trilevel.bench.encoders import EncodersCase, bars, document_ids, encoders_table, one_pass, run
from trilevel.bench.encoders_contenders import Models, contenders, converted_source
from trilevel.cli.bench import app
from trilevel.conversion.converted import save_converted
from trilevel.errors import InputError

pytest.importorskip(
    "transformers", reason="transformers, which most encoders come from, is not installed (extra bench)"
)


pytestmark = pytest.mark.usefixtures("minilm", "forgotten")


TINY = dataclasses.replace(EncodersCase.smoke(), tokens=137, checked_tokens=61, precisions=("float32",))


def row(contender: str, precision: str = "float32", **more: Any) -> dict[str, Any]:
    return {"contender": contender, "precision": precision, **more}


def test_every_encoder_passes_its_check_and_is_timed() -> None:
    told: list[float] = []
    report = run(TINY, lambda _, done: told.append(done))
    assert report.broken == []
    assert {own["status"] for own in report.measurements} == {"measured"}
    assert [own["contender"] for own in report.measurements] == [contender.name for contender in contenders()]
    checked = {own["contender"]: own["checked_tokens"] for own in report.measurements if "error" in own}
    assert checked["trilevel converted"] == 137
    assert checked["trilevel dense"] == 61
    assert {own["contender"] for own in report.measurements} - set(checked) == {"HF Longformer", "HF ModernBERT"}
    dense = [own for own in report.measurements if own["kind"] == "dense"]
    # the fastest is as fast as itself, and no other is faster
    assert max(own["fastest_dense_over_this"] for own in dense) == 1.0
    ours = report.measurements[0]
    assert ours["fastest_dense_over_this"] == min(own["median_ms"] for own in dense) / ours["median_ms"]
    assert report.bars == []
    assert told == sorted(told)
    assert encoders_table(report).row_count == len(report.measurements)
    assert [own["encoder"] for own in report.rows] == [own["contender"] for own in report.measurements]
    assert [own["ms"] for own in report.rows] == [own["median_ms"] for own in report.measurements]


def test_an_encoder_that_computes_something_else_is_broken_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = contenders()[0]

    def wrong(models: Models, dtype: torch.dtype) -> Any:
        encode = ours.build(models, dtype)
        return lambda ids: 1.001 * encode(ids)

    monkeypatch.setattr(encoders, "contenders", lambda: [dataclasses.replace(ours, build=wrong)])
    report = run(TINY)
    assert report.broken == ["trilevel converted"]
    assert "median_ms" not in report.measurements[0]
    assert not report.holds


def test_what_would_take_too_much_memory_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = next(contender for contender in contenders() if contender.name == "transformers eager")
    monkeypatch.setattr(encoders, "contenders", lambda: [eager])
    report = run(dataclasses.replace(TINY, most_bytes=10**6))
    assert report.measurements[0]["status"] == "skipped"
    assert "GiB" in report.measurements[0]["reason"]
    # 12 heads of 8,192 x 8,192 in float32, twice over and their softmax
    assert eager.peak_bytes(8_192, 4) == 12 * 8_192**2 * 12


def test_the_document_goes_round(monkeypatch: pytest.MonkeyPatch) -> None:
    models = Models(folder=None, tokens=11)
    text = type("Document", (), {"text": "one two three"})()
    monkeypatch.setattr(encoders, "builtin_document", lambda: text)
    ids = document_ids(models, 11)[0].tolist()
    assert ids[:5] == [101, 2028, 2048, 2093, 102]
    assert ids == (ids[:5] * 3)[:11]


def test_bars_take_the_fastest_dense_and_the_smaller_sdpa() -> None:
    rows = [
        row("trilevel converted", fastest_dense_over_this=7.0, peak_memory_bytes=210),
        row("trilevel converted", "bfloat16", fastest_dense_over_this=5.0),
        row("trilevel dense", peak_memory_bytes=200),
        row("transformers sdpa", peak_memory_bytes=250),
        row("transformers eager", peak_memory_bytes=2_000),
    ]
    found = {bar.name: (bar.value, bar.holds) for bar in bars(rows)}
    assert found == {
        "encode_8k_fp32_vs_dense": (7.0, True),
        "encode_8k_bf16_vs_dense": (5.0, False),
        "encode_8k_memory_ratio": (0.105, True),
        "encode_8k_memory_vs_sdpa": (1.05, True),
    }
    assert [bar.value for bar in bars([])] == [None] * 4


def test_one_pass_for_the_process_that_measures_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(encoders, "return_freed", lambda *, at_once: asked.append(at_once))
    one_pass("trilevel converted", None, 97, torch.get_num_threads())()
    assert asked == [True]


def test_a_converted_folder_is_taken_and_others_are_refused(tmp_path: Path) -> None:
    models = Models(folder=None, tokens=97)
    encoder = models.converted()
    folder = save_converted(tmp_path / "converted", models.dense, encoder, {})
    own = Models(folder=str(folder), tokens=97)
    ids = document_ids(models, 97)
    with torch.no_grad():
        outputs: list[Tensor] = [made.eval()(ids) for made in (encoder, own.converted())]
    assert torch.equal(*outputs)
    with pytest.raises(InputError, match=r"is no converted MiniLM .*levels absent.*trilevel convert sentence-"):
        converted_source(str(models.dense.folder))


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[EncodersCase] = []

    def fake(case: EncodersCase, _: Any) -> Any:
        given.append(case)
        return dataclasses.replace(run(dataclasses.replace(TINY, most_bytes=1)))

    monkeypatch.setattr(encoders, "run", fake)
    result = CliRunner().invoke(app, ["encoders", "--smoke", "--json", "--encoder", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["case"] == "encoders"
    CliRunner().invoke(app, ["encoders"])
    assert [(case.folder, case.tokens) for case in given] == [(str(tmp_path), 600), (None, 8_192)]
