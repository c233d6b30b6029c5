"""The ListOps case: two steps run, a finished variant is kept, the training order is a permutation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from trilevel.bench import listops as module
from trilevel.bench.listops import PUBLISHED, ListOpsCase, _Batches, _shuffled, run, variant_levels


def test_smoke_trains_every_variant_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ListOpsCase.smoke(tmp_path)
    first = run(case)
    ours = [row for row in first.rows if "published" not in row["variant"]]
    assert [row["variant"] for row in ours] == list(variant_levels())
    assert all(0 <= row["accuracy_percent"] <= 100 for row in ours)
    assert len(first.rows) == len(ours) + len(PUBLISHED)
    monkeypatch.setattr(module, "fit", None)
    assert run(case).rows == first.rows


def test_other_settings_do_not_take_a_kept_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = dataclasses.replace(ListOpsCase.smoke(tmp_path), variants=("local",))
    run(case)
    monkeypatch.setattr(module, "_train", lambda _case, name: {"variant": name, "accuracy_percent": -1})
    assert run(dataclasses.replace(case, test_samples=4)).rows[0]["accuracy_percent"] == -1


@pytest.mark.parametrize("total", [1, 7, 24])
def test_an_epoch_visits_every_sample_once(total: int) -> None:
    for epoch in range(3):
        assert sorted(_shuffled(epoch * total + place, total) for place in range(total)) == list(range(total))


def test_a_batch_is_a_function_of_its_number() -> None:
    batches = _Batches(ListOpsCase.smoke(Path("unused")))
    assert batches.batch(3)["input_ids"].equal(batches.batch(3)["input_ids"])
    assert batches.batch(3)["labels"].shape == (4,)
