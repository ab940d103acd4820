"""The build of the CUDA kernels, on sources of a few lines; no kernel runs."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_build import copy_project, run_hook, wheel_files, write_sources

from bench.resources import KernelResources, ptxas_report
from geot_kernels import build
from geot_kernels.__main__ import main
from geot_kernels.backends import native

ONE_CUH = """
#pragma once
template <class T> __device__ T one() { return 1; }
"""
ADD_CU = """
#include "common/width.h"
#include "one.cuh"
namespace geot {
template <class T> __global__ void add_one_kernel(T* x, int n) {
  __shared__ T tile[128];
  tile[threadIdx.x ^ 1] = one<T>() + blockIdx.x;
  __syncthreads();
  const int i = blockIdx.x * 128 + threadIdx.x;
  if (i < n) x[i] += tile[threadIdx.x] * tile[127 - threadIdx.x];
}
int launch_add_one(float* x, int n, void* stream) {
  add_one_kernel<<<(n + 127) / 128, 128, 0, static_cast<cudaStream_t>(stream)>>>(x, n);
  return cudaGetLastError();
}
}
"""
OPERATORS = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
namespace geot { int launch_add_one(float*, int, void*); }
int64_t add_one(const torch::stable::Tensor& x, int64_t stream) {
  auto* data = static_cast<float*>(x.data_ptr());
  return geot::launch_add_one(data, int(x.numel()), reinterpret_cast<void*>(stream));
}
STABLE_TORCH_LIBRARY(geot_test_build_cuda, m) { m.def("add_one(Tensor x, int stream) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(geot_test_build_cuda, CUDA, m) {
  m.impl("add_one", TORCH_BOX(&add_one));
}
"""
SWITCHES = ("CUDACXX", "CUDA_HOME", "NVCC_CCBIN", "TORCH_CUDA_ARCH_LIST")
# An nvcc that knows two architectures and compiles nothing.
NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release 12.4, V12.4.99";;
  *--list-gpu-code*) echo sm_80; echo sm_86; echo sm_90;;
  *--dryrun*) echo '#$ LIBRARIES=  "-L/there/stubs" "-L/there"';;
  *) echo "kernel.cu(7): error: it is Monday" >&2; exit 1;;
esac
"""


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in (*SWITCHES, *map(build.variable, build.KINDS)):
        monkeypatch.delenv(name, raising=False)


def write_cuda(csrc: Path, **files: str) -> Path:
    """Adds CUDA sources without torch to those of C++; `files` replaces or adds to them."""
    texts = {"library.cpp": "", "add.cu": ADD_CU, "one.cuh": ONE_CUH}
    texts |= {name.replace("_", "."): text for name, text in files.items()}
    (write_sources(csrc) / "cuda").mkdir(exist_ok=True)
    for name, text in texts.items():
        (csrc / "cuda" / name).write_text(text)
    return csrc


def require_cuda(csrc: Path) -> None:
    if reason := build.why_not("cuda", csrc):
        pytest.skip(f"the CUDA kernels cannot be compiled: {reason}")


@pytest.fixture
def csrc(tmp_path):
    """Sources that any C++ compiler and a stand-in for nvcc take."""
    return write_cuda(tmp_path / "with spaces" / "csrc")


@pytest.fixture
def small(csrc, monkeypatch):
    """The same for the real nvcc, for one architecture; skips where there is none."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    require_cuda(csrc)
    return csrc


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    """A stand-in for nvcc, by CUDACXX; skips where there is no C++ compiler."""
    if reason := build.why_not(csrc=write_sources(tmp_path / "probe")):
        pytest.skip(f"the C++ kernels cannot be compiled: {reason}")
    monkeypatch.setenv("CUDACXX", str(script(tmp_path / "fake-nvcc", NVCC)))
    return tmp_path / "fake-nvcc"


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The work folder of a library with an operator, for all architectures."""
    work = tmp_path_factory.mktemp("cuda")
    with pytest.MonkeyPatch.context() as patch:
        for name in SWITCHES:
            patch.delenv(name, raising=False)
        csrc = write_cuda(work / "csrc", library_cpp=OPERATORS)
        require_cuda(csrc)
        build.build(work / "installed", "cuda", work=work, csrc=csrc)
    return work


# The library.


def test_library_holds_code_for_every_architecture_and_ptx_of_the_newest(built):
    tool = shutil.which("cuobjdump") or find_tool_of_triton("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump here")
    library = built / "installed" / build.library_name("cuda")
    listed = subprocess.check_output([tool, "--list-elf", "--list-ptx", library], text=True)
    known = [x.replace(".", "") for x in build.ARCHITECTURES]
    known = [x for x in known if f",code=sm_{x} " in (built / "build.ninja").read_text()]
    assert known[:2] == ["80", "90"]
    ours = re.findall(r"(sm_\w+)\.(cubin|ptx)", listed)
    assert sorted(ours) == sorted(
        [*((f"sm_{x}", "cubin") for x in known), (f"sm_{known[-1]}", "ptx")]
    )


def find_tool_of_triton(name: str) -> str | None:
    triton = pytest.importorskip("triton")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.is_file() else None


def test_library_loads_into_torch_without_a_gpu_and_registers_its_operators(built):
    torch.ops.load_library(built / "installed" / build.library_name("cuda"))
    operator = torch.ops.geot_test_build_cuda.add_one.default
    schema = "geot_test_build_cuda::add_one(Tensor x, int stream) -> int"
    assert str(operator._schema).replace("SymInt", "int") == schema
    assert torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CUDA")


def test_library_exports_nothing_and_needs_no_library_of_cuda(built):
    if not (tool := shutil.which("readelf")):
        pytest.skip("no readelf here")
    library = built / "installed" / build.library_name("cuda")
    symbols = subprocess.check_output([tool, "--dyn-syms", "--wide", library], text=True)
    assert re.findall(r" (?:GLOBAL|WEAK|UNIQUE) +\w+ +(?!UND)\w+ (.+)", symbols) == []
    dynamic = subprocess.check_output([tool, "-d", library], text=True)
    needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.search("cuda|c10|nv|python|libtorch.so", name)]


def test_log_of_nvcc_says_what_each_kernel_needs(built):
    report = ptxas_report((built / "add.o.log").read_text())
    assert {row.arch for row in report} >= {"sm_80", "sm_90"}
    for row in report:
        if shutil.which("c++filt"):
            assert row.kernel == "void geot::add_one_kernel<float>(float*, int)"
        assert "add_one_kernel" in row.kernel
        assert 4 <= row.registers <= 32
        assert (row.shared, row.stack, row.spill_stores, row.spill_loads) == (512, 0, 0, 0)


def test_library_carries_the_digest_of_its_sources(built):
    library = built / "installed" / build.library_name("cuda")
    assert build.compiled_from(library) == build.digest("cuda", built / "csrc")


def test_digest_follows_the_sources_of_its_kind_and_nothing_of_the_machine(csrc, monkeypatch):
    def digests():
        return [build.digest(kind, csrc) for kind in build.KINDS]

    first = digests()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    monkeypatch.setenv("CUDACXX", "no-such-compiler")
    assert digests() == first
    (csrc / "cuda" / "add.cu").write_text(ADD_CU + "// changed\n")
    second = digests()
    assert second[0] == first[0]
    monkeypatch.setattr(build, "NVCC_FLAGS", (*build.NVCC_FLAGS, "-lineinfo"))
    third = digests()
    assert third[0] == first[0]
    (csrc / "cpu" / "width.cpp").write_text("")
    fourth = digests()
    assert fourth[0] != first[0] and fourth[1] == third[1]
    (csrc / "common" / "width.h").write_text("// other\n")
    assert len({x[1] for x in (first, second, third, fourth, digests())}) == 4
    assert digests()[0] != fourth[0]


def test_only_what_changed_is_compiled_again_and_a_lost_log_is_made_anew(small):
    if not build._find_ninja():
        pytest.skip("no ninja here")
    work = small.parent / "work"
    write_cuda(small, other_cu="#include <concepts>\nint other;\n")

    def changed(before=None):
        build.build(small.parent, "cuda", work=work, csrc=small)
        times = {p.name: p.stat().st_mtime_ns for p in work.glob("*.o*")}
        return times, {name for name, x in times.items() if before and before.get(name) != x}

    times, _ = changed()
    assert set(times) == {f"{x}.o" for x in ("library", "stamp", "add", "other")} | {
        "add.o.log",
        "other.o.log",
    }
    times, names = changed(times)
    assert names == set()
    (small / "cuda" / "one.cuh").write_text(ONE_CUH + "// changed\n")
    times, names = changed(times)
    assert names == {"add.o", "add.o.log", "stamp.o"}
    (work / "other.o.log").unlink()
    times, names = changed(times)
    assert names == {"other.o", "other.o.log"}


@pytest.mark.parametrize("ninja", [True, False])
def test_refusal_of_nvcc_is_passed_on_and_the_old_library_stays(small, ninja, monkeypatch, capsys):
    if not ninja:
        monkeypatch.setattr(build, "_find_ninja", lambda: None)
    warned = "__global__ void kernel() { int never_used; }\n"
    write_cuda(small, add_cu=warned)
    content = build.build(small.parent, "cuda", csrc=small).read_bytes()
    printed = capsys.readouterr().out
    assert "never_used" in printed
    assert "ptxas info" not in printed
    write_cuda(small, add_cu="__global__ void kernel() { undeclared_name(); }\n")
    with pytest.raises(build.BuildError, match=r"add\.cu\(1\): error.*undeclared_name"):
        build.build(small.parent, "cuda", csrc=small)
    assert (small.parent / build.library_name("cuda")).read_bytes() == content


# What it is compiled for.


@pytest.mark.parametrize(
    ("listed", "codes"),
    [
        ("8.0;9.0a+PTX", "sm_80 sm_90a compute_90a"),
        ("9.0 8.6 9.0", "sm_90 sm_86"),
        ("7.0 7.5 8.0 12.0+PTX", "sm_80 sm_120 compute_120"),
        ("10.0f;", "sm_100f"),
        (" ", "sm_80 sm_90 compute_90"),
    ],
)
def test_architectures_are_those_of_the_environment_or_what_nvcc_knows_of_ours(
    listed, codes, fake_nvcc, csrc, monkeypatch
):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    tools = build.find_tools("cuda", csrc)
    flags = [x.removeprefix("-gencode=").split(",") for x in tools.nvcc.architectures]
    assert [code for _, code in flags] == [f"code={code}" for code in codes.split()]
    for arch, code in flags:
        assert arch.removeprefix("arch=compute_") == code.rpartition("_")[2]
    assert f"(12.4: {codes})" in str(tools)


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        ("Hopper", "expected numbers such as '8.0 9.0a+PTX', got 'Hopper'"),
        ("8.0 90", "expected numbers such as '8.0 9.0a+PTX', got '90'"),
        ("7.0;7.5+PTX", "the kernels need GPUs of architecture 8.0 or later, got 7.0 7.5+PTX"),
    ],
)
def test_reason_names_an_architecture_that_will_not_do(
    listed, reason, fake_nvcc, csrc, monkeypatch
):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert reason in build.why_not("cuda", csrc)


def test_reason_names_an_architecture_that_nvcc_does_not_know(small, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "99.0")
    reason = build.why_not("cuda", small)
    assert "nvcc" in reason and "Unsupported gpu architecture 'compute_990'" in reason


# Which nvcc.


def test_first_nvcc_that_will_do_is_taken(csrc, fake_nvcc, tmp_path, monkeypatch):
    assert build.find_tools("cuda", csrc).nvcc.command[0] == str(fake_nvcc)
    assert build.find_tools("cuda", csrc).nvcc.libraries == ["-L/there/stubs", "-L/there"]
    monkeypatch.delenv("CUDACXX")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    in_path = script(tmp_path / "bin" / "nvcc", NVCC)
    assert build.find_tools("cuda", csrc).nvcc.command[0] == str(in_path)
    at_home = script(tmp_path / "home" / "bin" / "nvcc", NVCC)
    assert build.find_tools("cuda", csrc).nvcc.command[0] == str(at_home)
    script(at_home, "#!/bin/sh\necho \"nvcc fatal   : Value 'c++20' is not defined\"; exit 1\n")
    assert build.find_tools("cuda", csrc).nvcc.command[0] == str(in_path)


def test_nvcc_calls_the_compiler_of_the_rest_unless_told_otherwise(csrc, fake_nvcc, monkeypatch):
    compiler = build.find_tools("cuda", csrc).compiler[0]
    assert build.find_tools("cuda", csrc).nvcc.command[1:] == [f"-ccbin={compiler}"]
    monkeypatch.setenv("CXX", f"{compiler} -O1")
    assert build.find_tools("cuda", csrc).nvcc.command[1:] == []
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("NVCC_CCBIN", "another")
    assert build.find_tools("cuda", csrc).nvcc.command[1:] == []


def test_reasons_name_the_nvcc_that_is_missing_or_too_old(csrc, fake_nvcc, monkeypatch):
    refusal = "*--dryrun*) echo \"nvcc fatal   : Value 'c++20' is not defined\"; exit 1;;"
    script(fake_nvcc, re.sub(r"\*--dryrun.*", refusal, NVCC))
    reason = build.why_not("cuda", csrc)
    assert f"{fake_nvcc} cannot compile them: nvcc fatal   : Value 'c++20'" in reason
    assert "nvcc 12.4" in reason
    monkeypatch.setenv("CUDACXX", "no-such-nvcc")
    assert "no-such-nvcc cannot be run" in build.why_not("cuda", csrc)
    monkeypatch.delenv("CUDACXX")
    which = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda x, **_: None if "nvcc" in str(x) else which(x, **_)
    )
    assert build.why_not("cuda", csrc) == "no nvcc (CUDA 12 or later): name one in CUDACXX"
    assert build.why_not("cpu", csrc) is None


def test_reasons_name_missing_sources_and_windows(csrc, monkeypatch):
    (csrc / "cuda" / "library.cpp").unlink()
    assert build.why_not("cuda", csrc) == f"there are no CUDA sources in {csrc}"
    monkeypatch.setattr(sys, "platform", "win32")
    assert build.why_not("cuda", csrc) == "compiling them on Windows is not supported"


# `python -m geot_kernels build`.


@pytest.fixture
def package(csrc, monkeypatch, tmp_path):
    """Makes `geot_kernels` a package installed with the sources `csrc`, and its cache empty."""
    folder = csrc.parent / "geot_kernels"
    csrc.rename(folder.mkdir() or folder / "csrc")
    monkeypatch.setattr(build, "PACKAGE", folder)
    monkeypatch.setattr(sys, "argv", ["geot_kernels", "build"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_command_builds_both_libraries(package, monkeypatch, capsys):
    require_cuda(package / "csrc")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert native.find_library("cuda") == (
        "the CUDA kernels are not compiled: run `python -m geot_kernels build`"
    )
    assert main() == 0
    printed = capsys.readouterr().out
    for kind in build.KINDS:
        library = native.cache(kind) / build.library_name(kind)
        assert f"{library} is ready" in printed
        assert native.find_library(kind) == library
        assert native.load_library.__wrapped__(kind) is None
    (package / "csrc" / "cuda" / "add.cu").write_text("")
    assert "the CUDA kernels are not compiled" in native.find_library("cuda")
    shutil.copy(library, package)
    assert "was compiled from other sources" in native.find_library("cuda")


@pytest.mark.parametrize(
    ("wanted", "code", "message"),
    [("", 0, "it is Monday"), ("1", 1, "it is Monday"), ("0", 0, "GEOT_KERNELS_CUDA=0")],
)
def test_command_fails_for_want_of_cuda_only_where_it_is_insisted_on(
    wanted, code, message, package, fake_nvcc, monkeypatch, capsys
):
    monkeypatch.setenv("GEOT_KERNELS_CUDA", wanted)
    assert main() == code
    said = capsys.readouterr()
    assert "the CUDA kernels are not compiled: " in said.err
    assert message in said.err
    assert isinstance(native.find_library("cpu"), Path)
    assert isinstance(native.find_library("cuda"), str)


def test_command_compiles_no_cpp_kernels_where_they_are_forbidden(
    package, fake_nvcc, monkeypatch, capsys
):
    monkeypatch.setenv("GEOT_KERNELS_CPU", "0")
    assert main() == 0
    assert "the C++ kernels are not compiled: GEOT_KERNELS_CPU=0" in capsys.readouterr().err


def test_command_names_a_wrong_switch_and_builds_the_rest(package, monkeypatch, capsys):
    monkeypatch.setenv("GEOT_KERNELS_CUDA", "yes")
    assert main() == 1
    assert "GEOT_KERNELS_CUDA: expected 0 or 1, got 'yes'" in capsys.readouterr().err
    assert isinstance(native.find_library("cpu"), Path)


# What is installed.


CPU, CUDA = (f"geot_kernels/{build.library_name(kind)}" for kind in build.KINDS)


@pytest.fixture
def tree(csrc):
    """A source tree of this project whose csrc compiles in seconds."""
    return copy_project(csrc.parent)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of such a tree, with both libraries, and what its build printed."""
    root = tmp_path_factory.mktemp("wheel") / "with spaces"
    with pytest.MonkeyPatch.context() as patch:
        for name in SWITCHES:
            patch.delenv(name, raising=False)
        require_cuda(write_cuda(root / "csrc", library_cpp=OPERATORS))
        done = run_hook(copy_project(root), "build_wheel", TORCH_CUDA_ARCH_LIST="8.0")
    assert done.returncode == 0, done.stderr
    return next((root / "dist").glob("*.whl")), done.stdout


def libraries(files: list[str]) -> list[str]:
    return sorted(x for x in files if x.endswith((".so", ".dylib")))


def test_wheel_has_both_libraries_and_their_sources(wheel):
    path, printed = wheel
    assert "not compiled" not in printed
    tag, files = wheel_files(path.parents[1])
    assert tag.startswith("py3-none-") and tag != "py3-none-any"
    assert libraries(files) == [CPU, CUDA]
    assert {f"geot_kernels/csrc/cuda/{x}" for x in ("add.cu", "one.cuh", "library.cpp")} <= {
        *files
    }


def test_libraries_of_the_wheel_use_nothing_of_python_that_is_not_stable(wheel):
    if importlib.util.find_spec("abi3audit") is None or platform.system() != "Linux":
        pytest.skip("no abi3audit here")
    command = ["abi3audit", "--strict", "--report", "--assume-minimum-abi3", "3.10", str(wheel[0])]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    audited = json.loads(done.stdout)["specs"][str(wheel[0])]["wheel"]
    assert sorted(x["name"] for x in audited) == [Path(CPU).name, Path(CUDA).name]
    assert all(x["result"]["is_abi3_baseline_compatible"] for x in audited)


def test_wheel_without_cuda_has_no_library_of_an_earlier_build(wheel, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(wheel[0].parents[1], tree)
    assert len(list((tree / "build").glob(f"lib*/{CUDA}"))) == 1
    done = run_hook(tree, "build_wheel", GEOT_KERNELS_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "the CUDA kernels are not compiled (GEOT_KERNELS_CUDA=0)" in done.stdout
    assert libraries(wheel_files(tree)[1]) == [CPU]


def test_source_distribution_has_every_file_that_the_digest_follows(tree):
    (tree / "csrc" / "cuda" / "rows.cuh").write_text("// part of a source\n")
    done = run_hook(tree, "build_sdist", isolated=True)
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, tree / "unpacked")
    (csrc,) = (tree / "unpacked").glob("*/csrc")
    assert {path.suffix for path in (csrc / "cuda").iterdir()} == {".cpp", ".cu", ".cuh"}
    assert build.digest("cuda", csrc) == build.digest("cuda", tree / "csrc")
    (csrc / "cuda" / "rows.cuh").unlink()
    assert build.digest("cuda", csrc) != build.digest("cuda", tree / "csrc")


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_install_survives_an_nvcc_that_fails_unless_cuda_is_insisted_on(tree, fake_nvcc, hook):
    done = run_hook(tree, hook)
    assert done.returncode == 0, done.stderr
    assert "it is Monday" in done.stdout + done.stderr
    assert "the CUDA kernels are not compiled" in done.stdout + done.stderr
    if hook == "build_wheel":
        assert libraries(wheel_files(tree)[1]) == [CPU]
    else:
        assert (tree / CPU).exists() and not (tree / CUDA).exists()

    done = run_hook(tree, hook, GEOT_KERNELS_CUDA="1")
    assert done.returncode != 0
    assert "it is Monday" in done.stderr
    assert "GEOT_KERNELS_CUDA=0 installs without CUDA kernels" in done.stderr


def test_install_that_insists_fails_where_cuda_cannot_be_compiled(tree):
    done = run_hook(tree, "build_wheel", GEOT_KERNELS_CUDA="1", CUDACXX="no-such-nvcc")
    assert done.returncode != 0
    assert "GEOT_KERNELS_CUDA=1, but the CUDA kernels cannot be compiled" in done.stderr
    assert "no-such-nvcc cannot be run" in done.stderr
    done = run_hook(tree, "build_wheel", GEOT_KERNELS_CUDA="yes")
    assert "GEOT_KERNELS_CUDA: expected 0 or 1, got 'yes'" in done.stderr


# What ptxas says.

LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4geot11tile_kernelIfLi64EEEvPT_i' for 'sm_80'
ptxas info    : Function properties for _ZN4geot11tile_kernelIfLi64EEEvPT_i
    928 bytes stack frame, 788 bytes spill stores, 1140 bytes spill loads
ptxas info    : Used 32 registers, 256 bytes smem, 364 bytes cmem[0], 8 bytes cmem[2]
ptxas info    : Compile time = 1567.566 ms
ptxas info    : Function properties for _Z5heavyIfET_PS0_i
    16 bytes stack frame, 616 bytes spill stores, 772 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'plain' for 'sm_90a'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 0 barriers
"""


def test_report_reads_what_ptxas_says_of_kernels_and_of_functions_they_call(monkeypatch):
    expected = [
        ("_ZN4geot11tile_kernelIfLi64EEEvPT_i", "sm_80", 32, 256, 928, 788, 1140, 372),
        ("_Z5heavyIfET_PS0_i", "sm_80", 0, 0, 16, 616, 772, 0),
        ("plain", "sm_90a", 168, 0, 0, 0, 0, 0),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda _: None)
        assert ptxas_report(LOG) == [KernelResources(*row) for row in expected]
        assert ptxas_report("") == []
    if shutil.which("c++filt"):
        names = [row.kernel for row in ptxas_report(LOG)]
        assert names[0] == "void geot::tile_kernel<float, 64>(float*, int)"
        assert names[1:] == ["float heavy<float>(float*, int)", "plain"]
