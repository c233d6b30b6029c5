"""Watching an artifact's own answers: what is compared, the alarm, and that it outlives a restart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.routing.test_certificate import CERTIFICATE
from trilevel.artifact.audited import AuditedPredictor
from trilevel.errors import CertificateError, ConfigError
from trilevel.routing.executor import Routed

FULL = "float32/1"


class Fake:
    """Half of the rows take a cheap path; `wrong` of those answer otherwise than the full path, which says class 0."""

    runtime, version, precision = "onnxruntime", "1", "float32"

    def __init__(self, wrong: float = 0.0, certificate: Any = CERTIFICATE) -> None:
        self.certificate, self.reason, self.rule = certificate, "nothing is certified", object()
        self.paths = SimpleNamespace(full=SimpleNamespace(name=FULL))
        self.whole = SimpleNamespace(run=self._full)
        self.wrong, self.compared = wrong, 0

    def _full(self, inputs: Any) -> Any:
        self.compared += len(inputs["pixels"])
        return {"logits": np.tile([1.0, 0.0], (len(inputs["pixels"]), 1))}

    def route(self, inputs: Any) -> list[Routed]:
        found = []
        for row in inputs["pixels"]:
            is_cheap = self.rule is not None and row[0] < 0.5
            is_wrong = is_cheap and row[1] < self.wrong
            output = np.array([[0.0, 1.0] if is_wrong else [1.0, 0.0]])
            path = "int8/1" if is_cheap else FULL
            found.append(Routed(outputs=output, path=path, segments_run=1, margin=1.0))
        return found

    def stop(self, reason: str) -> None:
        self.rule, self.reason = None, reason


def rows(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"pixels": np.random.default_rng(seed).random((count, 2))}


def opened(fake: Any, path: Path, **options: Any) -> AuditedPredictor:
    return AuditedPredictor(fake, path, **options)


def test_a_share_is_compared_and_only_what_was_cheap_is_run_again(tmp_path: Path) -> None:
    fake = Fake()
    audited = opened(fake, tmp_path / "audit.json", shadow_share=0.2)
    found = audited.run(rows(2_003))
    assert found["logits"].shape == (2_003, 2)
    assert audited.audit.samples == pytest.approx(0.2 * 2_003, rel=0.25)
    assert fake.compared == pytest.approx(0.5 * audited.audit.samples, rel=0.25)
    assert audited.audit.mean == 0
    # the same rows are the same choice, and ids decide where they are given
    again = opened(Fake(), tmp_path / "other.json", shadow_share=0.2)
    again.run(rows(2_003))
    assert again.audit.samples == audited.audit.samples
    named = opened(Fake(), tmp_path / "named.json", shadow_share=0.2)
    named.run(rows(5), ids=["same"] * 5)
    assert named.audit.samples in (0, 5)


def test_an_alarm_sends_everything_through_the_full_path_and_outlives_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, fake = tmp_path / "audit.json", Fake(wrong=0.4)
    audited = opened(fake, path, shadow_share=0.3)
    for seed in range(20):
        audited.run(rows(101, seed))
    assert audited.audit.is_alarmed
    assert "of 0 answers" not in caplog.text
    assert "answers changed where 1.0% is allowed, so every input takes the full path" in caplog.text
    assert fake.rule is None
    before = fake.compared
    assert (audited.run(rows(101))["logits"].argmax(1) == 0).all()
    assert fake.compared == before
    later = Fake(wrong=0.4)
    assert opened(later, path).audit.samples == audited.audit.samples
    assert later.rule is None


def test_what_is_expected_without_labels_is_what_calibration_saw(tmp_path: Path) -> None:
    many = replace(CERTIFICATE, measured={"disagreement": 0.07})
    assert opened(Fake(certificate=many), tmp_path / "a.json").audit.config.alpha == 0.07
    few = replace(CERTIFICATE, measured={"disagreement": 0.001})
    assert opened(Fake(certificate=few), tmp_path / "b.json").audit.config.alpha == 0.01


# error messages


def test_nothing_to_audit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is nothing to audit: nothing is certified"):
        opened(Fake(certificate=None), tmp_path / "audit.json")


def test_the_state_of_another_certificate(tmp_path: Path) -> None:
    audited = opened(Fake(), tmp_path / "audit.json", shadow_share=1.0)
    audited.run(rows(3))
    other = replace(CERTIFICATE, seed=99)
    with pytest.raises(CertificateError, match="so its evidence does not count"):
        opened(Fake(certificate=other), tmp_path / "audit.json")
