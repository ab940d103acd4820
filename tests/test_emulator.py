"""The emulator that runs CUDA kernels on the host: right, and finding what it is there to find."""

from __future__ import annotations

import re

import pytest
from test_cpp import (
    CSRC,
    FLAGS,
    MEMORY_AND_UB,
    TESTS,
    compile_and_run,
    compiler,
    find,
    require,
    run,
)

HOST = [*FLAGS, f"-I{TESTS}", "-DGEOT_CUDA_ON_HOST"]
SOURCES = [TESTS / "emulator.cpp", TESTS / "test_emulator.cpp"]
BARRIERS = ("first", "second", "third")

__all__ = ["compiler"]  # a fixture


def line_of(barrier):
    """Where test_emulator.cpp has it, as GEOT_DROP_SYNC wants it."""
    lines = (TESTS / "test_emulator.cpp").read_text().splitlines()
    (line,) = (n for n, line in enumerate(lines, 1) if f"// {barrier} barrier" in line)
    return f"test_emulator.cpp:{line}"


@pytest.fixture(scope="module")
def build_and_test(compiler, tmp_path_factory):
    """From flags to the program, compiled once, its tests passed."""
    programs = {}

    def program(*flags):
        if flags not in programs:
            folder = tmp_path_factory.mktemp("emulator")
            command = [*compiler, *HOST, *flags]
            require(folder, command)
            assert " 0 failed" in compile_and_run(folder, command, SOURCES)
            programs[flags] = folder / "test"
        return programs[flags]

    return program


def run_one(program, name, **environment):
    return run(["env", *(f"{key}={value}" for key, value in environment.items()), program, name])


@pytest.mark.parametrize("schedule", ["reverse", "1", "2", "3"])
def test_collectives_in_any_order(schedule, build_and_test):
    done = run(["env", f"GEOT_SCHEDULE={schedule}", build_and_test()])
    assert done.returncode == 0, done.stdout + done.stderr


def test_address_sanitizer_sees_the_end_of_shared_memory(build_and_test):
    program = build_and_test(*MEMORY_AND_UB)
    assert run_one(program, "inside").returncode == 0
    done = run_one(program, "overrun")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "test_emulator.cpp" in done.stderr


@pytest.mark.parametrize("kernel", ["race", "warps", "matrix", "blocks", "atomic"])
def test_thread_sanitizer_sees_a_race(kernel, build_and_test):
    done = run_one(build_and_test("-fsanitize=thread"), kernel)
    assert done.returncode != 0
    assert "data race" in done.stderr
    assert "test_emulator.cpp" in done.stderr


def test_thread_sanitizer_knows_barriers_of_a_warp(build_and_test):
    assert run_one(build_and_test("-fsanitize=thread"), "warp").returncode == 0


@pytest.mark.parametrize("barrier", BARRIERS)
def test_thread_sanitizer_misses_a_dropped_barrier(barrier, build_and_test):
    program = build_and_test("-fsanitize=thread")
    assert run_one(program, "reverse").returncode == 0
    assert run_one(program, "reverse", GEOT_DROP_SYNC="other.cuh:1").returncode == 0
    done = run_one(program, "reverse", GEOT_DROP_SYNC=line_of(barrier))
    assert done.returncode != 0
    assert "data race" in done.stderr


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_dropped_barrier_changes_the_result(barrier, build_and_test):
    program = build_and_test()
    right = run_one(program, "reverse")
    assert right.returncode == 0
    for schedule in ("reverse", "5"):
        assert run_one(program, "reverse", GEOT_SCHEDULE=schedule).stdout == right.stdout
    wrong = run_one(program, "reverse", GEOT_DROP_SYNC=line_of(barrier))
    assert wrong.stdout != right.stdout


def test_passed_barriers_are_listed(build_and_test):
    printed = run_one(build_and_test(), "reverse", GEOT_LIST_SYNC=1).stdout
    kinds = ("block", "block", "warp")
    expected = {f"{line_of(b)} {kind}" for b, kind in zip(BARRIERS, kinds, strict=True)}
    assert sorted(re.findall(r"^sync (.*)$", printed, re.MULTILINE)) == sorted(expected)


@pytest.mark.slow
def test_fibers_of_other_processors_and_of_ucontext(compiler, tmp_path):
    command = [*compiler, *HOST, "-DGEOT_UCONTEXT"]
    assert " 0 failed" in compile_and_run(tmp_path, command, SOURCES)
    command = [find("aarch64-linux-gnu-g++"), *HOST, "-static"]
    printed = compile_and_run(tmp_path, command, SOURCES, runner=[find("qemu-aarch64")])
    assert " 0 failed" in printed


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_platform_compiles_for_a_gpu(architecture, tmp_path):
    command = [find("nvcc"), "-std=c++20", f"-arch=sm_{architecture}", f"-I{CSRC}"]
    command += ["-Werror", "all-warnings", "-x", "cu"]
    done = run([*command, "-c", TESTS / "test_emulator.cpp", "-o", tmp_path / "kernels.o"])
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_a_gpu_does_what_the_emulator_does(tmp_path):
    command = [find("nvcc"), "-std=c++20", "-arch=native", f"-I{CSRC}", "-x", "cu"]
    done = run([*command, TESTS / "test_emulator.cpp", "-o", tmp_path / "test"])
    assert done.returncode == 0, done.stderr
    done = run([tmp_path / "test"])
    assert done.returncode == 0, done.stdout + done.stderr
