"""The comparison: ratios, what is run at which length, and how far two summaries agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.applications.documents.demo_model import document, save_small_model
from trilevel.applications.documents import compare as module
from trilevel.applications.documents.checkpoint import load_run
from trilevel.applications.documents.compare import Comparison, agreement, compare, rank_correlation
from trilevel.applications.documents.encoded import encode
from trilevel.applications.documents.materialised import materialised_bytes
from trilevel.applications.documents.measure import Attention, Job, Measured
from trilevel.applications.documents.units import split_units


def measured(attention: Attention, peak: int | None, *seconds: float, stopped: str = "") -> Measured:
    return Measured(attention=attention, tokens=97, seconds=seconds, peak_memory_bytes=peak, stopped=stopped)


def comparison(**changes: Measured) -> Comparison:
    values = {
        "empty": measured("empty", 1000),
        "trilevel": measured("trilevel", 1030, 0.5, 0.2, 0.3),
        "sdpa": measured("sdpa", 1040, 3.0),
        "materialised": measured("materialised", 1300, 9.0),
    }
    return Comparison(**{**values, **changes})


def test_ratios_are_above_the_empty_process() -> None:
    found = comparison()
    assert found.speedup == pytest.approx(10.0)
    assert found.memory_ratio == pytest.approx(0.1)
    assert found.memory_vs_sdpa == pytest.approx(0.75)
    assert not found.is_lower_bound


def test_the_same_length_is_compared_with_materialised_attention() -> None:
    assert comparison(trilevel_short=measured("trilevel", 1003)).memory_ratio == pytest.approx(0.01)


def test_a_stopped_dense_run_gives_a_lower_bound() -> None:
    found = comparison(sdpa=measured("sdpa", 1040, stopped="stopped after 60 s"))
    assert found.is_lower_bound
    assert found.speedup == pytest.approx(200.0)


def test_what_was_not_measured_has_no_ratio() -> None:
    found = comparison(sdpa=measured("sdpa", None, stopped="out of memory"))
    assert found.speedup is None
    assert found.memory_vs_sdpa is None


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_materialised_attention_runs_at_the_longest_length_that_fits(
    fraction: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = encode(split_units(document()), load_run(save_small_model(tmp_path))[1])
    jobs: list[Job] = []

    def fake(job: Job, **_: object) -> Measured:
        jobs.append(job)
        return Measured(attention=job.attention, tokens=encoded.cut(job.max_tokens).num_tokens)

    monkeypatch.setattr(module, "measure", fake)
    told: list[float] = []
    memory = int(fraction * materialised_bytes(4, encoded.num_tokens)) + 1
    found = compare(
        encoded,
        num_heads=4,
        has_focus=False,
        model=None,
        threads=1,
        memory_bytes=memory,
        tell=lambda text, share: told.append(share),
    )
    lengths = [(job.attention, job.max_tokens) for job in jobs]
    n = encoded.num_tokens
    assert lengths[:3] == [("empty", n), ("trilevel", n), ("sdpa", n)]
    if fraction == 1.0:
        assert lengths[3:] == [("materialised", n)]
        assert found.trilevel_short is None
    else:
        assert lengths[3:] == [("materialised", n // 2), ("trilevel", n // 2)]
        assert found.trilevel_short is not None
        assert found.trilevel_short.tokens == found.materialised.tokens <= n // 2
    assert told == sorted(told)
    assert all(0 <= share <= 1 for share in told)
    assert not Path(jobs[0].document).exists()


def test_agreement() -> None:
    assert agreement([1, 2], [1, 2]) == 1.0
    assert agreement([1, 2], [3]) == 0.0
    assert agreement([], []) == 1.0


def test_rank_correlation_sees_order_alone() -> None:
    scores = np.random.default_rng(0).normal(size=29)
    assert rank_correlation(scores, np.exp(scores)) == pytest.approx(1.0)
    assert rank_correlation(scores, -scores) == pytest.approx(-1.0)
    assert rank_correlation(scores[:1], scores[:1]) is None


def test_a_runtime_is_compared_with_its_own_process_before_the_pass() -> None:
    found = Measured(attention="int8", tokens=97, peak_memory_bytes=900, loaded_bytes=830)
    assert comparison(int8=found).above_empty(found) == 70
    torch_too = Measured(attention="bfloat16", tokens=97, peak_memory_bytes=1050, loaded_bytes=830)
    assert comparison().above_empty(torch_too) == 50
