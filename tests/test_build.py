"""The build of the C++ kernels, on sources of a few lines; and where the library is looked for."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from geot_kernels import build
from geot_kernels.__main__ import main
from geot_kernels.backends import native

ROOT = Path(__file__).parents[1]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
NAMES = list(build.INSTRUCTION_SETS) if IS_X86 else ["baseline"]
# `wide` means the same to the linker wherever it is compiled: it keeps one copy for all.
WIDTH_H = """
#pragma once
#if defined(__AVX512F__)
#define WIDTH 512
#elif defined(__AVX2__)
#define WIDTH 256
#else
#define WIDTH 128
#endif
template <class T> __attribute__((noinline)) T wide() { return WIDTH; }
"""
WIDTH_CPP = """
#include "common/width.h"
namespace geot::GEOT_ISA {
int own() { return WIDTH; }
int shared() { return wide<int>(); }
}
"""
OPERATORS = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#define DECLARE(isa) namespace geot::isa { int own(); int shared(); }
DECLARE(baseline)
#ifdef GEOT_HAS_AVX2
DECLARE(avx2)
DECLARE(avx512)
#else
namespace geot { namespace avx2 = baseline; namespace avx512 = baseline; }
#endif
using namespace geot;
int64_t own(const torch::stable::Tensor&, int64_t i) {
  return i == 0 ? baseline::own() : i == 1 ? avx2::own() : avx512::own();
}
int64_t shared(const torch::stable::Tensor&, int64_t i) {
  return i == 0 ? baseline::shared() : i == 1 ? avx2::shared() : avx512::shared();
}
STABLE_TORCH_LIBRARY(geot_test_build, m) {
  m.def("own(Tensor x, int i) -> int");
  m.def("shared(Tensor x, int i) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(geot_test_build, CPU, m) {
  m.impl("own", TORCH_BOX(&own));
  m.impl("shared", TORCH_BOX(&shared));
}
"""


def write_sources(csrc: Path, **files: str) -> Path:
    """Writes a tree like csrc/ that compiles in a second; `files` replaces or adds to it."""
    texts = {"width_h": WIDTH_H, "width": WIDTH_CPP, "library": "", **files}
    for name, text in texts.items():
        stem, header = name.removesuffix("_h"), name.endswith("_h")
        path = csrc / ("common" if header else "cpu") / f"{stem}{'.h' if header else '.cpp'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return csrc


@pytest.fixture(autouse=True)
def _nothing_is_insisted_on(monkeypatch):
    for kind in build.KINDS:
        monkeypatch.delenv(build.variable(kind), raising=False)


@pytest.fixture
def csrc(tmp_path):
    """Sources without torch in a folder with an awkward name; skips where nothing compiles."""
    folder = write_sources(tmp_path / "a $folder: with spaces" / "csrc")
    if reason := build.why_not(csrc=folder):
        pytest.skip(f"the C++ kernels cannot be compiled: {reason}")
    return folder


@pytest.fixture
def package(csrc, monkeypatch, tmp_path):
    """Makes `geot_kernels` a package installed with the sources `csrc`, and its cache empty."""
    folder = csrc.parent / "geot_kernels"
    csrc.rename(folder.mkdir() or folder / "csrc")
    monkeypatch.setattr(build, "PACKAGE", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def times(work: Path) -> dict[str, int]:
    """When each object was written."""
    return {p.relative_to(work).as_posix(): p.stat().st_mtime_ns for p in work.rglob("*.o")}


# The library.


def test_instruction_sets_have_their_own_kernels_and_share_the_oldest_copy_of_the_rest(csrc):
    write_sources(csrc, library=OPERATORS)
    library = build.build(csrc.parent, csrc=csrc)
    torch.ops.load_library(library)
    x, operators = torch.ones(1), torch.ops.geot_test_build
    own, shared = ([op(x, i) for i in range(3)] for op in (operators.own, operators.shared))
    assert own == ([128, 256, 512] if IS_X86 else [128] * 3)
    assert shared == [128] * 3


def test_library_exports_nothing_and_needs_nothing_of_python(csrc):
    if not (tools := shutil.which("readelf")):
        pytest.skip("no readelf here")
    library = build.build(csrc.parent, csrc=write_sources(csrc, library=OPERATORS))
    symbols = subprocess.check_output([tools, "--dyn-syms", "--wide", library], text=True)
    defined = re.findall(r" (?:GLOBAL|WEAK|UNIQUE) +\w+ +(?!UND)\w+ (.+)", symbols)
    assert defined == []
    needed = subprocess.check_output([tools, "-d", library], text=True)
    assert "libtorch_cpu" in needed
    assert "python" not in needed


@pytest.mark.slow
def test_kernels_of_an_instruction_set_share_no_function_and_do_not_run_when_loaded(tmp_path):
    if reason := build.why_not() or (None if shutil.which("nm") else "no nm here"):
        pytest.skip(reason)
    work = ROOT / "build" / "cpu"  # up to date after `make kernels`
    build.build(tmp_path, work=work)
    owners: dict[str, str] = {}
    for folder in [work, *(work / name for name in NAMES)]:
        objects = [p for p in folder.glob("*.o") if (ROOT / f"csrc/cpu/{p.stem}.cpp").exists()]
        lines = subprocess.check_output(["nm", "--defined-only", *objects], text=True).split("\n")
        symbols = [line.split()[-2:] for line in lines if len(line.split()) == 3]
        assert folder == work or not [n for _, n in symbols if n.startswith("_GLOBAL__sub_I")]
        shared = {n for kind, n in symbols if kind in "WVu" and ("4geot" in n or "Dv" in n)}
        assert {name: owners[name] for name in shared & owners.keys()} == {}
        owners |= dict.fromkeys(shared, folder.name)


@pytest.mark.parametrize("ninja", [True, False])
def test_library_carries_the_digest_of_its_sources(csrc, ninja, monkeypatch):
    if not ninja:
        monkeypatch.setattr(build, "_find_ninja", lambda: None)
    library = build.build(csrc.parent / "to" / "be made", csrc=csrc)
    assert library == csrc.parent / "to" / "be made" / build.library_name()
    assert [p.name for p in library.parent.iterdir()] == [library.name]
    assert build.compiled_from(library) == build.digest("cpu", csrc)


def test_digest_follows_names_contents_and_flags(csrc, monkeypatch):
    digests = [build.digest("cpu", csrc)]
    (csrc / "README.md").write_text("no source")
    assert build.digest("cpu", csrc) == digests[0]
    (csrc / "common" / "width.h").write_text("// other\n")
    digests.append(build.digest("cpu", csrc))
    (csrc / "common" / "width.h").rename(csrc / "common" / "length.h")
    digests.append(build.digest("cpu", csrc))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    digests.append(build.digest("cpu", csrc))
    assert len(set(digests)) == 4


def test_changed_header_recompiles_what_includes_it_and_nothing_else(csrc):
    if not build._find_ninja():
        pytest.skip("no ninja here")
    work = csrc.parent / "work"
    write_sources(csrc, other="int GEOT_ISA;\n")
    first = build.compiled_from(build.build(csrc.parent, work=work, csrc=csrc))
    before = times(work)
    build.build(csrc.parent, work=work, csrc=csrc)
    assert times(work) == before
    (csrc / "common" / "width.h").write_text(WIDTH_H + "// changed\n")
    second = build.compiled_from(build.build(csrc.parent, work=work, csrc=csrc))
    changed = {name for name, time in times(work).items() if time != before[name]}
    assert changed == {"stamp.o", *(f"{name}/width.o" for name in NAMES)}
    assert first != second == build.digest("cpu", csrc)


@pytest.mark.parametrize("ninja", [True, False])
def test_refusal_of_the_compiler_is_passed_on_and_the_old_library_stays(csrc, ninja, monkeypatch):
    if not ninja:
        monkeypatch.setattr(build, "_find_ninja", lambda: None)
    content = build.build(csrc.parent, csrc=csrc).read_bytes()
    write_sources(csrc, width="int f() { return undeclared_name; }\n")
    with pytest.raises(build.BuildError, match=r"width\.cpp:1:.*undeclared_name"):
        build.build(csrc.parent, csrc=csrc)
    write_sources(csrc, width="int missing(); int f() { return missing(); }\n")
    with pytest.raises(build.BuildError, match="missing"):
        build.build(csrc.parent, csrc=csrc)
    assert (csrc.parent / build.library_name()).read_bytes() == content


# Why it cannot be compiled.


def fake_compiler(folder: Path, message: str) -> str:
    path = folder / "fake-c++"
    path.write_text(f"#!/bin/sh\necho '{message}' >&2\nexit 1\n")
    path.chmod(0o755)
    return str(path)


def test_reasons_name_the_compiler_that_is_missing_or_too_old(tmp_path, monkeypatch):
    csrc = write_sources(tmp_path / "csrc")
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    assert "no-such-compiler cannot be run" in build.why_not(csrc=csrc)
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "x:7: error: GCC 12 or later is needed"))
    assert "fake-c++ cannot compile C++20: x:7: error: GCC 12" in build.why_not(csrc=csrc)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.why_not(csrc=csrc).startswith("no C++ compiler")
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler"):
        build.build(tmp_path, csrc=csrc)


def test_first_compiler_that_will_do_is_taken(csrc, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", f"{build.find_tools(csrc=csrc).compiler[0]} -O1")
    assert build.find_tools(csrc=csrc).compiler[1:] == ["-O1"]
    working = shutil.which(build.find_tools(csrc=csrc).compiler[0])
    monkeypatch.delenv("CXX")
    fakes = tmp_path / "bin"
    fakes.mkdir()
    Path(fake_compiler(tmp_path, "error: too old")).rename(fakes / "c++")
    (fakes / "g++").symlink_to(working)
    monkeypatch.setenv("PATH", f"{fakes}{os.pathsep}{os.environ['PATH']}")
    assert build.find_tools(csrc=csrc).compiler == ["g++"]


@pytest.mark.parametrize(
    ("version", "reason"),
    [((2, 9), "torch >= 2.10 is needed, got 2.9"), ((2, 10), None), (None, "headers is needed")],
)
def test_reasons_name_torch_without_importing_it(csrc, tmp_path, monkeypatch, version, reason):
    header = tmp_path / "torch" / "include" / "torch" / "headeronly" / "version.h"
    if version:
        header.parent.mkdir(parents=True)
        lines = "#define TORCH_VERSION_MAJOR {}\n#define TORCH_VERSION_MINOR {}\n"
        header.write_text(lines.format(*version))
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    got = build.why_not(csrc=csrc)
    assert got is None if reason is None else reason in got
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert build.why_not(csrc=csrc) == "torch cannot be found"


def test_reason_where_the_sources_are_missing(tmp_path):
    assert build.why_not(csrc=tmp_path) == f"there are no C++ sources in {tmp_path}"


# Where the library is looked for.


def test_library_is_found_in_the_package_or_in_the_cache_of_its_sources(package, tmp_path):
    assert native.find_library("cpu") == (
        "the C++ kernels are not compiled: run `python -m geot_kernels build`"
    )
    inside = build.build(package)
    assert native.find_library("cpu") == inside
    cached = build.build(native.cache("cpu"))
    assert cached.is_relative_to(tmp_path / "cache" / "geot-kernels")
    inside.unlink()
    assert native.find_library("cpu") == cached


def test_library_of_other_sources_is_refused(package):
    library = build.build(package)
    write_sources(package / "csrc", width_h=WIDTH_H + "// changed\n")
    reason = native.find_library("cpu")
    assert reason == (
        f"{library} was compiled from other sources: run `python -m geot_kernels build` again"
    )
    assert native.load_library.__wrapped__("cpu") == reason
    library.write_bytes(b"no library of ours")
    assert "other sources" in native.find_library("cpu")


def test_library_that_does_not_load_is_a_reason(package):
    broken = package / build.library_name()
    broken.write_text(f"geot_sources={build.digest()}")
    reason = native.load_library.__wrapped__("cpu")
    assert reason.startswith(f"{broken} cannot be loaded (")
    assert reason.endswith("run `python -m geot_kernels build` again")


def test_command_builds_into_the_cache_and_says_so(package, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["geot_kernels", "build"])
    assert main() == 0
    library = native.cache("cpu") / build.library_name()
    assert str(library) in capsys.readouterr().out
    assert native.find_library("cpu") == library
    assert native.load_library.__wrapped__("cpu") is None


def test_command_builds_a_source_tree_in_place(csrc, monkeypatch, capsys):
    package = csrc.parent / "geot_kernels"
    package.mkdir()
    monkeypatch.setattr(build, "PACKAGE", package)
    assert native.compile_library(verbose=True) == 0
    assert "-DGEOT_ISA=baseline" in capsys.readouterr().out
    assert native.find_library("cpu") == package / build.library_name()
    assert (csrc.parent / "build" / "cpu" / "library.o").exists()


def test_command_fails_with_the_reason(package, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["geot_kernels", "build"])
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    assert main() == 1
    assert "no-such-compiler cannot be run" in capsys.readouterr().err


# What is installed.

_HOOK = """
import sys
sys.path[:0] = sys.argv[2:]
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])("dist"))
"""


@pytest.fixture
def tree(csrc):
    """A source tree of this project whose csrc compiles in a second."""
    return copy_project(csrc.parent)


def copy_project(root: Path) -> Path:
    """Copies all of this project but its csrc."""
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("geot_kernels", "python"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    (root / "dist").mkdir()
    return root


def run_hook(tree: Path, hook: str, *, isolated: bool = False, **environment: str):
    """Calls the build backend as pip does; isolated, it sees setuptools and nothing else."""
    flags, paths = [], []
    if isolated:
        site = tree / "isolated"
        site.mkdir(exist_ok=True)
        for path in Path(importlib.util.find_spec("setuptools").origin).parents[1].iterdir():
            if (
                path.name.startswith(("setuptools", "_distutils_hack"))
                and not (site / path.name).exists()
            ):
                (site / path.name).symlink_to(path)
        flags, paths = ["-I", "-S"], [str(site)]
    return subprocess.run(
        [sys.executable, *flags, "-c", _HOOK, hook, *paths],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def wheel_files(tree: Path) -> tuple[str, list[str]]:
    """The tag of the only wheel built, and what is in it."""
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel.stem.split("-", 2)[2], archive.namelist()


@pytest.mark.slow
def test_isolated_wheel_is_pure_and_its_sources_compile_later(tree, tmp_path):
    done = run_hook(tree, "build_wheel", isolated=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not compiled (torch cannot be found)") == 1
    tag, files = wheel_files(tree)
    assert tag == "py3-none-any"
    assert f"geot_kernels/{build.library_name()}" not in files
    sources = ("common/width.h", "cpu/library.cpp", "cpu/width.cpp")
    assert {f"geot_kernels/csrc/{name}" for name in sources} <= set(files)
    model = ROOT / "python"
    data = {p.relative_to(model).as_posix() for p in model.rglob("*.*") if p.suffix != ".pyc"}
    assert {name for name in data if ".egg-info/" not in name} <= set(files)

    site = tmp_path / "site"
    zipfile.ZipFile(next((tree / "dist").glob("*.whl"))).extractall(site)
    environment = {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(*arguments: str) -> str:
        command, env = [sys.executable, *arguments], {**os.environ, **environment}
        return subprocess.check_output(command, cwd=tmp_path, env=env, text=True)

    load = "from geot_kernels.backends.native import load_library; print(load_library('cpu'))"
    assert "not compiled" in run("-c", load)
    assert str(tmp_path / "cache") in run("-m", "geot_kernels", "build")
    assert run("-c", load).strip() == "None"


def test_wheel_with_the_library_serves_every_python_on_its_platform(tree):
    done = run_hook(tree, "build_wheel")
    assert done.returncode == 0, done.stderr
    assert "C++ kernels are not compiled" not in done.stdout
    tag, files = wheel_files(tree)
    assert tag.startswith("py3-none-")
    assert tag != "py3-none-any"
    assert {f"geot_kernels/{build.library_name()}", "geot_kernels/csrc/cpu/width.cpp"} <= {*files}


def test_editable_install_has_the_library_in_the_source_tree(tree):
    done = run_hook(tree, "build_editable")
    assert done.returncode == 0, done.stderr
    library = tree / "geot_kernels" / build.library_name()
    assert build.compiled_from(library) == build.digest("cpu", tree / "csrc")


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_install_fails_with_the_message_of_the_compiler(tree, hook):
    write_sources(tree / "csrc", width="int f() { return undeclared_name; }\n")
    done = run_hook(tree, hook)
    assert done.returncode != 0
    assert "undeclared_name" in done.stderr
    assert "GEOT_KERNELS_CPU=0" in done.stderr
    assert run_hook(tree, hook, GEOT_KERNELS_CPU="0").returncode == 0
    assert wheel_files(tree)[0] == "py3-none-any" or hook == "build_editable"


def test_install_that_insists_fails_where_nothing_can_be_compiled(tree, tmp_path):
    missing = str(tmp_path / "no-such-compiler")
    done = run_hook(tree, "build_wheel", GEOT_KERNELS_CPU="1", CXX=missing)
    assert done.returncode != 0
    assert "GEOT_KERNELS_CPU=1, but" in done.stderr
    assert "no-such-compiler cannot be run" in done.stderr
    done = run_hook(tree, "build_wheel", GEOT_KERNELS_CPU="yes")
    assert "GEOT_KERNELS_CPU: expected 0 or 1, got 'yes'" in done.stderr


def test_source_distribution_has_the_sources(tree):
    done = run_hook(tree, "build_sdist", isolated=True)
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, tree / "unpacked")
    unpacked = {p.name for p in (tree / "unpacked").rglob("csrc/*/*")}
    assert unpacked == {"width.h", "library.cpp", "width.cpp"}
