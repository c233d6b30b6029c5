"""Imports run one way: a folder imports from the folders to its left, never to its right."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trilevel

ROOT = Path(trilevel.__file__).parent
# the first group is one level: its members may import each other
ORDER: list[set[str]] = [
    {"errors", "client", "data"},
    {"attention"},
    {"model"},
    {"training"},
    {"compression"},
    {"conversion"},
    {"integrations"},
    {"routing"},
    {"tuning"},
    {"artifact"},
    {"serving"},
    {"report"},
    {"applications"},
    {"bench"},
    {"cli"},
]
RANK = {name: rank for rank, group in enumerate(ORDER) for name in group}
# the front door and `python -m trilevel` stand outside the order
OUTSIDE = {"__init__", "__main__"}


def parts_imported(tree: ast.AST) -> Iterator[str]:
    """The first-level parts of trilevel that a module imports, anywhere in it, function bodies included."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("trilevel."))


def part_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def offences(part: str, tree: ast.AST) -> list[str]:
    """What a module of `part` imports although it may not; an unknown part counts as an offence."""
    allowed = {name for name, rank in RANK.items() if rank <= RANK[part]} | {"__version__"}
    return [f"{part} imports {name}" for name in parts_imported(tree) if name not in allowed]


MODULES = [file for file in sorted(ROOT.rglob("*.py")) if part_of(file) not in OUTSIDE]


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file: Path) -> None:
    assert part_of(file) in RANK, f"{part_of(file)} has no place in the import order"
    assert not offences(part_of(file), ast.parse(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("attention", "from trilevel.model.block import Block"),
        ("report", "import trilevel.applications.documents"),
        ("bench", "from trilevel import cli"),
        ("model", "def f():\n    from trilevel import training"),
        ("errors", "from trilevel import MultiLevelAttention"),
    ],
)
def test_the_rule_sees_an_offence(part: str, source: str) -> None:
    assert offences(part, ast.parse(source))


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, trilevel; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
