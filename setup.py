"""Entry point of the build; all there is to say about the Python packages is in pyproject.toml.

The C++ kernels are compiled here where torch and a compiler can be found, which an isolated build
cannot: then nothing is compiled, and `python -m geot_kernels build` does it later from the
sources in the wheel. GEOT_KERNELS_CPU=0 compiles nothing, GEOT_KERNELS_CPU=1 insists.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("geot_build", ROOT / "geot_kernels" / "build.py")
builder = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(builder)


def why_not() -> str | None:
    """Says why nothing is to be compiled; None where the kernels are."""
    wanted = os.environ.get("GEOT_KERNELS_CPU", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"GEOT_KERNELS_CPU: expected 0 or 1, got {wanted!r}")
    if wanted == "0":
        return "GEOT_KERNELS_CPU=0"
    reason = builder.why_not()
    if reason and wanted:
        sys.exit(f"GEOT_KERNELS_CPU=1, but the C++ kernels cannot be compiled: {reason}")
    return reason


WHY_NOT = why_not()
NOT_COMPILED = (
    f"geot-kernels: the C++ kernels are not compiled ({WHY_NOT}); "
    "`python -m geot_kernels build` does it later"
)
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc/cpu").glob("*.cpp"))


class BuildPython(build_py):
    """Copies the packages, and csrc into one of them."""

    def run(self) -> None:
        """Says so, too, where the kernels are not compiled."""
        super().run()
        if WHY_NOT:
            print(NOT_COMPILED)
        if not self.editable_mode:
            target = Path(self.build_lib, "geot_kernels", "csrc")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target, ignore=shutil.ignore_patterns(".*"))


class BuildLibrary(build_ext):
    """Compiles the library, which has nothing of Python in it nor in its name."""

    def run(self) -> None:
        """Runs in every build that compiles, and where it is called by its name."""
        if WHY_NOT:
            print(NOT_COMPILED)
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        """Names the file as the package looks for it."""
        return str(Path(*fullname.split(".")[:-1], builder.library_name()))

    def build_extension(self, ext: Extension) -> None:
        """Compiles it; where the compiler refuses, the installation fails with its message."""
        destination = Path(self.get_ext_fullpath(ext.name)).parent
        try:
            library = builder.build(destination, work=ROOT / "build" / "cpu")
        except builder.BuildError as error:
            sys.exit(f"geot-kernels: {error}\nGEOT_KERNELS_CPU=0 installs without C++ kernels.")
        print(f"geot-kernels: {library.name} is compiled")


class Wheel(bdist_wheel):
    """Tags the wheel for the platform alone: one library serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python tag, ABI tag, platform tag."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[] if WHY_NOT else [Extension("geot_kernels.libgeot_cpu", SOURCES)],
    cmdclass={"build_py": BuildPython, "build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
