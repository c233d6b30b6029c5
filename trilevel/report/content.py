"""What the report of a summarised document shows, as plain values: the report knows no application."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

HeadClass = Literal["local", "regional", "global"]
UnitKind = Literal["title", "heading", "sentence", "item"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One row of the table: what ran, on how many tokens, and what it cost.

    `seconds` is the median of `runs` forward passes, `peak_memory_bytes` the peak above the empty process; None was not
    measured, and `note` says why.
    """

    name: str
    label: str
    tokens: int
    seconds: float | None
    runs: int
    peak_memory_bytes: int | None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A stretch of text; `reason` is why its token was global, empty for text like any other."""

    text: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitView:
    """A title, heading or sentence as the report shows it; `opens_paragraph` starts a new block of text."""

    pieces: tuple[Piece, ...]
    kind: UnitKind
    level: int = 0
    is_chosen: bool = False
    opens_paragraph: bool = True
    score: float | None = None

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalToken:
    """A token that was global in some layers: where it stands, and its score and prior in the layer named first."""

    text: str
    position: int
    layers: tuple[int, ...]
    score: float
    prior: float
    is_forced: bool

    @property
    def reason(self) -> str:
        """Why it was global, in words."""
        why = "forced" if self.is_forced else f"score {self.score:+.2f}, prior {self.prior:+.2f}"
        layers = ", ".join(str(layer) for layer in self.layers)
        return f"global in layer{'s' if len(self.layers) > 1 else ''} {layers}: {why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelMap:
    """Where the heads of one class in one layer look.

    `mass` (queries, bins): the share of attention that a query gives to each equal part of the document, mean over the
    heads; rows are queries spread evenly over the document, and sum to 1 (`strict`: at most 1). `layer` is its name on
    the page, `element` what it attends over.
    """

    layer: str
    element: str = "token"
    head_class: HeadClass
    num_heads: int
    sees: str
    mass: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportContent:
    """Everything on the page: `facts` are figures under the summary (name, value), `notes` stand under the table."""

    title: str
    source: str
    units: tuple[UnitView, ...]
    contenders: tuple[Contender, ...]
    facts: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    rouge: dict[str, float] | None = None
    abstract: str = ""
    global_tokens: tuple[GlobalToken, ...] = ()
    level_maps: tuple[LevelMap, ...] = ()
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def chosen(self) -> list[tuple[int, UnitView]]:
        """The summary: chosen units and their index, in document order."""
        return [(index, unit) for index, unit in enumerate(self.units) if unit.is_chosen]
