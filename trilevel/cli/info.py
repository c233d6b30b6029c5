"""`trilevel info`: what this machine can do and which parts of trilevel are installed; or what an artifact is."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer


def info(
    artifact: Annotated[
        Path | None, typer.Argument(help="Folder that `trilevel export` wrote; shown in place of the machine.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Show what this machine can do: versions, instruction sets, memory, extras.

    An extra is complete when each package it names is installed; for the others the missing packages are named. Of an
    artifact: its manifest, sizes, precision and levels; the hash of every file is compared.
    """
    if artifact is not None:
        from trilevel.cli.info_artifact import show

        show(artifact, as_json=as_json)
        return
    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        _print_tables(facts)


def collect() -> dict[str, Any]:
    """All facts as one JSON-able document: `machine`, `extras`, `implementations`, `native`, `data`, `trilevel`."""
    import trilevel
    from trilevel.attention import library
    from trilevel.attention.api import IMPLEMENTATIONS
    from trilevel.report.machine import machine_block

    return {
        "trilevel": trilevel.__version__,
        "machine": machine_block(),
        "implementations": sorted(IMPLEMENTATIONS),
        "native": dataclasses.asdict(library.status()),
        "extras": extras(),
        "data": os.environ.get("TRILEVEL_DATA"),
    }


def extras() -> dict[str, list[str]]:
    """The missing packages of each extra, in the order of their names; an empty list is a complete extra.

    Reads the metadata of the installed package, so pyproject.toml stays the only place that lists them; empty when
    trilevel runs from a folder without having been installed.
    """
    try:
        lines = importlib.metadata.requires("trilevel") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    pairs = [(_name(line), match.group(1)) for line in lines if (match := re.search(r"extra == ['\"](.+?)['\"]", line))]
    missing: dict[str, list[str]] = {extra: [] for _, extra in sorted(pairs, key=lambda pair: pair[1])}
    for package, extra in pairs:
        if package != "trilevel" and not _is_installed(package):
            missing[extra].append(package)
    return missing


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    return match.group() if match else requirement


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def speeds(isa: list[str]) -> str:
    """The instruction sets that decide how fast attention can be, absent ones said to be absent."""
    names = {"AVX2": ["avx2"], "AVX-512": ["avx512f"], "AMX": ["amx_tile"], "NEON": ["asimd"]}
    names["bf16"] = ["avx512_bf16", "amx_bf16", "bf16"]
    return ", ".join(f"{name} {'yes' if set(flags) & set(isa) else 'no'}" for name, flags in names.items())


def kernels(native: dict[str, Any]) -> str:
    """Which native kernels attention runs, which others are built, and why."""
    active = native["active"] or "none"
    built = ", ".join(native["built"]) or "none"
    return f"{active} ({native['reason'].rstrip('.')}); built: {built}"


def _machine_rows(facts: dict[str, Any]) -> dict[str, str]:
    machine = facts["machine"]
    memory = machine["memory_bytes"]
    return {
        "trilevel": facts["trilevel"],
        **{name: version for name, version in machine["versions"].items() if name in ("python", "torch", "numpy")},
        "system": machine["system"],
        "CPU": f"{machine['cpu'] or 'unknown'}, {machine['cores']} cores, {machine['threads']} threads",
        "instruction sets": speeds(machine["isa"]),
        "memory": f"{memory / 2**30:.1f} GiB" if memory else "unknown",
        "GPU": machine["gpu"] or "none",
        "attention implementations": ", ".join(facts["implementations"]),
        "native kernels": kernels(facts["native"]),
        "TRILEVEL_DATA": facts["data"] or "not set",
    }


def _print_tables(facts: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    machine = Table(title="machine", title_justify="left", show_header=False, box=box.SIMPLE)
    for name, value in _machine_rows(facts).items():
        machine.add_row(name, escape(value))
    console.print(machine)
    parts = Table(title="extras", title_justify="left", show_header=False, box=box.SIMPLE)
    for extra, missing in facts["extras"].items():
        state = f"lacks {', '.join(missing)}: pip install 'trilevel[{extra}]'" if missing else "installed"
        parts.add_row(extra, escape(state))
    console.print(parts if facts["extras"] else "extras: unknown, because trilevel is not installed (pip install -e .)")
