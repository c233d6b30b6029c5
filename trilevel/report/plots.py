"""Pictures of the report as inline SVG: they take the page's font and text colour, in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

from trilevel.errors import require
from trilevel.report.content import Contender, HeadClass, LevelMap

COLOURS: dict[HeadClass, str] = {"local": "#3b82d6", "regional": "#149c78", "global": "#dd6b20"}
SMALLEST_MASS = 1e-3
"""Share of attention that is drawn clear; the scale is logarithmic from here to 1."""

# stands for the colour of the page's text until the SVG is written
_TEXT = "#010203"
_FAINT = 0.35


def level_map(shown: LevelMap) -> str:
    """One level map: rows are queries, columns positions, both from the start of the document to its end."""
    figure, axes = _figure(3.0, 2.6)
    colours = require("matplotlib.colors", extra="report")
    colour = COLOURS[shown.head_class]
    # from clear to the class's colour, so that the page shows through in either scheme
    shades = colours.LinearSegmentedColormap.from_list(shown.head_class, [(colour + "00"), (colour + "ff")])
    axes.imshow(
        shown.mass,
        norm=colours.LogNorm(vmin=SMALLEST_MASS, vmax=1.0, clip=True),
        cmap=shades,
        aspect="auto",
        interpolation="nearest",
        extent=(0, 100, 100, 0),
    )
    axes.set_xlabel("read from (% of the document)")
    axes.set_ylabel(f"{shown.element} at (%)")
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_yticks([0, 25, 50, 75, 100])
    return _svg(figure, re.sub(r"\W+", "-", f"map-{shown.layer}-{shown.head_class}"))


def bars(contenders: Sequence[Contender], measure: str) -> str:
    """Horizontal bars of `seconds` or `memory`; contenders without that figure are left out."""
    rows = [(c, value) for c in contenders if (value := _value(c, measure)) is not None]
    figure, axes = _figure(4.6, 0.55 + 0.36 * max(1, len(rows)))
    unit = "seconds" if measure == "seconds" else "MiB above the empty process"
    colours = [COLOURS["local"] if c.name.startswith("trilevel") else "#8a93a3" for c, _ in rows]
    places = range(len(rows))
    axes.barh(places, [value for _, value in rows], color=colours, height=0.62)
    axes.set_yticks(list(places), [shorten(c.label, 30, placeholder="…") for c, _ in rows])
    for label in axes.get_yticklabels():
        # a name is no formula, whatever signs are in it
        label.set_parse_math(False)
    axes.invert_yaxis()
    largest = max([value for _, value in rows], default=1.0)
    axes.set_xlim(0, 1.2 * largest or 1.0)
    axes.set_xlabel(unit)
    for place, (_, value) in enumerate(rows):
        text = f"{value:.2f}" if measure == "seconds" else f"{value:,.0f}"
        axes.text(value + 0.012 * largest, place, text, va="center", color=_TEXT, fontsize=9)
    return _svg(figure, f"bars-{measure}")


def time_and_loss(rows: Sequence[Mapping[str, Any]]) -> str:
    """Ways to run a model: milliseconds of the first batch size across, loss upwards, proved ones filled.

    A name that would cover another is left out; the way of ours, fixed paths and the oracle come before
    other models and rivals.
    """
    figure, axes = _figure(6.4, 3.6)
    kinds = {"dynamic": COLOURS["local"], "fixed": "#8a93a3", "oracle": COLOURS["regional"]}
    first = [*kinds, "static", "random", "rival"]
    ranked = sorted(rows, key=lambda row: first.index(row["kind"]))
    for row in reversed(ranked):
        colour = kinds.get(row["kind"], COLOURS["global"])
        axes.plot(_ms(row), row["loss"], "o", ms=7, mec=colour, mfc=colour if row["is_proved"] else "none")
    axes.set_xlim(left=0)
    figure.draw_without_rendering()
    taken: list[Any] = []
    for row in ranked:
        label = axes.annotate(
            row["name"], (_ms(row), row["loss"]), xytext=(6, 4), textcoords="offset points", color=_TEXT, fontsize=8
        )
        box = label.get_window_extent()
        if any(box.overlaps(other) for other in taken):
            label.remove()
        else:
            taken.append(box)
    axes.set_xlabel("milliseconds of a sample; filled: proved")
    axes.set_ylabel("loss")
    return _svg(figure, "time-and-loss")


def _ms(row: Mapping[str, Any]) -> float:
    ms: float = next(iter(row["ms"].values()))
    return ms


def _value(contender: Contender, measure: str) -> float | None:
    if measure == "seconds":
        return contender.seconds
    peak = contender.peak_memory_bytes
    return None if peak is None else peak / 2**20


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # the object interface: no global state, no window system
    figure = require("matplotlib.figure", extra="report").Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    figure.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_TEXT)
        spine.set_alpha(_FAINT)
    axes.tick_params(colors=_TEXT, labelsize=9, width=0.6, length=3)
    axes.xaxis.label.set(color=_TEXT, fontsize=9)
    axes.yaxis.label.set(color=_TEXT, fontsize=9)
    return figure, axes


def _svg(figure: Any, name: str) -> str:
    """The figure as one `<svg>` element; the same figure gives the same text."""
    matplotlib = require("matplotlib", extra="report")
    stream = io.StringIO()
    # text stays text; ids of two figures on a page never meet
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "svg.id": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(_TEXT, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # the page sets the family and the width
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    return re.sub(
        r'(<svg[^>]*?) width="[\d.]+pt"', r"\1", re.sub(r'(<svg[^>]*?) height="[\d.]+pt"', r"\1", svg, count=1), count=1
    )
