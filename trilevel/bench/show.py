"""Tables of the cases for a person: rich tables from the rows of a report."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from trilevel.bench.harness import Bar, Report


def attention_tables(report: Report) -> list[Table]:
    """One table for each precision: milliseconds at every length, and how many times faster than dense that is."""
    return [
        _attention_table(report, precision)
        for precision in dict.fromkeys(row["precision"] for row in report.measurements)
    ]


def _attention_table(report: Report, precision: str) -> Table:
    rows = [row for row in report.measurements if row["precision"] == precision]
    lengths = list(dict.fromkeys(row["tokens"] for row in rows))
    table = Table(title=f"attention, {precision}: ms (times faster than dense SDPA)", title_justify="left")
    table.add_column("contender")
    for tokens in lengths:
        table.add_column(f"{tokens:,} tokens", justify="right")
    table.add_column("compared with")
    for name in dict.fromkeys(row["contender"] for row in rows):
        own = {row["tokens"]: row for row in rows if row["contender"] == name}
        ratios = [row for row in own.values() if "this_over_ours" in row]
        against = f"{ratios[-1]['compared_with']} ({ratios[-1]['this_over_ours']:.1f}x ours)" if ratios else ""
        table.add_row(name, *(_cell(own[tokens]) if tokens in own else "" for tokens in lengths), against)
    return table


def _cell(row: dict[str, Any]) -> str:
    if row["status"] != "measured":
        return f"{row['status']}: {row['reason']}"
    ratio = row.get("dense_over_this")
    memory = row.get("peak_memory_bytes")
    text = f"{row['median_ms']:,.2f}" + (f" ({ratio:.1f}x)" if ratio else "")
    return text if memory is None else f"{text}, {memory / 2**20:,.0f} MiB"


def gpu_table(report: Report) -> Table:
    """Microseconds of each contender on the GPU, or why there are none."""
    table = Table(title="attention on a GPU", title_justify="left")
    for column in ("contender", "us", "times faster than dense", "times ours", "what is inside"):
        table.add_column(column, justify="left" if column in ("contender", "what is inside") else "right")
    for row in report.rows:
        checked = f"checked, error {row['error']:.1e}" if "error" in row else row["status"]
        state = checked if row["status"] == "measured" else f"{row['status']}: {row['reason']}"
        ratios = (f"{row[name]:.1f}" if name in row else "" for name in ("dense_over_this", "this_over_ours"))
        time = f"{1e3 * row['median_ms']:,.1f}" if "median_ms" in row else state
        table.add_row(row["contender"], time, *ratios, row["scope"])
    return table


def levels_table(report: Report) -> Table:
    """Accuracy of each variant of the levels on each task."""
    table = Table(title="accuracy in per cent: mean (lowest to highest seed)", title_justify="left")
    tasks = list(dict.fromkeys(row["task"] for row in report.rows))
    table.add_column("variant")
    for task in tasks:
        table.add_column(task, justify="right")
    for variant in dict.fromkeys(row["variant"] for row in report.rows):
        found = {row["task"]: row for row in report.rows if row["variant"] == variant}
        cells = (found.get(task) for task in tasks)
        table.add_row(
            variant,
            *(
                f"{row['accuracy_percent']:.1f} ({row['lowest']:.1f} to {row['highest']:.1f})" if row else "-"
                for row in cells
            ),
        )
    return table


def listops_table(report: Report) -> Table:
    """Accuracy of each variant on ListOps beside the published ones."""
    table = Table(title="ListOps, test accuracy in per cent", title_justify="left")
    table.add_column("variant")
    table.add_column("accuracy", justify="right")
    for row in report.rows:
        table.add_row(row["variant"], f"{row['accuracy_percent']:.1f}")
    return table


def calibrate_table(report: Report) -> Table:
    """Measured and predicted milliseconds at every point, and what `impl="auto"` loses where it chooses."""
    table = Table(title="cost model", title_justify="left")
    left = ("implementation", "variant", "precision")
    for column in (*left, "tokens", "heads x dim", "measured ms", "predicted ms", "off by", "auto / best"):
        table.add_column(column, justify="left" if column in left else "right")
    for row in report.measurements:
        start = (row["impl"], row["variant"], row["precision"], f"{row['tokens']:,}", f"{row['heads']} x {row['dim']}")
        if row["status"] != "measured":
            table.add_row(*start, row["status"])
            continue
        loss = f"{row['auto_over_best']:.2f}" if "auto_over_best" in row else ""
        times = (f"{row[name]:,.3f}" for name in ("measured_ms", "predicted_ms"))
        table.add_row(*start, *times, f"{row['relative_error']:+.0%}", loss)
    return table


def bars_table(bars: list[Bar]) -> Table:
    """Every bar with its value."""
    table = Table(title="bars", title_justify="left")
    for column in ("name", "value", "bar", "holds"):
        table.add_column(column, justify="left" if column == "name" else "right")
    for bar in bars:
        value = "not measured" if bar.value is None else f"{bar.value:.3g}"
        table.add_row(bar.name, value, f"{bar.op} {bar.bar:g}", "yes" if bar.holds else "[red]no[/red]")
    return table
