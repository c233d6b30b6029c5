"""Build the native kernels while setuptools builds the package; all else stands in pyproject.toml."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

NATIVE = Path("trilevel", "attention", "native")


def _builder() -> ModuleType:
    """The module that builds, loaded by its path because importing the package needs torch."""
    spec = importlib.util.spec_from_file_location("trilevel_native_build", Path(__file__).parent / NATIVE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildNative(Command):
    """Compile into the build folder, or beside the sources for an editable install."""

    description = "compile the native kernels"
    user_options = []  # noqa: RUF012 - setuptools wants a list here

    def initialize_options(self) -> None:
        """Start from nothing."""
        self.build_lib: str | None = None
        self.editable_mode = False
        self.built: list[str] = []

    def finalize_options(self) -> None:
        """Take the build folder from `build`."""
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        """Compile; a failure is told and recorded, not raised, unless TRILEVEL_BUILD=require."""
        root = Path(__file__).parent if self.editable_mode else Path(self.build_lib or "")
        self.built = _builder().build(root / NATIVE / "lib")

    def get_source_files(self) -> list[str]:
        """What the libraries are compiled from."""
        return [str(file) for pattern in ("*.h", "*.cpp") for file in sorted(NATIVE.glob(pattern))]


class Build(build):
    """The standard build, and the native kernels."""

    sub_commands = [*build.sub_commands, ("build_native", None)]  # noqa: RUF012 - setuptools wants a list here

    def run(self) -> None:
        """Start from an empty folder, so that nothing of an earlier build ends up in a wheel."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BinaryDistribution(Distribution):
    """A distribution that may hold libraries of a platform."""

    def has_ext_modules(self) -> bool:
        """Installed where libraries belong."""
        return True


class PlatformWheel(bdist_wheel):
    """A wheel for any Python: of this platform when libraries were built, of any platform otherwise."""

    def get_tag(self) -> tuple[str, str, str]:
        """Tag by what was built."""
        built = self.get_finalized_command("build_native").built
        return "py3", "none", super().get_tag()[2] if built else "any"


setup(
    distclass=BinaryDistribution,
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": PlatformWheel},
)
