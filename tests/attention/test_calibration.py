"""The calibration's file: written whole or not at all, read only where it belongs, followed by `auto`."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trilevel.attention import api, calibration, library, op
from trilevel.attention.api import multi_level_attention
from trilevel.attention.calibration import Calibration, Key, Work, folder
from trilevel.attention.cost import cheaper, predicted_ms
from trilevel.attention.impl import blocked, native
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.errors import InputError

LEVELS = Levels(ratio=LevelRatio(1, 1, 1), window=5, region_size=7, num_global_tokens=3)
SHAPE = (2, 3, 19, 8)
NO_WORK = Work(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
PRIMES = Work(2, 3, 5, 7, 11, 13, 17, 19, 23, 29)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of calibrations."""
    monkeypatch.setattr(calibration, "folder", lambda: tmp_path / "trilevel")
    calibration.forget()
    return tmp_path / "trilevel"


def made(rates: dict[Key, Work] | None = None) -> Calibration:
    return Calibration(machine=calibration.this_machine(), rates=rates or {("native", "float32"): PRIMES})


def per_call(native_ms: float, blocked_ms: float) -> Calibration:
    """Every call takes these milliseconds, whatever its size."""
    return made(
        {
            ("native", "float32"): NO_WORK._replace(calls=1e6 * native_ms),
            ("blocked", "float32"): NO_WORK._replace(calls=1e6 * blocked_ms),
        }
    )


# definition


def test_a_prediction_adds_up_the_work() -> None:
    ones = Work(*[1.0] * 10)
    assert made().predicted_ms(("native", "float32"), ones) == pytest.approx(1e-6 * sum(PRIMES))
    assert made().predicted_ms(("native", "float32"), NO_WORK._replace(near=31)) == pytest.approx(13e-6 * 31)
    assert made().predicted_ms(("blocked", "float32"), ones) is None


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert folder() == Path("/somewhere/trilevel")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/at/home")
    assert folder() == Path("/at/home/.cache/trilevel")


@pytest.mark.usefixtures("place")
def test_a_calibration_comes_back_as_it_was_stored() -> None:
    stored = made({("native", "float32"): PRIMES, ("dense", "bfloat16"): Work(*(1 / prime for prime in PRIMES))})
    path = calibration.store(stored)
    assert path == calibration.path_of(stored.machine)
    found = calibration.current()
    assert found is not None
    assert found.to_dict() == stored.to_dict()
    assert calibration.current() is found


def test_every_machine_has_a_file_of_its_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = calibration.this_machine()
    assert set(machine) == {"cpu", "isa", "threads", "torch", "trilevel"}
    paths = {calibration.path_of(machine | {name: "another"}) for name in machine} | {calibration.path_of(machine)}
    assert len(paths) == 6
    assert {path.parent for path in paths} == {place}
    calibration.store(made())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert calibration.current() is None


# what can go wrong with the file


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(place: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = calibration.store(made())
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[step], full)
    with pytest.raises(InputError, match=r"cannot be written.*Name a writable folder in XDG_CACHE_HOME"):
        calibration.store(per_call(1, 2))
    assert path.read_bytes() == before
    assert list(place.iterdir()) == [path]


@pytest.mark.usefixtures("place")
def test_numbers_that_are_none_are_not_stored() -> None:
    with pytest.raises(InputError, match="cannot be written"):
        calibration.store(made({("native", "float32"): NO_WORK._replace(near=float("nan"))}))
    assert calibration.current() is None


def damaged(kind: str) -> str:
    document = made().to_dict()
    entry = document["rates"][0]
    if kind == "foreign":
        document["machine"]["cpu"] = "another"
    elif kind == "form":
        document["form"] += 1
    elif kind == "kind":
        entry["nanoseconds"]["luck"] = entry["nanoseconds"].pop("near")
    elif kind == "missing":
        del document["rates"]
    elif kind == "negative":
        entry["nanoseconds"]["near"] = -1.0
    elif kind == "infinite":
        entry["nanoseconds"]["near"] = float("inf")
    elif kind == "word":
        entry["nanoseconds"]["near"] = "much"
    elif kind == "huge":
        return json.dumps(document).replace("13", "1" + 400 * "0")
    texts = {"cut": json.dumps(document)[:97], "empty": "", "list": "[]", "deep": 100_000 * "["}
    return texts.get(kind) or ("" if kind == "empty" else json.dumps(document))


@pytest.mark.parametrize(
    "kind",
    ["cut", "empty", "list", "deep", "foreign", "form", "kind", "missing", "negative", "infinite", "word", "huge"],
)
def test_a_file_that_is_no_use_is_passed_over_with_one_line(
    place: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    wanted = predicted_ms(LEVELS, **sizes())
    path = calibration.path_of(calibration.this_machine())
    place.mkdir()
    path.write_text(damaged(kind), encoding="utf-8")
    calibration.forget()
    with caplog.at_level(logging.INFO, "trilevel.attention.calibration"):
        for _ in range(3):
            assert calibration.current() is None
            assert predicted_ms(LEVELS, **sizes()) == wanted
    assert len(caplog.records) == 1
    assert f"{path} is passed over" in caplog.text
    assert "trilevel bench calibrate" in caplog.text


def test_bytes_that_are_no_text_and_a_folder_in_its_place(place: Path) -> None:
    path = calibration.path_of(calibration.this_machine())
    place.mkdir()
    path.write_bytes(b"\xff\xfe\x00")
    assert calibration.current() is None
    path.unlink()
    path.mkdir()
    calibration.forget()
    assert calibration.current() is None


def sizes() -> dict[str, Any]:
    batch, heads, tokens, dim = SHAPE
    return {
        "batch": batch, "num_heads": heads, "num_kv_heads": heads, "tokens": tokens, "head_dim": dim,
        "dtype": torch.float32,
    }  # fmt: skip


# what follows it


@pytest.mark.usefixtures("place")
def test_predictions_follow_it() -> None:
    calibration.store(per_call(3, 5))
    assert predicted_ms(LEVELS, **sizes(), impl="native") == pytest.approx(3)
    assert predicted_ms(LEVELS, **sizes(), impl="blocked") == pytest.approx(5)
    # not in the calibration: the shipped rates
    assert predicted_ms(None, **sizes(), impl="dense") > 0


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("times", "wanted"), [((3, 5), "native"), ((5, 3), "blocked"), ((5, 4), "native")])
def test_blocked_is_chosen_when_it_is_clearly_cheaper(times: tuple[float, float], wanted: str) -> None:
    given = (LEVELS, SHAPE, 3, torch.float32, False)
    assert cheaper(*given) == "native"
    calibration.store(per_call(*times))
    assert cheaper(*given) == wanted
    # without rates of both there is nothing to compare
    assert cheaper(LEVELS, SHAPE, 3, torch.bfloat16, False) == "native"
    calibration.store(made({("blocked", "float32"): NO_WORK}))
    assert cheaper(*given) == "native"


@pytest.mark.skipif(not library.is_available(), reason="native is not built")
@pytest.mark.usefixtures("place")
def test_auto_follows_it_and_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    ran: list[str] = []

    def spy(name: str, attend: Any) -> Any:
        def run(*arguments: Any) -> Any:
            ran.append(name)
            return attend(*arguments)

        return run

    for module, name in ((native, "native"), (blocked, "blocked")):
        attend = spy(name, module.attend)
        monkeypatch.setitem(api.IMPLEMENTATIONS, name, attend)
        monkeypatch.setattr(module, "attend", attend)
    api._say_once.cache_clear()
    query = torch.randn(SHAPE)
    options: dict[str, Any] = {"levels": LEVELS, "global_score": torch.randn(2, 19)}
    multi_level_attention(query, query, query, **options)
    assert ran == ["native"]
    calibration.store(per_call(5, 3))
    with caplog.at_level(logging.INFO, "trilevel.attention.api"):
        for _ in range(3):
            multi_level_attention(query, query, query, **options)
    assert ran[1:] == ["blocked"] * 3
    assert caplog.text.count("calibration predicts it to be faster") == 1
    # named, traced or with gradients: not asked
    multi_level_attention(query, query, query, **options, impl="native")
    multi_level_attention(query.clone().requires_grad_(), query, query, **options)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(op, "attend", spy("operator", lambda _call, impl: (query, impl)))
    multi_level_attention(query, query, query, **options)
    assert ran[4:] == ["native", "native", "operator"]


@pytest.mark.usefixtures("place")
def test_a_decision_is_made_once_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration.store(per_call(5, 3))
    cheaper(LEVELS, SHAPE, 3, torch.float32, False)
    monkeypatch.setattr(Calibration, "predicted_ms", lambda *_: pytest.fail("predicted again"))
    assert cheaper(replace(LEVELS), SHAPE, 3, torch.float32, False) == "blocked"
