"""Tokens, padding, and batches that depend on the step alone."""

from __future__ import annotations

from unittest.mock import Mock

import torch

from tests.applications.classification.tiny import NAMES, make_tokenizer
from trilevel.applications.classification.batches import TextBatches, encode

LENGTHS = [1 + (7 * place) % 29 for place in range(53)]
SEQUENCES = [torch.full((length,), place + 1) for place, length in enumerate(LENGTHS)]


def batches(seed: int = 0, batch_size: int = 4, max_batch_tokens: int = 61) -> TextBatches:
    labels = list(range(len(SEQUENCES)))
    return TextBatches(
        SEQUENCES, labels, batch_size=batch_size, max_batch_tokens=max_batch_tokens, padding_id=0, seed=seed
    )


def test_long_texts_keep_their_end_mark() -> None:
    found, num_cut = encode(make_tokenizer(), ["w0 w1 w2 w3 w4", "w0 w1", ""], max_tokens=5)
    assert num_cut == 1
    names = [[NAMES[token] for token in ids] for ids in found]
    assert names == [["[CLS]", "w0", "w1", "w2", "[SEP]"], ["[CLS]", "w0", "w1", "[SEP]"], ["[CLS]", "[SEP]"]]


def test_a_text_without_a_token_is_one_padding_token() -> None:
    found, _ = encode(make_tokenizer(has_marks=False), [" "], max_tokens=5, padding_id=3)
    assert found[0].tolist() == [3]


def test_a_cut_without_an_end_mark_keeps_the_start() -> None:
    found, num_cut = encode(make_tokenizer(has_marks=False), ["w0 w1 w2 w3"], max_tokens=3)
    assert ([NAMES[token] for token in found[0]], num_cut) == (["w0", "w1", "w2"], 1)


def test_text_behind_very_many_characters_is_read() -> None:
    texts = ["w0" + " " * 5_000 + "w1 w2", "x" * 5_000 + " w1", "x" * 5_000 + " w0 w1 w2 w3"]
    found, num_cut = encode(make_tokenizer(), texts, max_tokens=5)
    names = [[NAMES[token] for token in ids] for ids in found]
    assert names == [
        ["[CLS]", "w0", "w1", "w2", "[SEP]"],
        ["[CLS]", "[UNK]", "w1", "[SEP]"],
        ["[CLS]", "[UNK]", "w0", "w1", "[SEP]"],
    ]
    assert num_cut == 1


def test_texts_of_megabytes_are_cut_before_they_are_tokenised() -> None:
    tokenizer = Mock(wraps=make_tokenizer())
    found, num_cut = encode(tokenizer, ["w1 " * 1_000_000], max_tokens=11)
    assert (len(found[0]), num_cut) == (11, 1)
    (given,) = tokenizer.encode_batch.call_args.args
    assert len(given[0]) < 1_000
    tokenizer.encode.assert_not_called()


def test_an_epoch_holds_every_row_once_with_its_label() -> None:
    made = batches()
    for first, last in ((0, made.steps_of(1)), (made.steps_of(1), made.steps_of(2))):
        seen: list[int] = []
        for step in range(first, last):
            batch = made.batch(step)
            # every row is filled with its number
            assert (batch["input_ids"][:, 0] == batch["labels"] + 1).all()
            assert (batch["padding_mask"] == (batch["input_ids"] == 0)).all()
            seen += batch["labels"].tolist()
        assert sorted(seen) == list(range(len(SEQUENCES)))


def test_batches_stay_within_their_bounds() -> None:
    made = batches(max_batch_tokens=23)
    for step in range(made.steps_of(3)):
        rows, tokens = made.batch(step)["input_ids"].shape
        assert rows <= 4
        assert rows * tokens <= 23 or rows == 1


def test_rows_of_a_batch_are_of_like_length() -> None:
    made = batches(max_batch_tokens=10_000)
    padding = [float(made.batch(step)["padding_mask"].float().mean()) for step in range(made.steps_of(1))]
    assert sum(padding) / len(padding) < 0.15


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    made, again = batches(), batches()
    last = made.steps_of(3)
    backwards = {step: again.batch(step)["labels"].tolist() for step in reversed(range(last))}
    forwards = {step: made.batch(step)["labels"].tolist() for step in range(last)}
    assert forwards == backwards
    first, second = made.steps_of(1), made.steps_of(2)
    assert [forwards[step] for step in range(first)] != [forwards[step] for step in range(first, second)]
    assert [batches(seed=1).batch(step)["labels"].tolist() for step in range(first)] != [
        forwards[step] for step in range(first)
    ]
