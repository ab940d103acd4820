"""The CUDA kernels without torch, on the host: right, and under sanitizers."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_cpp import CSRC, FLAGS, MEMORY_AND_UB, PASSES, TESTS, compiler, require, run

CUDA = CSRC / "cuda"
# A device's compiler unrolls loops where this one does not know how.
KERNEL_FLAGS = ["-DGEOT_CUDA_ON_HOST", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-x", "c++"]
KERNELS = [*sorted(CUDA.glob("*.cu")), TESTS / "emulator.cpp", TESTS / "test_cuda.cpp"]

__all__ = ["compiler"]  # a fixture


def to_objects(folder, command, sources):
    """Compiles sources one beside the other."""

    def to_object(source):
        target = folder / f"{source.stem}.o"
        done = run([*command, "-c", source, "-o", target])
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(to_object, sources))


@pytest.fixture(scope="module")
def build(compiler, tmp_path_factory):
    """From flags of a sanitizer to the program; without it what the kernels are compared to."""
    base = [*compiler, *FLAGS, "-DGEOT_ISA=baseline", f"-I{TESTS}"]
    passes = []

    def program(*flags):
        folder = tmp_path_factory.mktemp("cuda")
        require(folder, [*base, *flags])
        if not passes:
            passes.extend(to_objects(tmp_path_factory.mktemp("cpu"), base, PASSES))
        objects = to_objects(folder, [*base, *flags, *KERNEL_FLAGS], KERNELS)
        target = folder / "test"
        done = run([*compiler, *flags, *objects, *passes, "-pthread", "-o", target])
        assert done.returncode == 0, done.stderr
        return target

    return program


def run_part(program, part, **environment):
    settings = {"TSAN_OPTIONS": "halt_on_error=1", **environment}
    return run(["env", *(f"{key}={value}" for key, value in settings.items()), program, part])


def run_right(program, part, **environment):
    """Returns what was printed."""
    done = run_part(program, part, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout
    return done.stdout


# A test for each sanitizer, which compiles for some time.


@pytest.mark.slow
def test_kernels_agree_with_loops_and_with_the_cpu_in_any_order_of_threads(build):
    program = build()
    run_right(program, "all")
    for part in ("16bit", "parts"):
        printed = run_right(program, part)
        assert re.search(r"^bits \w{16}$", printed, re.MULTILINE)
        for schedule in ("reverse", "1"):
            assert run_right(program, part, GEOT_SCHEDULE=schedule) == printed


@pytest.mark.slow
def test_kernels_stay_in_their_memory(build):
    run_right(build(*MEMORY_AND_UB), "all")


@pytest.mark.slow
def test_kernels_have_no_race_and_no_barrier_too_many(build):
    program = build("-fsanitize=thread")
    for part in ("sizes", "16bit", "tables"):
        run_right(program, part)
    printed = run_right(program, "barriers", GEOT_LIST_SYNC=1)
    passed = set(re.findall(r"^sync (\S+:\d+) \w+$", printed, re.MULTILINE))
    written = {
        f"{path.name}:{number}"
        for path in CUDA.glob("*.cuh")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.match(r"\s*GEOT_SYNC_\w+\(\)", line)
    }
    assert written
    assert passed == written
    for barrier in sorted(passed):
        done = run_part(program, "barriers", GEOT_DROP_SYNC=barrier)
        assert done.returncode != 0, f"{barrier} is not needed"
        assert "data race" in done.stderr, done.stdout + done.stderr
