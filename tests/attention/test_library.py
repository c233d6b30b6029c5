"""The library of native kernels: which one is chosen, which name is refused, and what is said when there is none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from trilevel.attention import library
from trilevel.attention.native import build
from trilevel.errors import ImplementationError

built_here = pytest.mark.skipif(not library.built(), reason=f"no native library is built: {build.AGAIN}")


@pytest.fixture(autouse=True)
def unnamed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No instruction set is named, and what a test loads from elsewhere is forgotten."""
    monkeypatch.delenv("TRILEVEL_ISA", raising=False)
    yield
    library.load.cache_clear()
    library._choices.clear()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    return tmp_path


def put(folder: Path, *isas: str) -> None:
    """The baseline's library under other names: it loads anywhere."""
    for isa in isas:
        source = build.LIB / build.library_name(build.BASELINE)
        (folder / build.library_name(isa)).write_bytes(source.read_bytes())


@built_here
def test_the_best_that_runs_is_active() -> None:
    wanted = next(isa for isa in library.built() if library.runs(isa))
    assert library.active_isa() == wanted
    assert library.is_available()
    assert library.library() is library.library()
    status = library.status()
    assert (status.active, status.built) == (wanted, library.built())
    for better in library.built()[: library.built().index(wanted)]:
        assert f"{better}: not run by this processor" in status.reason


@built_here
def test_what_runs_agrees_with_the_kernel() -> None:
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), None)
    if flags is None:
        pytest.skip("no x86 flags in /proc/cpuinfo")
    wanted = {
        "amx": {"amx_tile", "amx_bf16"},
        "avx512_bf16": {"avx512_bf16"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
        "avx2": {"avx2", "fma", "f16c"},
        "portable": set[str](),
    }
    for isa, needed in wanted.items():
        # the kernel may still refuse to hand out tiles
        assert library.runs(isa) <= (needed <= set(flags.split())), isa
        assert isa == "amx" or library.runs(isa) == (needed <= set(flags.split())), isa
    assert not library.runs("neon")
    assert not library.runs("")


@built_here
@pytest.mark.parametrize("isa", dict.fromkeys([*build.TARGETS, "portable"]))
def test_a_name_is_taken_or_refused_never_replaced(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRILEVEL_ISA", isa)
    real = build.BASELINE if isa == "portable" else isa
    if real in library.built() and library.runs(real):
        assert library.active_isa() == real
        assert library.status().reason == f"named by TRILEVEL_ISA={isa}"
    else:
        with pytest.raises(
            ImplementationError, match=f"TRILEVEL_ISA='{isa}' is not .*These work here: .*{build.BASELINE}"
        ):
            library.library()
        assert library.status().active is None


@built_here
def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRILEVEL_ISA", "sse9")
    with pytest.raises(ImplementationError, match=r"'sse9' is not known .* unset TRILEVEL_ISA to take the best"):
        library.active_isa()
    assert not library.is_available()


def test_an_empty_name_names_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = library.status()
    monkeypatch.setenv("TRILEVEL_ISA", "")
    assert library.status() == plain


@built_here
def test_a_name_that_is_not_built_is_refused(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [isa for isa in build.TARGETS if isa != build.BASELINE]
    if not others:
        pytest.skip("this kind of processor has one instruction set")
    put(elsewhere, build.BASELINE)
    (elsewhere / build.RECORD).write_text(f"{others[0]}: left out, cc does not know -mnew\n")
    monkeypatch.setenv("TRILEVEL_ISA", others[0])
    with pytest.raises(ImplementationError, match=r"is not built \(left out, cc does not know -mnew\)"):
        library.library()


@built_here
def test_a_name_that_the_processor_lacks_is_refused(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(elsewhere, *build.TARGETS)
    monkeypatch.setattr(library, "runs", lambda isa: isa == build.BASELINE)
    assert library.active_isa() == build.BASELINE
    for isa in build.TARGETS:
        if isa != build.BASELINE:
            monkeypatch.setenv("TRILEVEL_ISA", isa)
            with pytest.raises(ImplementationError, match=f"not run by this processor.*work here: {build.BASELINE}"):
                library.library()


@built_here
def test_a_better_one_that_was_not_built_is_the_reason(elsewhere: Path) -> None:
    put(elsewhere, build.BASELINE)
    (elsewhere / build.RECORD).write_text("avx2: failed at compiling kernels.cpp: error: no\nthreads: one only\n")
    status = library.status()
    assert status.active == build.BASELINE
    assert status.reason.endswith("threads: one only")
    assert "avx2" not in build.TARGETS or "avx2: failed at compiling kernels.cpp: error: no" in status.reason


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (None, "it was never built"),
        (
            "none: failed at finding a C++ compiler: looked for g++\n",
            "failed at finding a C++ compiler: looked for g++",
        ),
        ("compiler: g++ 3\nportable: failed at compiling kernels.cpp: error: x\n", "portable: failed at compiling"),
    ],
)
def test_without_any_library(elsewhere: Path, record: str | None, said: str) -> None:
    if record is not None:
        (elsewhere / build.RECORD).write_text(record)
    with pytest.raises(ImplementationError, match="has no library") as caught:
        library.library()
    assert said in str(caught.value)
    assert build.AGAIN in str(caught.value)
    assert not library.is_available()
    assert library.status() == library.NativeStatus(None, (), str(caught.value))


@pytest.mark.skipif(len(build.TARGETS) == 1, reason="this kind of processor has one instruction set")
def test_only_libraries_that_do_not_run_here(elsewhere: Path) -> None:
    (elsewhere / build.library_name(next(iter(build.TARGETS)))).write_bytes(b"")
    with pytest.raises(ImplementationError, match=f"runs none of them. Build the one for {build.BASELINE}"):
        library.library()


def test_a_damaged_library(elsewhere: Path) -> None:
    (elsewhere / build.library_name(build.BASELINE)).write_bytes(b"no library")
    with pytest.raises(ImplementationError, match=r"cannot be loaded .*Build it anew: python -m"):
        library.library()
    assert not library.is_available()


@built_here
def test_a_library_of_another_interface(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(elsewhere, build.BASELINE)
    monkeypatch.setattr(library, "ABI_VERSION", 97)
    with pytest.raises(ImplementationError, match=r"has interface \d+, this trilevel needs 97. Build it anew"):
        library.library()


@built_here
def test_threads_get_one_library(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(elsewhere, build.BASELINE)
    calls = []
    best = library._best

    def counted() -> library._Choice:
        calls.append("best")
        return best()

    monkeypatch.setattr(library, "_best", counted)
    barrier = Barrier(8)

    def get(_: int) -> int:
        barrier.wait()
        return id(library.library())

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(get, range(8)))) == 1
    assert len(calls) == 1


@built_here
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists what is mapped")
def test_one_pool_of_threads_with_torch() -> None:
    code = """
from pathlib import Path
from trilevel.attention.library import library
library()
print({line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "gomp" in line})
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.count("gomp.so") == found.count("gomp") == 1, found
