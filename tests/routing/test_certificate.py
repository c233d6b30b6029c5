"""The certificate as a file: it comes back whole, and nothing of it can be edited."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trilevel.errors import CertificateError
from trilevel.routing.certificate import SEAL, Certificate, Platform, digest
from trilevel.routing.certify import Proof

HERE = Platform(runtime="onnxruntime", version="1.32.0", isa="avx2", precision="float32")
CERTIFICATE = Certificate(
    proofs=(Proof(target="harm:0.01", units=4_001, mean=0.002, errors=8, p_value=1e-7),),
    delta=0.05,
    setting={"int8/start": 1.0, "int8/1": 2.5, "int8/2": 1e9},
    hashes={"model": "a" * 64, "router": "b" * 64},
    platform=HERE,
    seed=3,
    tries=1,
    created="2026-11-28",
    measured={"risk": 0.002, "cost": 0.31},
)

PROOF = CERTIFICATE.to_dict()["proofs"][0]


def written(**changes: Any) -> dict[str, Any]:
    """As it is read from a file, a value changed and sealed again."""
    values: dict[str, Any] = json.loads(json.dumps(CERTIFICATE.to_dict())) | changes
    del values[SEAL]
    return values | {SEAL: digest(values)}


def test_it_comes_back() -> None:
    again = Certificate.from_dict(json.loads(json.dumps(CERTIFICATE.to_dict())))
    assert again == CERTIFICATE
    assert "exchangeable" in CERTIFICATE.to_dict()["assumes"]
    assert again.said() == (
        "harm:0.01 at a confidence of 0.95, from 4,001 held-out units, on onnxruntime 1.32.0 (avx2, float32)"
    )


@pytest.mark.parametrize("place", [("setting", "int8/1"), ("delta",), ("hashes", "model"), ("platform", "version")])
def test_an_edit_breaks_the_seal(place: tuple[str, ...]) -> None:
    values = json.loads(json.dumps(CERTIFICATE.to_dict()))
    inner = values
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = 0.01 if place[-1] in ("int8/1", "delta") else "c"
    with pytest.raises(CertificateError, match="was changed after it was made, so it proves nothing"):
        Certificate.from_dict(values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "no trilevel-certificate of version 1"),
        (3, "no trilevel-certificate of version 1"),
        (written(version=2), "no trilevel-certificate of version 1"),
        (written(unknown=1), "the certificate is damaged"),
        (written(proofs=[{}]), "the certificate is damaged"),
        (written(proofs=[]), "own proofs do not reach its confidence"),
        (written(tries=1_000_000), "own proofs do not reach its confidence"),
        (written(setting={"int8/1": "x"}), "its thresholds cannot be right"),
        (written(setting={"int8/1": True}), "its thresholds cannot be right"),
        (written(setting=[2.5]), "its thresholds cannot be right"),
        (written(hashes=3), "its hashes cannot be right"),
        (written(hashes={"model": 5}), "its hashes cannot be right"),
        (written(measured=None), "its measured values cannot be right"),
        (written(platform={"runtime": "a", "version": 2, "isa": "b", "precision": "c"}), "its platform cannot"),
        (written(created=5), "its date cannot be right"),
        (written(seed="3"), "its seed cannot be right"),
        (written(tries=0), "its number of tries cannot be right"),
        (written(delta="x"), "its delta cannot be right"),
        (written(delta=2.0), "its delta cannot be right"),
        (written(proofs=[dict(PROOF, units="x")]), "its proofs cannot be right"),
        (written(proofs=[dict(PROOF, errors=4_003)]), "its proofs cannot be right"),
        (written(proofs=[dict(PROOF, p_value=-0.1)]), "its proofs cannot be right"),
    ],
)
def test_what_is_none(values: Any, words: str) -> None:
    with pytest.raises(CertificateError, match=words):
        Certificate.from_dict(values)


def test_a_number_that_is_none_is_an_edit() -> None:
    values = CERTIFICATE.to_dict() | {"delta": float("nan")}
    with pytest.raises(CertificateError, match="was changed after it was made"):
        Certificate.from_dict(values)


def test_of_another_model() -> None:
    CERTIFICATE.check({"model": "a" * 64})
    with pytest.raises(CertificateError, match="is of another model and router than what is here"):
        CERTIFICATE.check({"model": "c" * 64, "router": "a" * 64})


def test_platforms() -> None:
    assert HERE.difference(HERE) == ""
    other = Platform(runtime="onnxruntime", version="1.33.0", isa="avx512_vnni", precision="float32")
    assert HERE.difference(other) == "version 1.32.0 and here 1.33.0, isa avx2 and here avx512_vnni"
