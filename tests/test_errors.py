"""The error tree and the import of optional parts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trilevel import errors


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.ShapeError, ValueError),
        (errors.InputError, ValueError),
        (errors.CheckpointError, ValueError),
        (errors.ImplementationError, RuntimeError),
        (errors.MissingExtraError, ImportError),
    ],
)
def test_every_error_is_a_trilevel_error_and_a_builtin(
    kind: type[errors.TrilevelError], builtin: type[Exception]
) -> None:
    assert issubclass(kind, errors.TrilevelError)
    assert issubclass(kind, builtin)


def test_require_returns_the_module() -> None:
    assert errors.require("json", extra="cli") is sys.modules["json"]


def test_require_names_the_extra_and_the_command() -> None:
    with pytest.raises(errors.MissingExtraError, match=r"'absent_pkg' is not installed.*pip install 'trilevel\[cli\]'"):
        errors.require("absent_pkg.part", extra="cli")


def test_require_tells_a_broken_package_from_an_absent_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_pkg.py").write_text("raise ImportError('libfoo.so is missing')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(errors.MissingExtraError, match=r"cannot be imported \(libfoo.so is missing\)"):
        errors.require("broken_pkg", extra="cli")
