from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilevel.errors import ConfigError
from trilevel.routing.paths import LEVELS, PRECISIONS, Family, Path, PathSet

PATHS = st.builds(
    Path,
    segments=st.integers(1, 97),
    precision=st.sampled_from(PRECISIONS),
    levels=st.sampled_from(LEVELS),
    focus_fraction=st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True),
)
NAMES = ("int8/1", "int8/3", "bfloat16/3/local", "float32/2", "int8/2", "int8/3/focus=0.2", "float32/3")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (Path(segments=2, precision="int8"), "int8/2"),
        (Path(segments=3, precision="float32", levels="local"), "float32/3/local"),
        (Path(segments=3, precision="int8", focus_fraction=0.2), "int8/3/focus=0.2"),
        (
            Path(segments=11, precision="bfloat16", levels="local+regional", focus_fraction=0.5),
            "bfloat16/11/local+regional/focus=0.5",
        ),
    ],
)
def test_names(path: Path, name: str) -> None:
    assert path.name == name
    assert Path.parse(name) == path
    assert path.family.at(path.segments) == path


@given(path=PATHS)
def test_names_are_parsed_back(path: Path) -> None:
    assert Path.parse(path.name) == path
    assert Family.parse(path.family.name) == path.family
    deeper = dataclasses.replace(path, segments=path.segments + 1)
    assert deeper.family == path.family
    assert deeper.name != path.name


@given(one=PATHS, other=PATHS)
def test_names_are_different(one: Path, other: Path) -> None:
    assert (one.name == other.name) == (one == other)


def test_a_set_keeps_its_order_and_knows_its_families() -> None:
    paths = PathSet.parse(NAMES, full="float32/3")
    assert paths.names == NAMES == tuple(path.name for path in paths)
    assert len(paths) == 7
    assert paths["int8/3/focus=0.2"].focus_fraction == 0.2
    assert paths.full == Path(segments=3, precision="float32")
    assert list(paths.families.items()) == [
        ("int8", (1, 2, 3)),
        ("bfloat16/local", (3,)),
        ("float32", (2, 3)),
        ("int8/focus=0.2", (3,)),
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"segments": 0}, "segments=0 must be >= 1"),
        ({"precision": "fp16"}, "precision='fp16' must be one of float32, bfloat16, int8"),
        ({"levels": "global"}, r"levels='global' must be one of all, local, local\+regional"),
        ({"focus_fraction": 1.0}, "focus_fraction=1.0 must be above 0 and below 1"),
        ({"focus_fraction": float("nan")}, "focus_fraction=nan must be above 0"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Path(**{"segments": 2, "precision": "int8", **values})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int8", r"'int8' names no path \(the number of segments is missing\); write PRECISION/SEGMENTS"),
        ("int8/deep", "the number of segments is missing"),
        ("int8/0", "segments=0 must be >= 1"),
        ("int4/2", "precision='int4' must be one of"),
        ("int8/02", "did you mean 'int8/2'"),
        ("int8/2/all", "did you mean 'int8/2'"),
        ("int8/2/focus=0.20", "did you mean 'int8/2/focus=0.2'"),
        ("int8/2/focus=much", "could not convert string to float: 'much'"),
        ("int8/2/focus=0.2/local", "did you mean 'int8/2/local/focus=0.2'"),
        ("int8/2/local/local", "did you mean 'int8/2/local'"),
        ("", "'' names no path"),
    ],
)
def test_names_of_nothing(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Path.parse(name)


def test_a_family_of_nothing() -> None:
    with pytest.raises(ConfigError, match=r"'half' names no family \(precision='half' .*write PRECISION\[/LEVELS\]"):
        Family.parse("half")


def test_sets_that_are_none() -> None:
    with pytest.raises(ConfigError, match="paths int8/1 stand twice"):
        PathSet.parse(["int8/1", "float32/3", "int8/1"], full="float32/3")
    with pytest.raises(ConfigError, match="full=float32/3 is none of the paths: int8/1, int8/2"):
        PathSet.parse(["int8/1", "int8/2"], full="float32/3")
    with pytest.raises(ConfigError, match="full=float32/2 must be the deepest of its family, which has 3 segments"):
        PathSet.parse(NAMES, full="float32/2")
    with pytest.raises(ConfigError, match=r"path 'int8/4' is not in this set; known: int8/1, .*float32/3\."):
        PathSet.parse(NAMES, full="float32/3")["int8/4"]
