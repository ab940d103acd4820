"""The CUDA kernels compiled for the host, run by the emulator of tests/cpp behind their operators.

Objects are kept, and with ninja only what has changed is compiled again. A library lies in a
folder named after all that it was made from: where it is, nothing has to be done.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from geot_kernels import build
from geot_kernels.backends import cuda

ROOT = Path(__file__).parents[1]
CSRC, EMULATOR, WORK = ROOT / "csrc", ROOT / "tests" / "cpp", ROOT / "build" / "cuda-host"
NAMESPACE = "geot_cuda_host"
LIBRARY = f"lib{NAMESPACE}.so"
# Kernels read and write two and four numbers at a time, as nvcc lets them.
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing", "-DGEOT_CUDA_ON_HOST")
_KEPT = 3  # libraries, of this and other states of the sources


def _steps(objects: Path) -> list[build.Step]:
    compiler, torch_folder = build._find_compiler(), build._find_torch()
    command = [*compiler, *FLAGS, f"-I{CSRC}", f"-I{EMULATOR}", "-x", "c++"]
    operators = [*command, f"-DGEOT_CUDA_OPERATORS={NAMESPACE}", *build.TORCH_FLAGS]
    operators += ["-isystem", str(torch_folder / "include")]
    steps = [
        build._compile(operators, CSRC / "cuda" / "library.cpp", objects / "library.o"),
        build._compile(command, EMULATOR / "emulator.cpp", objects / "emulator.o"),
    ]
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        steps.append(build._compile(command, source, objects / f"{source.stem}.o"))
    made = [step.output for step in steps]
    library = objects / LIBRARY
    return [
        *steps,
        build.Step(library, made, build._link(build.Tools(compiler, torch_folder), made, library)),
    ]


def _digest(steps: list[build.Step]) -> str:
    """Hashes the sources and the commands, and with them the compiler and torch."""
    known = hashlib.sha256(torch.__version__.encode())
    for step in steps:
        known.update(repr(step.command).encode())
    folders = (CSRC / "common", CSRC / "cuda")
    sources = [p for f in folders for p in f.iterdir() if p.suffix in build.SUFFIXES]
    for path in sorted([*sources, *EMULATOR.glob("emulator.*")]):
        known.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return known.hexdigest()[:16]


@functools.cache
def library() -> Path:
    """Compiles the library where that is not done; one process of many does it, others wait.

    Raises:
        BuildError: The compiler refused.
    """
    import fcntl

    objects = WORK / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    with (WORK / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        steps = _steps(objects)
        made = WORK / _digest(steps) / LIBRARY
        if not made.exists():
            ninja = build._find_ninja()
            if ninja:
                build._run_ninja(ninja, steps, objects, verbose=False)
            else:
                build._run_all(steps, verbose=False)
            build._install(steps[-1].output, made.parent)
            older = sorted(WORK.glob(f"*/{LIBRARY}"), key=lambda p: p.stat().st_mtime)
            for path in [p for p in older if p.parent != objects][:-_KEPT]:
                shutil.rmtree(path.parent)
    return made


@functools.cache
def _load() -> None:
    torch.ops.load_library(library())


def require() -> None:
    """Compiles and loads the library; skips where there is no compiler, and fails otherwise."""
    try:
        build._find_compiler()
        build._find_torch()
    except build.BuildError as error:
        pytest.skip(f"the CUDA kernels cannot be compiled for the host: {error}")
    _load()


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Lets backend="cuda" run on the CPU."""
    require()
    why_not = cuda.why_not

    def why_not_emulated(device, inputs=None):
        if device.type != "cpu":
            return why_not(device, inputs)
        return None if inputs is None else cuda.why_not_inputs(inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "why_not", why_not_emulated)
        patch.setattr(cuda, "_operators", lambda: getattr(torch.ops, NAMESPACE))
        yield
