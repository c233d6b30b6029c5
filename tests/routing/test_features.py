"""Features of inputs, against their definition computed sample by sample."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from trilevel.errors import ConfigError
from trilevel.routing.features import IMAGES, TEXT, features_of, image_features, text_features


def test_text() -> None:
    rows = [[5, 5, 7, 9], [3], [4, 4, 4]]
    ids, mask = np.zeros((3, 4), np.int64), np.zeros((3, 4), np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = row, 1
    found = text_features({"input_ids": ids, "attention_mask": mask})
    for row, own in zip(rows, found, strict=True):
        shares = [count / len(row) for count in Counter(row).values()]
        entropy = -sum(share * math.log(share) for share in shares) / math.log(max(2, len(row)))
        wanted = [math.log(1 + len(row)), entropy, 1 - len(set(row)) / len(row)]
        np.testing.assert_allclose(own, wanted, atol=1e-12)
    assert found.shape == (3, len(TEXT))


def test_images() -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (5, 3, 7, 11), dtype=np.uint8)
    found = image_features({"pixels": pixels})
    assert found.shape == (5, len(IMAGES))
    grey = pixels[2].astype(float).mean(0) / 255
    across = np.mean([abs(grey[y, x + 1] - grey[y, x]) for y in range(7) for x in range(10)])
    down = np.mean([abs(grey[y + 1, x] - grey[y, x]) for y in range(6) for x in range(11)])
    counts = Counter(min(15, int(shade * 16)) for shade in grey.ravel())
    entropy = -sum(n / 77 * math.log(n / 77) for n in counts.values()) / math.log(16)
    np.testing.assert_allclose(found[2], [grey.mean(), grey.std(), across + down, entropy])
    flat = image_features({"pixels": np.full((1, 1, 4, 4), 200, np.uint8)})
    np.testing.assert_allclose(flat, [[200 / 255, 0, 0, 0]], atol=1e-12)


def test_padding_and_company_change_nothing() -> None:
    ids, mask = np.array([[4, 9, 9, 0, 0]]), np.array([[1, 1, 1, 0, 0]])
    alone = text_features({"input_ids": ids[:, :3], "attention_mask": mask[:, :3]})
    np.testing.assert_array_equal(text_features({"input_ids": ids, "attention_mask": mask}), alone)


def test_a_task_without_features() -> None:
    assert features_of("images")[0] == IMAGES
    with pytest.raises(ConfigError, match="the task 'embedding' is not routed; classification, images, documents are"):
        features_of("embedding")
