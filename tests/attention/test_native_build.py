"""Building the native kernels: what is built, what is left out, what is said; by compilers that do as told here."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from trilevel.attention.native import build

ROOT = Path(__file__).parents[2]
# refuses the flags named in REFUSED, fails on libraries named in BROKEN, notes each library in LOG
COMPILER = """#!/bin/sh
for word in $REFUSED; do case " $* " in *" $word "*) echo "error: unrecognized $word" >&2; exit 1;; esac; done
case "$*" in --version) echo "fakec++ 1.0"; exit 0;; *-fsyntax-only*) exit 0;; esac
for last; do :; done
for word in $BROKEN; do case "$last" in *_$word.so*) echo "kernels.cpp:7: error: no such thing" >&2; exit 1;; esac; done
echo "$last" >> "$LOG"
echo library > "$last"
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fake compiler's list of what it compiled."""
    compiler = tmp_path / "fakec++"
    compiler.write_text(COMPILER)
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    for name in ("REFUSED", "BROKEN", "TRILEVEL_BUILD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def record(folder: Path) -> dict[str, str]:
    return build.read_record(folder)


def libraries(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {build.RECORD}


def test_every_target_is_built_and_recorded(log: Path, tmp_path: Path) -> None:
    lib = tmp_path / "lib"
    assert build.build(lib) == list(build.TARGETS)
    assert libraries(lib) == {build.library_name(isa) for isa in build.TARGETS}
    assert record(lib)["compiler"] == "fakec++ 1.0"
    assert all(record(lib)[isa].startswith("built (") for isa in build.TARGETS)


def test_what_is_up_to_date_is_kept(log: Path, tmp_path: Path) -> None:
    lib = tmp_path / "lib"
    build.build(lib)
    first = log.read_text()
    build.build(lib)
    assert log.read_text() == first
    (lib / build.library_name(build.BASELINE)).unlink()
    build.build(lib)
    assert len(log.read_text().splitlines()) == len(build.TARGETS) + 1


def test_a_changed_source_is_built_anew(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(build.SOURCES, tmp_path / "sources", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    build.build(tmp_path / "lib")
    with (tmp_path / "sources" / "lanes.h").open("a") as file:
        file.write("// changed\n")
    build.build(tmp_path / "lib")
    assert len(log.read_text().splitlines()) == 2 * len(build.TARGETS)


@pytest.mark.skipif("avx2" not in build.TARGETS, reason="x86 only")
def test_flags_that_the_compiler_does_not_know(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSED", "-mamx-tile -mamx-bf16 -mavx512bf16")
    built = build.build(tmp_path / "lib")
    assert built == ["avx512", "avx2", "portable"]
    assert record(tmp_path / "lib")["amx"].endswith("does not know -mavx512bf16 -mamx-tile -mamx-bf16")
    assert record(tmp_path / "lib")["avx512_bf16"].startswith("left out, ")
    # to leave one out is no failure
    monkeypatch.setenv("TRILEVEL_BUILD", "require")
    assert build.build(tmp_path / "lib") == built


def test_a_compiler_without_openmp(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSED", build.THREADS)
    assert build.build(tmp_path / "lib") == list(build.TARGETS)
    assert record(tmp_path / "lib")["threads"].startswith("one only, ")


def test_a_failing_step_is_told_and_the_rest_built(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lib = tmp_path / "lib"
    build.build(lib)
    (lib / build.library_name(build.BASELINE)).unlink()
    monkeypatch.setenv("BROKEN", build.BASELINE)
    assert build.BASELINE not in build.build(lib)
    assert record(lib)[build.BASELINE] == "failed at compiling kernels.cpp: kernels.cpp:7: error: no such thing"
    assert build.library_name(build.BASELINE) not in libraries(lib)
    said = capsys.readouterr().err
    assert f"{build.BASELINE}: failed at compiling" in said
    assert f"works without it, slower; to try again: {build.AGAIN}" in said
    monkeypatch.setenv("TRILEVEL_BUILD", "require")
    with pytest.raises(build.BuildError, match=r"failed at compiling .* Set TRILEVEL_BUILD=0 to go on without them"):
        build.build(lib)


def test_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TRILEVEL_BUILD", "1")
    assert build.build(tmp_path / "lib") == []
    wanted = "failed at finding a C++ compiler: looked for g++, clang++ and c++"
    assert record(tmp_path / "lib") == {"none": wanted}
    assert wanted in capsys.readouterr().err
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    monkeypatch.setenv("TRILEVEL_BUILD", "require")
    with pytest.raises(build.BuildError, match="looked for CXX=no-such-compiler"):
        build.build(tmp_path / "lib")


def test_nothing_is_built_on_request(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lib = tmp_path / "lib"
    build.build(lib)
    (lib / "other.so").write_bytes(b"")
    monkeypatch.setenv("TRILEVEL_BUILD", "0")
    assert build.build(lib) == []
    assert libraries(lib) == {"other.so"}
    assert record(lib) == {"none": "not built: TRILEVEL_BUILD=0 was set"}


def test_an_unknown_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRILEVEL_BUILD", "maybe")
    with pytest.raises(build.BuildError, match="TRILEVEL_BUILD='maybe' is unknown; use 0"):
        build.build(tmp_path)


def test_the_command_says_what_was_built(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build.build, "__defaults__", (tmp_path / "lib",))
    assert build.main() == 0
    assert f"built: {', '.join(build.TARGETS)}" in capsys.readouterr().err
    monkeypatch.setenv("TRILEVEL_BUILD", "never")
    assert build.main() == 2
    assert "TRILEVEL_BUILD='never' is unknown" in capsys.readouterr().err


@pytest.mark.parametrize("is_built", [True, False], ids=["built", "not_built"])
def test_the_wheel(is_built: bool, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any Python; of this platform when libraries are in it. Sources are in it either way."""
    pytest.importorskip("setuptools", minversion="77.0.3", reason="builds without an isolated environment")
    monkeypatch.setenv("TRILEVEL_BUILD", "require" if is_built else "0")
    project = tmp_path / "project"
    project.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    # the shipped weights are of no interest here
    ignored = shutil.ignore_patterns("__pycache__", "applications")
    shutil.copytree(ROOT / "trilevel", project / "trilevel", ignore=ignored)
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=project, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert wheel.name.endswith("-any.whl") != is_built
    held = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if "/native/" in name}
    assert {"kernels.cpp", "abi.h", build.RECORD} <= held
    assert any(name.endswith("report.html") for name in zipfile.ZipFile(wheel).namelist())
    assert {name for name in held if name.endswith(".so")} == {
        build.library_name(isa) for isa in build.TARGETS if is_built
    }
