"""The generated tasks: answers follow from the tokens alone, and not from those near the question."""

from __future__ import annotations

import pytest
import torch

from trilevel.data.synthetic import MajorityTask, RecallTask
from trilevel.errors import ConfigError


def test_recall_answer_is_the_value_of_the_asked_key() -> None:
    task = RecallTask(num_tokens=44, num_regions=4, num_keys=7, num_values=5, num_noise=3, guard=6)
    batch = task.batch(13, seed=2, step=1)
    first_pair, first_question = 4, 4 + 7 * 5
    for row, label in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        asked = row[-1] - first_question
        found = [token - first_pair for token in row if first_pair <= token < first_question]
        pairs = {token // 5: token % 5 for token in found}
        assert len(pairs) == 4
        assert pairs[asked] == label[0]
        assert all(token < first_pair for token in row[-7:-1])
        for start in range(0, 44, 11):
            assert sum(first_pair <= token < first_question for token in row[start : start + 11]) == 1
    assert batch.positions.tolist() == [[43]] * 13
    assert int(batch.input_ids.min()) > 0
    assert int(batch.input_ids.max()) < task.vocab_size


def test_majority_answer_is_the_most_frequent_symbol_of_the_region() -> None:
    task = MajorityTask(num_tokens=57, num_regions=3, num_symbols=5, lead=7)
    batch = task.batch(11, seed=0, step=4)
    for row, labels in zip(batch.input_ids, batch.labels, strict=True):
        for region, label in zip(row.reshape(3, 19), labels, strict=True):
            assert region[0] == 1
            counts = torch.bincount(region[1:] - 2, minlength=5)
            assert counts.argmax() == label
            assert (counts == counts.max()).sum() == 1
    assert batch.positions[0].tolist() == [0, 19, 38]


@pytest.mark.parametrize("task", [RecallTask(), MajorityTask()])
def test_batches_are_a_function_of_seed_and_step(task: RecallTask | MajorityTask) -> None:
    first = task.batch(3, seed=1, step=2)
    assert torch.equal(first.input_ids, task.batch(3, seed=1, step=2).input_ids)
    assert not torch.equal(first.input_ids, task.batch(3, seed=1, step=3).input_ids)
    assert not torch.equal(first.input_ids, task.batch(3, seed=2, step=2).input_ids)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of num_regions"):
        RecallTask(num_tokens=63)
    with pytest.raises(ConfigError, match="guard"):
        RecallTask(guard=15)
    with pytest.raises(ConfigError, match="no majority"):
        MajorityTask(lead=7)
    with pytest.raises(ConfigError, match="more than lead"):
        MajorityTask(lead=32)
