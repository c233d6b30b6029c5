"""Python with ONNX Runtime for aarch64, run by qemu's user emulation: Debian's packages and PyPI's wheels, unpacked."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.artifact.installed import cached, pip_install, run

ROOT = Path(__file__).parents[2]
# what Debian 12's Python needs; the names are those of its release
RELEASE, PYTHON = "bookworm", "3.11"
DEBS = [
    "libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libssl3", "libffi8", "libbz2-1.0", "liblzma5",
    "libsqlite3-0", "libuuid1", "libcrypt1", "libgomp1", "python3.11-minimal", "libpython3.11-minimal",
    "libpython3.11-stdlib", "python3.11",
]  # fmt: skip
# onnx, for the names of the kernels that run, asks for ml_dtypes and typing_extensions
WHEELS = ("numpy", "onnxruntime", "protobuf", "flatbuffers", "packaging", "onnx", "ml_dtypes", "typing_extensions")
GLIBC = ("2_17", "2_26", "2_27", "2_28", "2_31", "2_34", "2_35")
APT = ("-oAPT::Architecture=arm64", "-oAPT::Architectures=arm64", "-oDir::State::status=/dev/null")
BASE = "fp asimd evtstrm aes pmull sha1 sha2 crc32"
# a server's core with dot products of int8, and that of a Raspberry Pi 4, which has none
CPUS = {
    "neoverse-n1": ("0xd0c", f"{BASE} atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"),
    "cortex-a72": ("0xd08", f"{BASE} cpuid"),
}


@dataclass(frozen=True, slots=True)
class Emulated:
    """A Python that believes to run on one of `CPUS`."""

    emulator: str
    folder: Path
    cpu: str

    def run(self, code: str, *arguments: str) -> str:
        """What a program prints; it imports trilevel from this checkout."""
        libraries = ":".join(f"{self.folder / self.cpu}{place}/aarch64-linux-gnu" for place in ("/usr/lib", "/lib"))
        variables = {"PYTHONPATH": f"{self.folder / 'site'}:{ROOT}", "LD_LIBRARY_PATH": libraries}
        given = [part for name, value in variables.items() for part in ("-E", f"{name}={value}")]
        python = str(self.folder / self.cpu / "usr" / "bin" / f"python{PYTHON}")
        command = [self.emulator, "-cpu", self.cpu, "-L", str(self.folder / self.cpu), *given, python, "-B", "-c", code]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-4000:]}"
        return done.stdout


def emulated(cpu: str) -> Emulated:
    """The Python of a processor; the test is skipped where it cannot be had."""
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("needs qemu-aarch64: apt install qemu-user")
    versions = [f"{name}=={importlib.metadata.version(name)}" for name in WHEELS]
    name = f"aarch64-onnxruntime-{importlib.metadata.version('onnxruntime')}"
    return Emulated(emulator, cached(name, partial(_make, wheels=versions)), cpu)


def _make(folder: Path, wheels: list[str]) -> None:
    """One root for each processor: of `/proc/cpuinfo`, which libraries read, qemu shows the host's otherwise."""
    if RELEASE not in Path("/etc/os-release").read_text():
        raise OSError(f"its packages are those of Debian {RELEASE}")
    root = folder / next(iter(CPUS))
    root.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        # apt gives up its rights to a user who has to write here
        Path(scratch).chmod(0o777)
        (Path(scratch) / "lists" / "partial").mkdir(parents=True)
        options = (*APT, f"-oDir::State::Lists={scratch}/lists")
        run("apt-get", *options, "update")
        run("apt-get", *options, "download", *DEBS, folder=Path(scratch))
        for package in sorted(Path(scratch).glob("*.deb")):
            run("dpkg-deb", "-x", str(package), str(root))
    platforms = [f"--platform=manylinux_{version}_aarch64" for version in GLIBC]
    pip_install(folder / "site", wheels, f"--python-version={PYTHON}", "--implementation=cp", *platforms)
    for other in list(CPUS)[1:]:
        shutil.copytree(root, folder / other, symlinks=True)
    for name, (part, features) in CPUS.items():
        lines = {"processor": 0, "Features": features, "CPU implementer": "0x41", "CPU architecture": 8}
        lines |= {"CPU variant": "0x3", "CPU part": part, "CPU revision": 1}
        (folder / name / "proc").mkdir(exist_ok=True)
        (folder / name / "proc" / "cpuinfo").write_text("".join(f"{key}\t: {value}\n" for key, value in lines.items()))
