"""Entry point of the build; all there is to say about the Python packages is in pyproject.toml.

The C++ and the CUDA kernels are compiled here where torch and their compilers can be found, which
an isolated build cannot: then nothing is compiled, and `python -m geot_kernels build` does it
later from the sources in the wheel. GEOT_KERNELS_CPU=0 compiles no C++, GEOT_KERNELS_CPU=1
insists; GEOT_KERNELS_CUDA likewise. Where nobody insists, CUDA that fails to compile is left out.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("geot_build", ROOT / "geot_kernels" / "build.py")
builder = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(builder)


def why_not(kind: str) -> str | None:
    """Says why a kind of kernels is not to be compiled; None where it is."""
    try:
        wanted = builder.wanted(kind)
    except builder.BuildError as error:
        sys.exit(str(error))
    variable = builder.variable(kind)
    if wanted is False:
        return f"{variable}=0"
    reason = builder.why_not(kind)
    if reason and wanted:
        name = builder.KINDS[kind]
        sys.exit(f"{variable}=1, but the {name} kernels cannot be compiled: {reason}")
    return reason


def extension(kind: str) -> Extension:
    """A library as setuptools sees it: the wheel is of this platform where there is one."""
    sources = [path for path in (ROOT / "csrc" / kind).iterdir() if path.suffix in (".cpp", ".cu")]
    return Extension(
        f"geot_kernels.libgeot_{kind}",
        sorted(path.relative_to(ROOT).as_posix() for path in sources),
        optional=kind == "cuda" and not builder.wanted(kind),
    )


WHY_NOT = {kind: why_not(kind) for kind in builder.KINDS}


def say_what_is_missing() -> None:
    """Says of each kind that is not to be compiled why."""
    for kind, reason in WHY_NOT.items():
        if reason:
            print(
                f"geot-kernels: the {builder.KINDS[kind]} kernels are not compiled ({reason}); "
                "`python -m geot_kernels build` does it later"
            )


class BuildPython(build_py):
    """Copies the packages, and csrc into one of them."""

    def run(self) -> None:
        """Says so, too, where kernels are not compiled."""
        super().run()
        say_what_is_missing()
        if not self.editable_mode:
            target = Path(self.build_lib, "geot_kernels", "csrc")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target, ignore=shutil.ignore_patterns(".*"))


class BuildLibraries(build_ext):
    """Compiles the libraries, which have nothing of Python in them nor in their names."""

    def run(self) -> None:
        """Runs in every build that compiles, and where it is called by its name."""
        say_what_is_missing()
        for kind in builder.KINDS:  # of an earlier build
            Path(self.build_lib, "geot_kernels", builder.library_name(kind)).unlink(True)
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        """Names the file as the package looks for it."""
        kind = fullname.rpartition("_")[2]
        return str(Path(*fullname.split(".")[:-1], builder.library_name(kind)))

    def build_extension(self, ext: Extension) -> None:
        """Compiles one; the installation fails with the compiler's message, or goes on without."""
        kind = ext.name.rpartition("_")[2]
        destination = Path(self.get_ext_fullpath(ext.name)).parent
        try:
            library = builder.build(destination, kind, work=ROOT / "build" / kind)
        except builder.BuildError as error:
            if ext.optional:
                raise CompileError(f"the CUDA kernels are not compiled:\n{error}") from None
            name, variable = builder.KINDS[kind], builder.variable(kind)
            sys.exit(f"geot-kernels: {error}\n{variable}=0 installs without {name} kernels.")
        print(f"geot-kernels: {library.name} is compiled")


class Wheel(bdist_wheel):
    """Tags the wheel for the platform alone: one library serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python tag, ABI tag, platform tag."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[extension(kind) for kind, reason in WHY_NOT.items() if not reason],
    cmdclass={"build_py": BuildPython, "build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
