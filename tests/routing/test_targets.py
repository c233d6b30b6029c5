"""Losses of each target, sample by sample from its definition; targets as text."""

from __future__ import annotations

import numpy as np
import pytest

from trilevel.errors import ConfigError, InputError
from trilevel.routing.targets import Kind, Target, losses_of, parse_target

RNG = np.random.default_rng(23)
COUNT = 211
TRUTH = RNG.integers(0, 3, COUNT)
FULL = np.where(RNG.random(COUNT) < 0.2, (TRUTH + 1) % 3, TRUTH)
ANSWERS = np.where(RNG.random((5, COUNT)) < 0.3, (FULL + 1) % 3, FULL).T
LABELS = ("a", "b", "c")


def loss(kind: Kind, answer: int, full: int, truth: int) -> float:
    if kind == "agreement":
        return float(answer != full)
    if kind == "net":
        return (int(full == truth) - int(answer == truth) + 1) / 2
    return float(full == truth and answer != truth)


@pytest.mark.parametrize("kind", ["agreement", "harm", "net", "recall"])
def test_losses(kind: Kind) -> None:
    target = Target(kind=kind, alpha=0.01, label="b" if kind == "recall" else None)
    found, counts = losses_of(target, ANSWERS, FULL, truth=TRUTH, labels=LABELS)
    wanted = [[loss(kind, *one) for one in zip(ANSWERS[row], [FULL[row]] * 5, [TRUTH[row]] * 5, strict=True)]
              for row in range(COUNT)]  # fmt: skip
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(counts, TRUTH == 1 if kind == "recall" else np.ones(COUNT, bool))
    one, _ = losses_of(target, ANSWERS[:, 2], FULL, truth=TRUTH, labels=LABELS)
    np.testing.assert_array_equal(one, found[:, 2])


def test_disagreement_bounds_harm_and_harm_bounds_the_net_loss() -> None:
    means = [
        losses_of(Target(kind=kind, alpha=0.01), ANSWERS, FULL, truth=TRUTH)[0].mean(0)
        for kind in ("agreement", "harm", "net")
    ]
    assert (means[0] >= means[1]).all()
    assert (means[1] >= 2 * means[2] - 1 - 1e-12).all()
    assert Target(kind="net", alpha=0.01).bound == pytest.approx(0.505)
    assert Target(kind="harm", alpha=0.01).bound == 0.01


def test_graded_losses() -> None:
    lost = RNG.uniform(-1, 1, (COUNT, 5))
    found, counts = losses_of(Target(kind="bounded", alpha=0.1), ANSWERS, FULL, lost=lost)
    np.testing.assert_array_equal(found, np.where(lost > 0, lost, 0))
    assert counts.all()
    drop = Target(kind="drop", alpha=0.1)
    found, counts = losses_of(drop, ANSWERS, FULL, lost=lost)
    assert counts.all()
    # better answers make up for worse ones, and nothing lost is the middle
    assert drop.shown(float(found.mean())) == pytest.approx(lost.mean())
    assert drop.bound == pytest.approx(0.55)
    assert drop.nothing == 0.5


@pytest.mark.parametrize(
    "text", ["harm:0.01", "agreement:0.02", "net:0.005", "recall=fraud:0.01", "bounded:0.25", "drop:0.01"]
)
def test_text(text: str) -> None:
    assert parse_target(text).name == text


# error messages


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("harm", "target 'harm' is none; write KIND:BOUND"),
        ("harm:x", "target 'harm:x' is none"),
        ("harms:0.1", "target 'harms' is unknown; known are agreement, harm, net, recall, bounded"),
        ("harm:0", "the bound 0.0 must lie between 0 and 1"),
        ("harm:nan", "the bound nan must lie between 0 and 1"),
        ("recall:0.1", "a class belongs to recall and to no other"),
        ("harm=a:0.1", "a class belongs to recall and to no other"),
    ],
)
def test_what_is_no_target(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_target(text)


def test_what_the_data_lacks() -> None:
    harm = Target(kind="harm", alpha=0.01)
    with pytest.raises(InputError, match=r"needs labels, and the data has none\. .*agreement:0\.01"):
        losses_of(harm, ANSWERS, FULL)
    with pytest.raises(InputError, match="all 211 samples are of one class"):
        losses_of(harm, ANSWERS, FULL, truth=np.zeros(COUNT, np.int64))
    recall = Target(kind="recall", alpha=0.01, label="d")
    with pytest.raises(InputError, match="there is no class 'd'; there are a, b, c"):
        losses_of(recall, ANSWERS, FULL, truth=TRUTH, labels=LABELS)
    with pytest.raises(InputError, match="no sample is of the class 'd'"):
        losses_of(recall, ANSWERS, FULL, truth=TRUTH, labels=(*LABELS, "d"))
    with pytest.raises(InputError, match="needs answers that are graded from 0 to 1"):
        losses_of(Target(kind="bounded", alpha=0.1), ANSWERS, FULL)
