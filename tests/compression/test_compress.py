"""Compression from end to end on a tiny image classifier: stages, resuming, refusals, what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compression.tasks import FULL, ROUNDED, compressed, image_task, interrupt_at, plan_of, tiny_run
from trilevel.applications.images.checkpoint import load_run
from trilevel.applications.images.compress import ImageTask
from trilevel.attention.layer import MultiLevelAttention
from trilevel.compression import stages
from trilevel.compression.compress import compress
from trilevel.compression.layers import FrozenLinear
from trilevel.errors import CheckpointError, ConfigError, QualityError, TrilevelError
from trilevel.model.folder import find_folder
from trilevel.training.interrupt import TrainingInterrupted


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return tiny_run(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(run: Path) -> Path:
    """The full plan in one go."""
    compressed(run, run.parent / "whole")
    return run.parent / "whole"


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_run(folder).model.state_dict()


def same(one: Path, other: Path) -> bool:
    ours, theirs = tensors(one), tensors(other)
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def report_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return values


# definition


def test_every_stage_is_a_run_with_its_report_and_log(run: Path, whole: Path) -> None:
    report = report_of(whole)
    assert [stage["stage"] for stage in report["stages"]] == ["prune", "distill", "quantize"]
    names = sorted(path.name for path in (whole / "stages").iterdir())
    assert names == ["1-prune", "2-distill", "3-quantize", "source.json"]
    for number, stage in enumerate(report["stages"], 1):
        folder = whole / "stages" / f"{number}-{stage['stage']}"
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint", "log.csv", "report.json"]
        assert report_of(folder) == stage
        assert stage["latency_ms"] > 0
        assert 0 <= stage["quality_untrained"] <= 1
    before = [report["source"]["quality"], *(stage["quality"] for stage in report["stages"])]
    assert [stage["quality_before"] for stage in report["stages"]] == before[:-1]
    assert report["loss"] == pytest.approx(before[0] - before[-1])
    assert report["source"]["metrics"]["accuracy"] == report["source"]["quality"] > 0.7


def test_sizes_are_those_of_the_files(run: Path, whole: Path) -> None:
    report = report_of(whole)
    source = report["source"]
    prune, distill, quantize = report["stages"]
    for row, folder in ((source, run), (prune, whole / "stages" / "1-prune"), (quantize, whole)):
        checkpoint = find_folder(folder / "checkpoint")
        assert checkpoint is not None
        size = (checkpoint / "model.safetensors").stat().st_size
        assert row["bytes"] < size < row["bytes"] + 20_000  # and its header
    assert quantize["bytes"] < prune["bytes"] == distill["bytes"] < source["bytes"]
    assert quantize["parameters"] == prune["parameters"] < source["parameters"]


def test_the_result_is_quantized_pruned_and_keeps_the_ratio(run: Path, whole: Path) -> None:
    model = load_run(whole).model
    assert sum(isinstance(part, FrozenLinear) for part in model.modules()) == 9  # four maps a block and the head
    old = load_run(run).model.config.encoder
    assert model.config.encoder.ffn_dim != old.ffn_dim
    for layer in (part for part in model.modules() if isinstance(part, MultiLevelAttention)):
        assert layer.num_heads <= old.num_heads  # type: ignore[operator]
        assert min(layer.head_split[:3]) >= 1  # one head of each class stays
    assert load_run(whole).origin == load_run(run).origin


def test_the_round_trip_is_bit_for_bit(run: Path, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ROUNDED)
    task = image_task(run, plan)
    kept: list[nn.Module] = []

    class Kept(ImageTask):
        def save(self, folder: Path, model: nn.Module, report: Any) -> None:
            kept.append(model)
            super().save(folder, model, report)

    task.__class__ = Kept
    made = compress(task, plan, tmp_path / "out", show_progress=False)
    pixels = task.calibration[0]["pixels"]
    with torch.inference_mode():
        wanted = kept[0](pixels)
        for model in (made.model, load_run(tmp_path / "out").model, load_run(tmp_path / "out/stages/1-quantize").model):
            assert torch.equal(model(pixels), wanted)
    assert not torch.equal(load_run(run).model(pixels), wanted)


def test_training_learns_from_the_teacher_and_labels(run: Path, whole: Path, tmp_path: Path) -> None:
    header = (whole / "stages" / "3-quantize" / "log.csv").read_text().splitlines()[0]
    assert {"divergence", "hidden", "accuracy", "loss"} <= set(header.split(","))
    compressed(run, tmp_path / "labels", "[quantize]\n[quantize.train]\nsteps = 1\n")
    header = (tmp_path / "labels/stages/1-quantize/log.csv").read_text().splitlines()[0]
    assert not {"divergence", "hidden"} & set(header.split(","))


def test_another_teacher_teaches(run: Path, whole: Path, tmp_path: Path) -> None:
    compressed(run, tmp_path / "out", teacher=whole / "stages" / "2-distill")
    assert not same(tmp_path / "out", whole)
    with pytest.raises(ConfigError, match="no table \\[distill\\]"):
        compressed(run, tmp_path / "none", ROUNDED, teacher=run)


# the scan


def test_the_scan_leaves_layers_float(run: Path, tmp_path: Path) -> None:
    text = "[quantize]\nskip_budget = 0.0\nmax_skips = 2\nscan_examples = 17\n"

    class Sharp(ImageTask):
        """Quality that says of itself which layer is which: worse the more is rounded."""

        def evaluate(self, model: nn.Module, *, limit: int | None = None) -> dict[str, float]:
            found = super().evaluate(model, limit=limit)
            with torch.inference_mode():
                logits = model(self.calibration[0]["pixels"])
                wanted = self.model(self.calibration[0]["pixels"])
            return found | {"accuracy": 1 - float((logits - wanted).square().sum())}

    plan = plan_of(tmp_path, text)
    task = image_task(run, plan)
    task.__class__ = Sharp
    made = compress(task, plan, tmp_path / "out", show_progress=False)
    details = made.report["stages"][0]["details"]
    assert len(details["scan"]) == 10
    assert details["skip"] == [row["name"] for row in details["scan"][:2]]
    assert details["modules"] == 8
    assert not (tmp_path / "out/stages/1-quantize/scan.json").exists()


# resuming


@pytest.mark.parametrize("number", [4, 7, 9, 14])
def test_stopped_anywhere_it_ends_with_the_same_bits(
    number: int, run: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        interrupt_at(patched, number)
        if number == 7:  # the last step of a stage is done all the same
            compressed(run, out)
        else:
            with pytest.raises(TrainingInterrupted, match="Run the same command again"):
                compressed(run, out)
            assert not (out / "report.json").exists()
    compressed(run, out)
    assert same(out, whole)
    logs = [(folder / "stages/1-prune/log.csv").read_text().split("\n")[-2].split(",")[:3] for folder in (out, whole)]
    assert logs[0] == logs[1]


def test_stopped_outside_of_training_it_says_what_is_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_given: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stages, "quantize", stop)
        with pytest.raises(KeyboardInterrupt, match=r"finished stages are kept in .*stages\. Run the same"):
            compressed(run, tmp_path / "out", ROUNDED)
    compressed(run, tmp_path / "out", ROUNDED)


@pytest.mark.parametrize("is_there", [False, True])
def test_finished_stages_are_not_done_again(
    is_there: bool, run: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "report.json").unlink()
    if is_there:  # of another compression
        report = report_of(out / "stages/3-quantize") | {"key": report_of(out / "stages/2-distill")["key"]}
        (out / "stages/3-quantize/report.json").write_text(json.dumps(report))
    else:
        shutil.rmtree(out / "stages/3-quantize")
    done: list[str] = []
    run_stage = stages.run_stage

    def watched(course: Any, stage: Any, *given: Any) -> None:
        done.append(stage.name)
        run_stage(course, stage, *given)

    monkeypatch.setattr("trilevel.compression.compress.run_stage", watched)
    compressed(run, out)
    assert done == ["quantize"]
    assert same(out, whole)


def test_another_plan_in_the_same_folder_is_refused(run: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"plan.prune.config.keep_ffn was 0.5 and is 0.25"):
        compressed(run, whole, FULL.replace("keep_ffn = 0.5", "keep_ffn = 0.25"))
    with pytest.raises(ConfigError, match=r"seed was 0 and is 3"):
        compressed(run, whole, seed=3)
    plan = plan_of(tmp_path)
    with pytest.raises(ConfigError, match=r"data was .* and is "):
        compress(image_task(run, plan, limit=31), plan, whole)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="holds no compression of this plan"):
        compress(image_task(run, plan), plan, tmp_path / "other")


# refusals


def test_too_much_loss_writes_no_result_and_keeps_the_stages(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(self: ImageTask, model: nn.Module, *, limit: int | None = None) -> dict[str, float]:
        return {"accuracy": 0.91 if model is self.model else 0.88, "examples": 1}

    monkeypatch.setattr(ImageTask, "evaluate", evaluate)
    out = tmp_path / "out"
    with pytest.raises(QualityError, match=r"accuracy fell by 0.0300 \(0.9100 to 0.8800\) .* its stages are kept"):
        compressed(run, out, ROUNDED, max_loss=0.02)
    assert not (out / "checkpoint").exists()
    assert not (out / "report.json").exists()
    stage = (out / "stages/1-quantize/report.json").stat().st_mtime_ns
    # allowed more, nothing is done again
    assert compressed(run, out, ROUNDED, max_loss=0.04).report["max_loss"] == 0.04
    assert (out / "stages/1-quantize/report.json").stat().st_mtime_ns == stage
    with pytest.raises(ConfigError, match="max_loss=-1"):
        compressed(run, out, ROUNDED, max_loss=-1)


def test_what_is_quantized_is_not_compressed_again(whole: Path, tmp_path: Path) -> None:
    for text in (ROUNDED, "[prune]\n"):
        with pytest.raises(ConfigError, match="is quantized already"):
            compressed(whole, tmp_path / "out", text)


def test_a_name_that_skip_has_wrong_is_refused_first(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"skip names 'head\.nothing'"):
        compressed(run, tmp_path / "out", FULL.replace("[quantize]\n", "[quantize]\nskip = ['head.nothing']\n"))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_and_harms_nothing(
    run: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for place in ("trilevel.model.checkpoint.write_tensors", "trilevel.applications.images.compress.write_json"):
        with monkeypatch.context() as patched:

            def full(*_given: Any) -> None:
                raise OSError(28, "No space left on device")

            patched.setattr(place, full)
            with pytest.raises(CheckpointError, match="No space left on device"):
                compressed(run, out, FULL)
    compressed(run, out)
    assert same(out, whole)


def test_a_damaged_stage_is_an_error(run: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    weights = out / "stages/2-distill/checkpoint/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\7")
    with pytest.raises(CheckpointError, match="was changed or damaged"):
        compressed(run, out)


def test_quality_that_is_no_number_is_an_error(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ImageTask.evaluate
    calls: list[int] = []

    def evaluate(self: ImageTask, model: nn.Module, *, limit: int | None = None) -> dict[str, float]:
        calls.append(1)
        return first(self, model, limit=limit) | ({"accuracy": float("nan")} if len(calls) > 1 else {})

    monkeypatch.setattr(ImageTask, "evaluate", evaluate)
    with pytest.raises(TrilevelError, match="accuracy is nan after quantize"):
        compressed(run, tmp_path / "out", ROUNDED)
