"""Document models compressed: with abstracts and without, a run that summarises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.applications.documents.conftest import ABSTRACT, TEXT
from trilevel.applications.documents.checkpoint import MINILM, load_run, save_run
from trilevel.applications.documents.compress import DocumentTask, load_task
from trilevel.applications.documents.model import DocumentModel
from trilevel.applications.documents.summarize import summarize
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.applications.kinds import kind_of
from trilevel.compression.compress import compress
from trilevel.compression.distill import DistillConfig
from trilevel.compression.plan import CompressionPlan, Recovery, Stage
from trilevel.compression.prune import PruneConfig
from trilevel.compression.quantize import QuantizeConfig
from trilevel.data.documents import Document
from trilevel.errors import ConfigError, InputError

PLAN = CompressionPlan(
    stages=(
        Stage(name="prune", config=PruneConfig(keep_heads=1.0, keep_ffn=0.5), recovery=Recovery(steps=2)),
        Stage(name="quantize", config=QuantizeConfig()),
    ),
    losses=DistillConfig(head_weight=0.5),
)


@pytest.fixture
def run(model: DocumentModel, tokenizer: DocumentTokenizer, tmp_path: Path) -> Path:
    save_run(tmp_path / "run", model, tokenizer)
    return tmp_path / "run"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"id": str(place), "title": f"No {place}", "text": TEXT, "abstract": ABSTRACT, "split": split}
        for place, split in enumerate(("train", "train", "train", "valid", "valid"))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_with_abstracts(run: Path, data: Path, tmp_path: Path, document: Document) -> None:
    pytest.importorskip("rouge_score", reason="rouge-score comes with the extra 'documents'")
    task = load_task(run, data=data)
    assert (task.metric, task.has_labels) == ("rouge1", True)
    source = task.evaluate(task.model)
    assert source["agreement"] == 1.0
    assert 0 < source["rouge1"] < 1
    made = compress(task, PLAN, tmp_path / "small", show_progress=False)
    assert kind_of(tmp_path / "small") == "documents"
    header = (tmp_path / "small/stages/1-prune/log.csv").read_text().splitlines()[0].split(",")
    assert {"oracle", "focus", "divergence", "hidden", "heads"} <= set(header)
    small, tokenizer = load_run(tmp_path / "small")
    assert small.config.tokens.ffn_dim != task.model.config.tokens.ffn_dim  # type: ignore[union-attr]
    with torch.inference_mode():
        assert torch.equal(small(task.single()), made.model(task.single()))
    assert summarize(small, tokenizer, document, num_sentences=2).sentences


def test_without_labels_the_built_in_text_will_do(run: Path, tmp_path: Path) -> None:
    task = load_task(run, limit=3)
    assert (task.metric, task.has_labels) == ("agreement", False)
    ids = [case.document.id for case in task.valid]
    assert len(ids) == len(set(ids)) == 3
    batches = [task.batches.batch(step)["input_ids"] for step in (0, 1, 0)]
    assert torch.equal(batches[0], batches[2])
    made = compress(task, PLAN, tmp_path / "small", show_progress=False)
    assert 0 <= made.report["quality"] <= 1
    assert made.report["source"]["quality"] == 1.0
    alone = CompressionPlan(stages=PLAN.stages)
    with pytest.raises(ConfigError, match=r"no labels, and the plan trains without \[distill\]"):
        compress(task, alone, tmp_path / "other")


def test_importance_is_a_function_of_the_batch(run: Path) -> None:
    task: DocumentTask = load_task(run, limit=1)
    batch = task.calibration[0]
    first, second = task.importance(task.model, batch), task.importance(task.model, batch)
    assert torch.equal(first, second)
    assert first.requires_grad


def test_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stands on a pretrained encoder"):
        load_task(MINILM)
    path = tmp_path / "bare.jsonl"
    rows = [{"id": "a", "title": "", "text": TEXT, "abstract": "", "split": split} for split in ("train", "valid")]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(InputError, match="every document needs an abstract"):
        load_task(run, data=path)
    with pytest.raises(ConfigError, match="unknown key"):
        load_task(run, options={"batch_size": 3})
