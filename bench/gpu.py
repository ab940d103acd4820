"""Everything that a GPU must answer: `python -m bench.gpu [--seconds S]`, in 9 minutes.

From a bare checkout with torch, triton, numpy, pytest and a compiler; nothing is installed. In
this order, each stage in processes of its own, so that one that breaks the device ends alone:

    build      the CUDA kernels for this GPU, and beside it the static report, which needs no GPU
    tests      pytest -m gpu
    cases      limits of the machine, then all cases, the most telling ones first, scaling, models
    summary    environment, tests, what failed, tables, the static report beside measured times

Rows are written as they come, to `bench/results/<device>`. When time is over, the same command
does what is missing: what has a row of the same commit is done.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import geot_kernels as gk

from . import models, ratios, report, roofline, rows, scaling, static_times
from .cases import CASES, all_cases, grid
from .engine import BrokenDevice, Deadline, Engine, OutOfTime, Settings, Unit
from .peers import BUILT, OURS, OWN, PEERS, functions
from .ways import PASSES

ROOT = Path(__file__).parents[1]
SECONDS = 520.0
SUMMARY_S, TESTS_S, BUILD_S = 20.0, 170.0, 240.0
MAIN = PASSES[:3]  # forward, forward+backward, force step
FIRST = ("grid-512x64-8", "grid-1024x32-8", "grid-2048x16-8", "grid-256x128-8")
BROKEN, RESTARTS = 3, 4


@dataclass(frozen=True)
class Task:
    """A unit, and which ways are timed in turn in it."""

    unit: Unit
    functions: tuple[str, ...]


def plan(device: str, backend: str, dtypes: Sequence[str], size: str = "full") -> list[Task]:
    """All units, the most telling ones first; then, with all ways, what takes compiling."""
    found = all_cases(device)
    first = [name for name in FIRST if name in found]
    order = [*first, *CASES, *(name for name in grid(device) if name not in first)]
    cases = [found[name].of_size(size) for name in order]

    def ways(name: str, compiles: bool) -> tuple[str, ...]:
        names = functions(name, device, backend)
        return tuple(n for n in names if compiles or not PEERS[n].compiles)

    tasks = [
        Task(Unit(case, name, dtype), ways(name, False))
        for case in cases
        for dtype in dtypes
        for name in MAIN
    ]
    small = [case for case in cases if case.file == "grid" and case.atoms <= 32]
    replays = [
        Task(Unit(case, name, dtype, "graph"), (OURS, BUILT, "plain"))
        for case in small
        for dtype in dtypes
        for name in MAIN[:2]
        if device == "cuda"
    ]
    compiled = [replace(task, functions=ways(task.unit.name, True)) for task in tasks]
    return [*tasks, *replays, *compiled]


class Results:
    """Files of rows, and what stands in them already.

    Args:
        folder: Of the device.
        commit: Of the rows of this run.
    """

    def __init__(self, folder: Path, commit: str) -> None:
        self.folder, self.commit = folder, commit

    def add(self, file: str, found: Sequence[dict[str, str]]) -> None:
        """Writes rows."""
        rows.Rows(self.folder / f"{file}.csv").add(found)

    def done(self, file: str, like: dict[str, str], names: Sequence[str]) -> bool:
        """Whether all ways have a row of this commit."""
        wanted = {**like, "commit": self.commit}
        there = {
            row["function"]
            for row in rows.Rows(self.folder / f"{file}.csv").rows
            if all(row.get(name) == value for name, value in wanted.items())
        }
        return set(names) <= there


def measure(
    settings: Settings, folder: Path, seconds: float, dtypes: Sequence[str], size: str = "full"
) -> int:
    """Measures what has no row yet; the exit status."""
    deadline = Deadline(seconds)
    where = rows.where(settings.device, settings.backend, settings.commit)
    results = Results(folder, where["commit"])
    engine = Engine(settings, deadline)
    tasks = plan(settings.device, settings.backend, dtypes, size)
    quick = size != "full"
    stages: list[Callable[[], None]] = [
        lambda: machine(results, where, settings.device, quick),
        lambda: units(engine, results, [t for t in tasks if not compiles(t)]),
        lambda: others(engine, results, deadline, quick),
        lambda: units(engine, results, [t for t in tasks if compiles(t)]),
    ]
    try:
        for stage in stages:
            with deadline.limit():
                pass
            stage()
    except OutOfTime:
        print("out of time; the same command continues", flush=True)
    except BrokenDevice as error:
        print(f"the device is unusable now: {error}", flush=True)
        return BROKEN
    return 0


def compiles(task: Task) -> bool:
    """Whether a task compiles."""
    return any(PEERS[name].compiles for name in task.functions)


def machine(results: Results, where: dict[str, str], device: str, quick: bool) -> None:
    """The limits of the machine."""
    table = rows.Rows(
        results.folder / "machine.csv", roofline.MACHINE_COLUMNS, roofline.MACHINE_KEY
    )
    if not any(row["commit"] == results.commit for row in table.rows):
        table.add([{**row, "commit": where["commit"]} for row in roofline.machine(device, quick)])


def units(engine: Engine, results: Results, tasks: Sequence[Task]) -> None:
    """Measures what is missing of some tasks."""
    for task in tasks:
        unit, file = task.unit, task.unit.case.file or task.unit.case.name
        like = {k: v for k, v in engine.columns(unit).items() if k in rows.UNIT}
        if results.done(file, like, task.functions):
            continue
        try:
            found = engine.measure(unit, task.functions)
        except BrokenDevice as error:
            reason = {"reason": f"broke the device, one of these: {error}"}
            found_rows = [
                {**engine.columns(unit), "function": n, **reason} for n in task.functions
            ]
            results.add(file, found_rows)
            raise
        results.add(file, [outcome.row for outcome in found.values()])
        ours = found[OURS].row.get("median_ms") or found[OURS].reason
        floor = found["plain"].row.get("median_ms", "") if "plain" in found else ""
        print(f"{unit}: ours {ours} ms, plain {floor} ms", flush=True)


def others(engine: Engine, results: Results, deadline: Deadline, quick: bool) -> None:
    """Scaling with N and with B, and whole models."""
    device, backend = engine.settings.device, engine.settings.backend
    for file, found in chunks(device, backend, quick):
        with deadline.limit():
            pass
        commit = {"commit": results.commit}
        results.add(file, [{**row, **commit} for row in found])
        print(f"{file}: {found[0]['case']}, {len(found)} rows", flush=True)


def chunks(device: str, backend: str, quick: bool) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Rows beside the cases, a few at a time, with the names of their files."""
    dtype = torch.float32
    for found in scaling.measure_n(device, backend, quick, "float32", 60.0):
        yield "scaling-n", found
    for found in scaling.measure_b(device, backend, quick, "float32", 30.0):
        yield "scaling-b", found
    for name in models.MODELS:
        size = "quick" if quick else "full"
        yield "models", models.measure(name, size, device, dtype, backend, 25, 8.0)


def environment(device: str) -> list[str]:
    """Lines about the machine."""
    where = rows.where(device)
    names = ("device", "processor", "python", "torch", "triton", "cuda", "geot_kernels", "commit")
    lines = [f"{name}: {where.get(name, '')}" for name in names]
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        lines.append(f"capability {found.major}.{found.minor}, {found.total_memory / 1e9:.0f} GB")
        lines.append(f"{found.multi_processor_count} multiprocessors")
    tools = ("nvcc", "ninja", "c++", "ncu", "compute-sanitizer")
    lines.append("tools: " + ", ".join(f"{x} {'yes' if shutil.which(x) else 'no'}" for x in tools))
    missing = gk.available_backends(device)
    lines += [f"backend {name}: {reason or 'can run'}" for name, reason in missing.items()]
    return [*lines, f"system: {platform.platform()}"]


class Stage:
    """A command in a process of its own, its output in memory.

    Args:
        title: For the summary.
        command: To run, from the root of the project.
        seconds: After which it is ended.
        environment: Further variables.
    """

    def __init__(
        self, title: str, command: Sequence[str], seconds: float, environment: dict[str, str]
    ) -> None:
        self.title, self.end = title, time.monotonic() + seconds
        path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []

    def wait(self) -> int:
        """The exit status; 124 where time was over."""
        start = time.monotonic()
        try:
            out, _ = self._process.communicate(timeout=max(self.end - start, 0.1))
            status = self._process.returncode
        except subprocess.TimeoutExpired:
            self._process.kill()
            out, _ = self._process.communicate()
            status = 124
        self.lines = out.splitlines()
        print(f"== {self.title}: exit status {status}", flush=True)
        print("\n".join(self.lines[-25:]), flush=True)
        return status


def run(asked: argparse.Namespace, device: str, folder: Path) -> int:
    """All stages; 1 where something of ours failed."""
    deadline = Deadline(asked.seconds)

    def stage(title: str, *command: str, seconds: float, **variables: str) -> Stage:
        left = max(min(seconds, deadline.left() - SUMMARY_S), 1.0)
        return Stage(title, [sys.executable, "-m", *command], left, variables)

    print("\n".join(environment(device)), flush=True)
    summary: list[str] = []
    status = 0
    if device == "cuda" and not asked.no_tests:
        arch = ".".join(map(str, torch.cuda.get_device_capability()))
        build = stage("build", "geot_kernels", "build", seconds=BUILD_S, TORCH_CUDA_ARCH_LIST=arch)
        build.wait()
        tests = stage("tests", "pytest", "-m", "gpu", "-q", "--tb=line", seconds=TESTS_S)
        status = tests.wait()
        summary += ["tests: " + line for line in tests.lines[-30:]]
    for _ in range(RESTARTS):
        seconds = deadline.left() - SUMMARY_S
        if seconds < 5:
            break
        options = ["--measure", "--seconds", f"{seconds - 5:.0f}", *passed_on(asked)]
        measuring = stage("measure", "bench.gpu", *options, seconds=seconds)
        if measuring.wait() != BROKEN:
            break
        summary.append("a process broke the device and was started again")
    device_rows = ratios.read(folder)
    report.write(device_rows)
    found = report.summary(device_rows).splitlines()
    failed = failures(folder, rows.where(device, asked.backend, asked.commit)["commit"])
    print("\n".join(["", "== summary", *environment(device), *summary, *found, *failed]))
    print("\n".join(static_times.table(folder)))
    return 1 if status or failed else 0


def passed_on(asked: argparse.Namespace) -> list[str]:
    """Options for the process that measures."""
    given = ["--device", asked.device, "--backend", asked.backend, "--dtype", *asked.dtype]
    given += ["--rows", str(asked.rows)] if asked.rows else []
    given += ["--commit", asked.commit] if asked.commit is not None else []
    return given + (["--tiny"] if asked.tiny else [])


def failures(folder: Path, commit: str) -> list[str]:
    """What of ours has a reason in place of a time."""
    named = ("case", "pass", "dtype", "function", "reason")
    return [
        f"OURS FAILED: {path.stem}: " + ", ".join(row[n] for n in named)
        for path in sorted(folder.glob("*.csv"))
        if path.stem in {*all_cases("cuda"), "grid", "scaling-n", "scaling-b", "models"}
        for row in rows.Rows(path).rows
        if row["function"] in OWN and row["reason"] and row["commit"] == commit
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seconds", type=float, default=SECONDS, help="after which all ends")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this command")
    add("--backend", help="of ours; default: triton")
    add("--dtype", nargs="+", default=["bfloat16", "float32"])
    add("--rows", type=Path, help="folder for rows; default: bench/results/<device>")
    add("--no-tests", action="store_true", help="build and test nothing")
    add("--commit", help="for the rows, where there is no git")
    add("--measure", action="store_true", help=argparse.SUPPRESS)
    add("--tiny", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device")
    asked.backend = asked.backend or {"cuda": "triton", "cpu": "cpu"}[asked.device]
    folder = asked.rows or rows.folder(asked.device)
    if not asked.measure:
        return run(asked, asked.device, folder)
    settings = Settings(asked.device, asked.backend, commit=asked.commit)
    if asked.tiny:
        settings = replace(settings, rounds=2, unit_s=0.1, compile=False)
    size = "check" if asked.tiny else "full"
    return measure(settings, folder, asked.seconds, asked.dtype, size)


if __name__ == "__main__":
    raise SystemExit(main())
