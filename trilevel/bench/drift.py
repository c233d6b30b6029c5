"""What an audit sees when inputs change: images under noise, run by the paths of an artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trilevel.routing.audit import power
from trilevel.routing.decision import answers
from trilevel.routing.outcomes import Outcomes
from trilevel.routing.router import Router
from trilevel.routing.samples import Samples

SHADOW, REQUESTS, RUNS = 0.02, 10_000, 200
NOISES = (0, 16, 32, 64)
"""Deviations of what is added to pixels of 0 to 255."""


def drift(
    samples: Samples,
    run: Callable[[Samples, str], Outcomes],
    router: Router,
    setting: Mapping[str, float],
    alpha: float,
    *,
    noises: Sequence[int] = NOISES,
    count: int = 1_000,
) -> list[dict[str, Any]]:
    """How many answers differ from the full path's under noise, and how often an audit finds it in 10,000 requests.

    Streams are drawn from the answers to noisy images, 2% of the requests shadowed.

    Args:
        samples: images, rows (channels, height, width) uint8.
        run: what every path answers for samples, under a name to keep it.
        router, setting: which path each takes.
        alpha: what the audit allows.
        noises: deviations.
        count: images of each.
    """
    few, found = samples.some(range(min(count, len(samples)))), []
    for noise in noises:
        rng = np.random.default_rng(noise)
        rows = [np.clip(row + rng.normal(0, noise, row.shape).round(), 0, 255).astype(np.uint8) for row in few.rows]
        outcomes = run(replace(few, rows=rows, digests=[f"{one}+{noise}" for one in few.digests]), f"noise-{noise}")
        changed = float((answers(outcomes, router, [setting])[:, 0] != outcomes.full_predictions).mean())
        (audited,) = power(alpha, [changed], samples=round(SHADOW * REQUESTS), runs=RUNS)
        accuracy = None if outcomes.labels is None else float((outcomes.full_predictions == outcomes.labels).mean())
        found.append(
            {"noise": noise, "full_path_accuracy": accuracy, "changed": changed, "alpha": alpha,
             "alarmed": audited.alarmed, "median_shadowed": audited.median_samples}
        )  # fmt: skip
    return found
