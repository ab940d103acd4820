"""csrc without torch: compiled with its tests of tests/cpp, under sanitizers, and for others."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from geot_kernels import build

ROOT = Path(__file__).parents[1]
CSRC, TESTS = ROOT / "csrc", ROOT / "tests" / "cpp"
PASSES = [CSRC / "cpu" / f"{name}.cpp" for name in ("forward", "backward", "second_backward")]
FLAGS = ["-std=c++20", "-Og", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", f"-I{CSRC}"]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
MEMORY = ["-fsanitize=address", "-fno-sanitize-recover=all"]
MEMORY_AND_UB = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
AVX2 = build.INSTRUCTION_SETS["avx2"]


def run(command):
    return subprocess.run(
        [str(x) for x in command], capture_output=True, text=True, timeout=600, check=False
    )


def find(name):
    command = shutil.which(name)
    if command is None:
        pytest.skip(f"no {name} here")
    return command


@pytest.fixture(scope="session")
def compiler():
    """The compiler of the library; skips where there is none."""
    try:
        return build._find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))


def compile_and_run(folder, command, sources, *arguments, runner=()):
    """Compiles sources one beside the other, links them, runs the program; returns its output."""

    def to_object(source):
        target = folder / f"{source.stem}.o"
        done = run([*command, "-c", source, "-o", target])
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(to_object, sources))
    program = folder / "test"
    done = run([*command, *objects, "-o", program, "-pthread"])
    assert done.returncode == 0, done.stderr
    done = run([*runner, program, *arguments])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def require(folder, command):
    """Skips where a program compiled with these flags does not run, for want of a sanitizer."""
    source = folder / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    done = run([*command, source, "-o", folder / "probe"])
    if done.returncode or run([folder / "probe"]).returncode:
        pytest.skip(f"programs cannot be compiled and run here with {' '.join(command[1:])}")


def runs_avx2():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return {"avx2", "fma", "bmi2"} <= set(flags.split())


@pytest.mark.parametrize("isa", build.INSTRUCTION_SETS)
def test_formulas_and_vectors_under_sanitizers(isa, compiler, tmp_path):
    flags = build.INSTRUCTION_SETS[isa]
    if isa != "baseline" and not (IS_X86 and runs_avx2()):
        pytest.skip("this processor has no such instructions")
    if isa == "avx512" and "avx512vl" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no such instructions")
    command = [*compiler, *FLAGS, *MEMORY_AND_UB, f"-DGEOT_ISA={isa}", *flags]
    require(tmp_path, command)
    assert " 0 failed" in compile_and_run(tmp_path, command, [TESTS / "test_common.cpp"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("isa", "flags", "part"),
    [
        pytest.param("baseline", MEMORY_AND_UB, "all", id="address and undefined"),
        pytest.param("avx2", [*MEMORY, *AVX2], "all", id="address, AVX2"),
        pytest.param("baseline", ["-fsanitize=thread"], "threads", id="thread"),
    ],
)
def test_passes_under_sanitizers(isa, flags, part, compiler, tmp_path):
    if isa == "avx2" and not (IS_X86 and runs_avx2()):
        pytest.skip("this processor has no AVX2")
    command = [*compiler, *FLAGS, *flags, f"-DGEOT_ISA={isa}"]
    require(tmp_path, command)
    printed = compile_and_run(tmp_path, command, [*PASSES, TESTS / "test_cpu.cpp"], part)
    assert " 0 failed" in printed


def test_schedules_visit_each_pair_once_and_share_no_sum(compiler, tmp_path):
    command = [*compiler, *FLAGS, *MEMORY_AND_UB]
    require(tmp_path, command)
    assert " 0 failed" in compile_and_run(tmp_path, command, [TESTS / "test_plan.cpp"])


def test_headers_of_common_compile_for_a_gpu(tmp_path):
    nvcc = find("nvcc")
    command = [nvcc, "-std=c++20", f"-I{CSRC}", "-Werror", "all-warnings"]
    done = run([*command, "-c", TESTS / "device.cu", "-o", tmp_path / "device.o"])
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_passes_compile_for_arm64_and_run_there(tmp_path):
    command = [find("aarch64-linux-gnu-g++"), *FLAGS, "-static", "-DGEOT_ISA=baseline"]
    emulator = find("qemu-aarch64")
    sources = [*PASSES, TESTS / "test_cpu.cpp"]
    printed = compile_and_run(tmp_path, command, sources, "threads", runner=[emulator])
    assert " 0 failed" in printed
