"""The demo as a whole, on a small random model: figures, report, command, hostile text, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from tests.applications.documents.demo_model import document, save_small_model
from trilevel.applications.documents import compare
from trilevel.applications.documents import demo as module
from trilevel.applications.documents import measure as measuring
from trilevel.applications.documents.builtin import builtin_pieces
from trilevel.applications.documents.demo import Demo, run_demo
from trilevel.applications.documents.measure import Job, Measured
from trilevel.cli.main import app
from trilevel.data.documents import Document

FIGURES = {
    "words", "tokens", "sdpa_s", "trilevel_s", "speedup", "materialised_s", "materialised_peak_bytes",
    "sdpa_peak_bytes", "trilevel_peak_bytes", "empty_peak_bytes", "memory_tokens", "memory_ratio", "memory_vs_sdpa",
    "agreement_with_dense", "report", "bfloat16_s", "bfloat16_agreement", "int8_s", "int8_peak_bytes",
    "int8_loaded_bytes", "int8_runtime", "int8_agreement",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure without starting processes: the same passes, the same answers, seconds sooner."""

    def run(job: Job, *, on_pass: Callable[[], None]) -> Measured:
        *passes, last = measuring._run(job)
        on_pass()
        return Measured(
            attention=job.attention,
            tokens=passes[0]["tokens"],
            seconds=tuple(last["seconds"]),
            peak_memory_bytes=last["peak_memory_bytes"],
            loaded_bytes=passes[0]["memory_bytes"],
            scores=np.array(last["scores"]) if last["scores"] else None,
        )

    monkeypatch.setattr(compare, "measure", run)
    monkeypatch.setattr(measuring, "MIN_RUNS", 1)
    monkeypatch.setattr(measuring, "ENOUGH_S", 0.0)


@pytest.fixture
def found(model: Path, tmp_path: Path, in_this_process: None) -> Demo:
    given = document(24, abstract="Attention reads a window of tokens and a summary of each region.")
    return run_demo(given, out_dir=tmp_path, num_sentences=4, model=model)


def test_every_figure_is_there_and_json(found: Demo) -> None:
    assert set(found.figures) >= FIGURES
    figures = json.loads(json.dumps(found.figures, allow_nan=False))
    assert figures["tokens"] == figures["memory_tokens"]
    assert figures["speedup"] == pytest.approx(figures["sdpa_s"] / figures["trilevel_s"])
    assert 0 <= figures["agreement_with_dense"] <= 1
    assert -1 <= figures["rank_correlation_with_dense"] <= 1
    assert figures["words"] == sum(len(line.strip("# ").split()) for line in document(24).text.split("\n"))
    assert 0 < figures["rouge"]["rouge1"] <= 100


def test_the_report_shows_the_summary_and_the_table(found: Demo) -> None:
    page = Path(found.figures["report"]).read_text(encoding="utf-8")
    assert len(found.sentences) == 4
    assert page.count("<mark id=") == 4
    for label in ("trilevel, focus", "dense, SDPA", "dense, materialised", "Sentences, layer 1"):
        assert label in page
    assert "global in layer" in page


def test_what_is_left_out_is_said(found: Demo) -> None:
    assert found.figures["int8_s"] is None
    assert "INT8 is left out: the artifact holds the shipped model." in found.notes
    has_bfloat16 = found.figures["bfloat16_s"] is not None
    assert has_bfloat16 != any("no bfloat16 arithmetic" in note for note in found.notes)


def test_other_precisions_beside_float32(
    model: Path, tmp_path: Path, in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "has_fast_products", lambda _dtype: True)
    found = run_demo(document(24), out_dir=tmp_path, num_sentences=4, model=model)
    rows = {row.name: row for row in found.contenders}
    assert rows["bfloat16"].seconds == found.figures["bfloat16_s"]
    assert rows["bfloat16"].note.endswith("sentences")


@pytest.mark.skipif(not module.has_runtime(), reason="needs ONNX Runtime or OpenVINO")
def test_int8_chooses_the_sentences_of_the_shipped_model(tmp_path: Path, in_this_process: None) -> None:
    found = run_demo(builtin_pieces()[0], out_dir=tmp_path, num_sentences=4)
    (row,) = (row for row in found.contenders if row.name == "int8")
    assert row.label == f"trilevel, INT8 in {found.figures['int8_runtime']}"
    assert row.seconds == found.figures["int8_s"]
    assert found.figures["int8_agreement"] >= 0.6


def test_without_a_runtime_it_is_said_what_to_install(
    tmp_path: Path, in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "installed", lambda: ["torch"])
    found = run_demo(builtin_pieces()[0], out_dir=tmp_path, num_sentences=4)
    assert any("pip install 'trilevel[onnxruntime]'" in note for note in found.notes)


def test_when_memory_is_short_both_run_shorter(model: Path, tmp_path: Path, in_this_process: None) -> None:
    found = run_demo(document(), out_dir=tmp_path, num_sentences=2, model=model, memory_bytes=2 * 2**20)
    assert found.figures["memory_tokens"] <= 256 < found.figures["tokens"]
    assert found.contenders[-1].label == "trilevel, same length"
    assert found.contenders[-1].tokens == found.figures["memory_tokens"]
    assert any("first 2" in note for note in found.notes)


def test_markup_in_a_document_stays_text(model: Path, tmp_path: Path, in_this_process: None) -> None:
    bad = "<script>alert(document.cookie)</script><img src=x onerror=alert(1)> breaks out of the page. "
    given = Document(id="bad", title=bad, text=f"# {bad}\n" + bad * 5, source=bad, abstract=bad)
    found = run_demo(given, out_dir=tmp_path, num_sentences=2, model=model)
    page = Path(found.figures["report"]).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("text", ["word", "多级注意力让模型读得更快。", "x" * 3000])
def test_very_short_documents_work(text: str, model: Path, tmp_path: Path, in_this_process: None) -> None:
    found = run_demo(Document(id="x", title="", text=text), out_dir=tmp_path, model=model)
    assert found.sentences
    assert found.figures["agreement_with_dense"] == 1.0


def test_the_command_prints_summary_table_and_json_last(model: Path, tmp_path: Path, in_this_process: None) -> None:
    path = tmp_path / "given.md"
    path.write_text(f"# Of [bold]attention[/bold]\n\n{document(24).text}\n", encoding="utf-8")
    result = CliRunner().invoke(
        app, ["demo", "--doc", str(path), "--out", str(tmp_path / "o"), "--model", str(model), "--sentences", "3"]
    )
    assert result.exit_code == 0, result.output
    lines = result.stdout.strip().split("\n")
    assert set(json.loads(lines[-1])) >= FIGURES
    assert "dense, materialised" in result.stdout
    assert (tmp_path / "o" / "report.html").exists()


def test_with_json_the_line_stands_alone(model: Path, tmp_path: Path, in_this_process: None) -> None:
    path = tmp_path / "given.txt"
    path.write_text(document(24).text, encoding="utf-8")
    arguments = ["demo", "--doc", str(path), "--out", str(tmp_path), "--model", str(model), "--json"]
    assert set(json.loads(CliRunner().invoke(app, arguments).stdout)) >= FIGURES


def test_bad_input_ends_with_exit_code_2(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    for arguments in (
        ["--doc", str(tmp_path / "empty.txt"), "--model", str(model)],
        ["--doc", str(tmp_path), "--model", str(model)],
        ["--model", str(tmp_path / "nowhere")],
    ):
        result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out"), *arguments])
        assert result.exit_code == 2, arguments
        assert result.stderr.rstrip().split("\n")[-1].startswith("error: "), result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_with_processes_of_their_own(model: Path, tmp_path: Path) -> None:
    found = run_demo(document(150), out_dir=tmp_path, model=model)
    assert found.figures["memory_ratio"] < 1
    assert all(row.seconds and row.peak_memory_bytes for row in found.contenders)


@pytest.mark.slow
def test_ctrl_c_ends_the_command_and_its_processes(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "given.txt"
    path.write_text(document(500).text, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "trilevel",
        "demo",
        "--doc",
        str(path),
        "--out",
        str(tmp_path),
        "--model",
        str(model),
    ]
    # a group of its own, so that the signal reaches the command and its children as a terminal's does
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (children := _children(process.pid)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert children
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert b"interrupted" in errors
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert not (tmp_path / "report.html").exists()


def _children(process: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(process).children()]
    except psutil.NoSuchProcess:
        return []
