"""Paths: how much of a model runs for a sample, and the set of those that a router chooses from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from trilevel.errors import ConfigError

PRECISIONS: Final = ("float32", "bfloat16", "int8")
LEVELS: Final = ("all", "local", "local+regional")
_FOCUS = "focus="


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Paths that differ in depth alone: going deeper inside one reuses the state, changing to another restarts.

    Its name leaves out what is usual: `int8`, `float32/local`, `int8/focus=0.2`.

    Args:
        precision: `float32`, `bfloat16` or `int8`.
        levels: of attention that run: `all`, `local` or `local+regional`.
        focus_fraction: of the tokens that go on after the first segment, above 0 and below 1; None for all.

    Raises:
        ConfigError: a value is none of these.
    """

    precision: str
    levels: str = "all"
    focus_fraction: float | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision={self.precision!r} must be one of {', '.join(PRECISIONS)}.")
        if self.levels not in LEVELS:
            raise ConfigError(f"levels={self.levels!r} must be one of {', '.join(LEVELS)}.")
        if self.focus_fraction is not None and not 0 < self.focus_fraction < 1:
            raise ConfigError(
                f"focus_fraction={self.focus_fraction} must be above 0 and below 1; None lets all tokens go on."
            )

    @property
    def name(self) -> str:
        """Canonical; `Family.parse` gives an equal family back."""
        return "/".join([self.precision, *self._unusual()])

    def at(self, segments: int) -> Path:
        """The path of this family that runs so many segments."""
        return Path(segments=segments, precision=self.precision, levels=self.levels, focus_fraction=self.focus_fraction)

    @classmethod
    def parse(cls, name: str) -> Family:
        """The family of this name.

        >>> Family.parse("int8/local/focus=0.2")
        Family(precision='int8', levels='local', focus_fraction=0.2)

        Raises:
            ConfigError: it is no family's canonical name.
        """
        try:
            family = _family(name.split("/"))
        except ValueError as error:
            raise _misnamed("family", name, str(error)) from error
        if family.name != name:
            raise _misnamed("family", name, f"did you mean {family.name!r}?")
        return family

    def _unusual(self) -> list[str]:
        focus = [] if self.focus_fraction is None else [f"{_FOCUS}{float(self.focus_fraction)!r}"]
        return ([] if self.levels == "all" else [self.levels]) + focus


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """How many segments of a model run, and as which family. Names: `int8/2`, `float32/3/local`, `int8/3/focus=0.2`.

    Args:
        segments: how many run, from the first, >= 1.
        precision: see `Family`, as are the others.

    Raises:
        ConfigError: a value is out of range.
    """

    segments: int
    precision: str
    levels: str = "all"
    focus_fraction: float | None = None

    def __post_init__(self) -> None:
        """Check every value; the family checks its own."""
        if self.segments < 1:
            raise ConfigError(f"segments={self.segments} must be >= 1: a path runs the first segment at least.")
        _ = self.family

    @property
    def family(self) -> Family:
        """All but the depth."""
        return Family(precision=self.precision, levels=self.levels, focus_fraction=self.focus_fraction)

    @property
    def name(self) -> str:
        """Canonical; `Path.parse` gives an equal path back."""
        precision, *unusual = self.family.name.split("/")
        return "/".join([precision, str(self.segments), *unusual])

    @classmethod
    def parse(cls, name: str) -> Path:
        """The path of this name.

        >>> Path.parse("float32/3/local").segments
        3

        Raises:
            ConfigError: it is no path's canonical name.
        """
        precision, *rest = name.split("/")
        if not rest or not rest[0].isdecimal():
            raise _misnamed("path", name, "the number of segments is missing")
        try:
            path = _family([precision, *rest[1:]]).at(int(rest[0]))
        except ValueError as error:
            raise _misnamed("path", name, str(error)) from error
        if path.name != name:
            raise _misnamed("path", name, f"did you mean {path.name!r}?")
        return path


def _family(parts: Sequence[str]) -> Family:
    """Of the parts of a name, which may be no canonical one."""
    precision, *unusual = parts
    focus = [part.removeprefix(_FOCUS) for part in unusual if part.startswith(_FOCUS)]
    levels = [part for part in unusual if not part.startswith(_FOCUS)]
    return Family(
        precision=precision,
        levels=levels[0] if levels else "all",
        focus_fraction=float(focus[0]) if focus else None,
    )


def _misnamed(what: str, name: str, why: str) -> ConfigError:
    segments = "/SEGMENTS" if what == "path" else ""
    return ConfigError(f"{name!r} names no {what} ({why}); write PRECISION{segments}[/LEVELS][/focus=FRACTION].")


@dataclass(frozen=True, slots=True, kw_only=True)
class PathSet:
    """The paths that a router chooses from, in order, each once.

    Args:
        paths: in any order.
        full: the reference that quality is measured against: one of them, the deepest of its family.

    Raises:
        ConfigError: a path stands twice, or `full` is not such a path.
    """

    paths: tuple[Path, ...]
    full: Path

    def __post_init__(self) -> None:
        """Check that paths are different and the reference is one of them."""
        twice = sorted({path.name for path in self.paths if self.paths.count(path) > 1})
        if twice:
            raise ConfigError(f"paths {', '.join(twice)} stand twice; name each once.")
        if self.full not in self.paths:
            raise ConfigError(f"full={self.full.name} is none of the paths: {', '.join(self.names)}. Add it.")
        deepest = self.families[self.full.family.name][-1]
        if self.full.segments < deepest:
            raise ConfigError(f"full={self.full.name} must be the deepest of its family, which has {deepest} segments.")

    @classmethod
    def parse(cls, names: Sequence[str], *, full: str) -> PathSet:
        """The set of the paths of these names; raises ConfigError as `Path.parse` and the set do."""
        return cls(paths=tuple(Path.parse(name) for name in names), full=Path.parse(full))

    def __iter__(self) -> Iterator[Path]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, name: str) -> Path:
        """The path of this name; raises ConfigError with the known names for any other."""
        for path in self.paths:
            if path.name == name:
                return path
        raise ConfigError(f"path {name!r} is not in this set; known: {', '.join(self.names)}.")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the paths, in order."""
        return tuple(path.name for path in self.paths)

    @property
    def families(self) -> dict[str, tuple[int, ...]]:
        """The depths of the paths of each family, rising, by its name. Each path is the start of every deeper one."""
        depths: dict[str, list[int]] = {}
        for path in self.paths:
            depths.setdefault(path.family.name, []).append(path.segments)
        return {name: tuple(sorted(found)) for name, found in depths.items()}
