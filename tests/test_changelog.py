"""The top entry of the change log is the version of the package."""

from __future__ import annotations

import re
from pathlib import Path

import trilevel

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"


def test_top_entry_is_the_version() -> None:
    entries = re.findall(r"^## \[(.+?)\]", CHANGELOG.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert entries[0] == trilevel.__version__
