"""`docs/levels.md` and its picture, from the report of `trilevel bench levels`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trilevel.bench.harness import Report
from trilevel.errors import InputError, require

TASKS = {
    "recall": "Key-value recall: 64 tokens, one (key, value) token hidden in each of four regions, the last token asks "
    "for one of the keys; chance is 16.7%.",
    "majority": "Region majority: 128 tokens in four regions, the first token of each says which symbol its region has "
    "most often; chance is 25%.",
}


def write_docs(report: Report, folder: Path) -> None:
    """Write `levels.md` and `img/levels.png` into a folder.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        (folder / "img").mkdir(parents=True, exist_ok=True)
        (folder / "levels.md").write_text(page(report), encoding="utf-8")
        picture(report, folder / "img" / "levels.png")
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}). Give --docs a writable folder.") from error


def page(report: Report) -> str:
    """The page as markdown: the question, the tasks, the table, the bars."""
    settings = report.settings
    sizes = " and ".join(f"{size} ({task})" for task, size in settings["region_size"].items())
    setting = (
        f"An encoder of {settings['layers']} layers, width {settings['dim']}, {settings['heads']} heads, window "
        f"{settings['window']}, regions of {sizes} tokens, {settings['num_global_tokens']} global tokens, "
        f"trained from scratch with {len(settings['seeds'])} seeds; {settings['test_samples']:,} fresh test samples. A "
        f"run ends early once it is perfect; pooling weights learn {settings['pool_rate']:g} times as fast as others. "
        "Heads of a level that is left out go to the others in proportion; every calibrated head keeps its window and "
        "sees the rest at least as one remainder entry, local ones included."
    )
    lines = [
        "# Do the levels earn their place?",
        "",
        "Written by `trilevel bench levels --docs docs`; the numbers are in `benchmarks/results/levels.json`.",
        "",
        *(f"- {TASKS[task]}" for task in dict.fromkeys(row["task"] for row in report.rows)),
        "",
        setting,
        "",
        *_table(report.rows),
        "",
        "![accuracy of every variant](img/levels.png)",
        "",
        "| bar | points | wanted | holds |",
        "|---|---:|---:|---|",
    ]
    for bar in report.bars:
        value = "not measured" if bar.value is None else f"{bar.value:.2f}"
        lines.append(f"| `{bar.name}` | {value} | {bar.op} {bar.bar:g} | {'yes' if bar.holds else 'no'} |")
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    found = {(row["task"], row["variant"]): row for row in rows}
    heads = " | ".join(f"{task} % | steps" for task in tasks)
    lines = [f"| variant | {heads} |", "|---|" + "---:|---:|" * len(tasks)]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells = []
        for task in tasks:
            row = found[task, variant]
            cells.append(f"{row['accuracy_percent']:.1f} ({row['lowest']:.1f}-{row['highest']:.1f}) | {row['steps']}")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return lines


def picture(report: Report, path: Path) -> None:
    """Bars of the mean accuracy, one dot for each seed, one panel for each task."""
    matplotlib = require("matplotlib", extra="report")
    matplotlib.use("agg")
    pyplot = require("matplotlib.pyplot", extra="report")
    tasks = list(dict.fromkeys(row["task"] for row in report.rows))
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(5 * len(tasks), 3.2), squeeze=False, layout="constrained")
    for panel, task in zip(panels[0], tasks, strict=True):
        rows = [row for row in report.rows if row["task"] == task]
        names = [row["variant"] for row in rows]
        panel.barh(names, [row["accuracy_percent"] for row in rows], color="#7a9cc6")
        for place, row in enumerate(rows):
            panel.plot(row["by_seed"], [place] * len(row["by_seed"]), "o", color="#1b2a41", markersize=3)
        panel.invert_yaxis()
        panel.set(title=task, xlabel="accuracy %", xlim=(0, 101))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
