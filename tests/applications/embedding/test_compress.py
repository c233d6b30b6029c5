"""Text encoders compressed: a folder that `trilevel convert` could have written, with integers in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.applications.classification.tiny import FILLER, make_source, write_encoder
from trilevel.applications.embedding.compress import DataConfig, EmbeddingTask, load_task
from trilevel.applications.kinds import kind_of
from trilevel.compression.compress import compress
from trilevel.compression.distill import DistillConfig
from trilevel.compression.layers import FrozenEmbedding
from trilevel.compression.plan import CompressionPlan, Recovery, Stage
from trilevel.compression.prune import PruneConfig
from trilevel.compression.quantize import QuantizeConfig
from trilevel.conversion.embedder import Embedder
from trilevel.conversion.load import load_encoder
from trilevel.errors import CheckpointError, ConfigError, InputError

WORDS = " ".join(FILLER[(7 * place) % len(FILLER)] for place in range(900))
PLAN = CompressionPlan(
    stages=(
        Stage(name="prune", config=PruneConfig(keep_heads=0.8, keep_ffn=0.6, multiple=1), recovery=Recovery(steps=3)),
        Stage(name="quantize", config=QuantizeConfig(), recovery=Recovery(steps=2)),
    ),
    losses=DistillConfig(),
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS)
    return path


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return write_encoder(tmp_path / "encoder")


def test_the_result_is_a_folder_of_convert(encoder: Path, text: Path, tmp_path: Path) -> None:
    task = load_task(encoder, data=text, options={"max_tokens": 11})
    assert task.evaluate(task.model)["cosine"] == pytest.approx(1.0)
    made = compress(task, PLAN, tmp_path / "small", show_progress=False)
    assert kind_of(tmp_path / "small") == "embedding"
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "report.json", "stages", "compression.json"} <= names
    assert not any(name.startswith(".") for name in names)
    source = load_encoder(tmp_path / "small")
    assert any(isinstance(part, FrozenEmbedding) for part in source.encoder.modules())
    batch = task.single()
    with torch.inference_mode():
        assert torch.equal(source.encoder(**batch), made.model(**batch))
    assert json.loads((tmp_path / "small" / "report.json").read_text()) == made.report
    assert Embedder.load(tmp_path / "small").embed(["w1 w2"]).shape == (1, 30)
    with pytest.raises(ConfigError, match="is quantized already"):
        compress(load_task(tmp_path / "small", data=text), PLAN, tmp_path / "twice")
    # a second time everything is there already
    again = compress(task, PLAN, tmp_path / "small", show_progress=False)
    assert again.report == made.report


def test_a_damaged_result_is_refused(encoder: Path, text: Path, tmp_path: Path) -> None:
    plan = CompressionPlan(stages=(Stage(name="quantize", config=QuantizeConfig()),))
    compress(load_task(encoder, data=text), plan, tmp_path / "small", show_progress=False)
    weights = tmp_path / "small" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\7")
    with pytest.raises(CheckpointError, match="was changed or damaged"):
        load_encoder(tmp_path / "small")


def test_calibration_holds_short_texts_too(encoder: Path) -> None:
    task = EmbeddingTask(make_source(), [WORDS], DataConfig(max_tokens=19))
    lengths = [batch["input_ids"].shape[1] for batch in task.calibration]
    assert max(lengths) == 19
    assert min(lengths) == 8
    for batch in task.calibration:
        assert batch["input_ids"][0, [0, -1]].tolist() == [2, 3]
    held = {tuple(piece.tolist()) for piece in task.valid}
    assert task.steps_of(2) == 2 * len(task.train) // 8
    assert held


def test_importance_is_a_function_of_the_batch() -> None:
    task = EmbeddingTask(make_source(), [WORDS], DataConfig())
    batch: Any = task.calibration[0]
    assert torch.equal(task.importance(task.model, batch), task.importance(task.model, batch))


def test_teachers(encoder: Path, tmp_path: Path) -> None:
    task = EmbeddingTask(make_source(), [WORDS], DataConfig())
    dense = write_encoder(tmp_path / "dense", levels=None)
    teacher, sha256 = task.load_teacher(dense)
    task.check_teacher(teacher)
    assert sha256 != task.source_sha256
    with pytest.raises(ConfigError, match="the teacher has"):
        task.check_teacher(task.load_teacher(write_encoder(tmp_path / "wide", dim=20))[0])


def test_refused(encoder: Path, text: Path) -> None:
    text.write_text("w1 w2 w3")
    with pytest.raises(InputError, match=r"too few|needed"):
        load_task(encoder, data=text)
    with pytest.raises(ConfigError, match="max_tokens=3"):
        load_task(encoder, data=text, options={"max_tokens": 3})
