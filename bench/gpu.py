"""Everything that a GPU must answer: `python -m bench.gpu [--seconds S]`, in 9 minutes.

From a bare checkout with torch, triton, numpy, pytest, pytest-benchmark and a compiler; nothing
is installed. In this order, each stage in processes of its own:

    build      the CUDA kernels for this GPU; beside it the tests of Triton's
    tests      the others marked gpu
    measure    limits of the machine, all cases, the most telling ones first, whole models, growth,
               then cases again with what has to be compiled
    summary    environment, tests, what failed, tables, the static report beside measured times

Rows are written as they come, to `bench/results/<device>`. When time is over, the same command
does what is missing: what has a row of the same commit is done, and tests that passed are. What
breaks the device, or ends the process, is a row that says so, and a fresh process goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import models, ratios, report, roofline, rows, scaling, static_times
from .cases import CASES, all_cases, grid
from .engine import BROKEN as BREAKS
from .engine import (
    BrokenDevice,
    Deadline,
    Engine,
    OutOfTime,
    Settings,
    Unit,
    reason_of,
    release,
)
from .peers import BUILT, COMPILED, OURS, OWN, PEERS, functions
from .ways import MEASURED

ROOT = Path(__file__).parents[1]
SECONDS = 520.0
SUMMARY_S, TESTS_S, BUILD_S, SLACK_S = 20.0, 150.0, 150.0, 20.0
SHOWN = 25  # lines
TESTS = ROOT / "tests"
FIRST = ("grid-512x64-8", "grid-1024x32-8", "grid-2048x16-8", "grid-256x128-8")
BROKEN, RESTARTS, OFTEN = 3, 10, 2
BROKE = "broke the device"
MARKER = "running.json"
FILES = {*CASES, "grid", "scaling-n", "scaling-b", "models"}


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
        for name in MEASURED
    ]
    small = [case for case in cases if case.file == "grid" and case.atoms <= 32]
    replays = [
        Task(Unit(case, name, dtype, "graph"), (OURS, BUILT, "plain"))
        for case in small
        for dtype in dtypes
        for name in MEASURED[:2]
        if device == "cuda"
    ]
    telling = {found[name].of_size(size) for name in [*first[:2], *CASES]}
    compiled = [
        replace(task, functions=ways(task.unit.name, True))
        for task in tasks
        if task.unit.case in telling
    ]
    return [*tasks, *replays, *compiled]


class Results:
    """Files of rows, and what stands in them already.

    Args:
        folder: Of the device.
        commit: Of the rows of this run.
    """

    def __init__(self, folder: Path, commit: str) -> None:
        self.folder, self.commit = folder, commit

    def add(self, file: str, found: Iterable[dict[str, str]]) -> None:
        """Writes rows, with the commit."""
        made = [{**row, "commit": self.commit} for row in found]
        rows.Rows(self.folder / f"{file}.csv").add(made)

    def of(self, file: str, **like: str) -> dict[str, dict[str, str]]:
        """Rows of this commit by function."""
        wanted = {**like, "commit": self.commit}
        return {
            row["function"]: row
            for row in rows.Rows(self.folder / f"{file}.csv").rows
            if all(row.get(name) == value for name, value in wanted.items())
        }

    def broken(self) -> Counter[tuple[str, str, str]]:
        """How often a way has broken the device, by pass and dtype."""
        found = [
            (row["function"], row["pass"], row["dtype"])
            for path in self.folder.glob("*.csv")
            if path.stem in FILES
            for row in rows.Rows(path).rows
            if row["commit"] == self.commit and row["reason"].startswith(BROKE)
        ]
        return Counter(found)

    @contextlib.contextmanager
    def marked(self, file: str, names: Sequence[str], columns: dict[str, str]) -> Iterator[None]:
        """While this lasts, a file says what is running: for `ended`, if the process dies."""
        marker = self.folder / MARKER
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps({"file": file, "names": names, "columns": columns}))
        yield
        marker.unlink()

    def ended(self) -> None:
        """Gives what was running when a process died a row of its own."""
        marker = self.folder / MARKER
        if marker.exists():
            found = json.loads(marker.read_text())
            columns = {**found["columns"], "reason": f"{BROKE}, or the process: it ended here"}
            self.add(found["file"], [{**columns, "function": name} for name in found["names"]])
            marker.unlink()


def measure(
    settings: Settings, folder: Path, seconds: float, dtypes: Sequence[str], size: str = "full"
) -> int:
    """Measures what has no row yet; the exit status."""
    deadline = Deadline(seconds)
    where = rows.where(settings.device, settings.backend, settings.commit)
    results = Results(folder, where["commit"])
    results.ended()
    engine = Engine(settings, deadline)
    tasks = plan(settings.device, settings.backend, dtypes, size)
    quick = size != "full"
    first = [task for task in tasks if not compiles(task)]
    stages: list[Callable[[], None]] = [
        lambda: machine(results, settings.device, quick),
        lambda: units(engine, results, first),
        lambda: others(engine, results, quick),
        lambda: units(engine, results, [task for task in tasks if compiles(task)]),
    ]
    try:
        for stage in stages:
            with deadline.limit():
                pass
            stage()
    except OutOfTime:
        print("out of time; the same command continues", flush=True)
        (folder / MARKER).unlink(missing_ok=True)
    except BrokenDevice as error:
        print(f"the device is unusable now: {error}", flush=True)
        (folder / MARKER).unlink(missing_ok=True)
        return BROKEN
    return 0


def compiles(task: Task) -> bool:
    """Whether a task compiles."""
    return any(PEERS[name].compiles for name in task.functions)


def machine(results: Results, device: str, quick: bool) -> None:
    """The limits of the machine."""
    table = rows.Rows(
        results.folder / "machine.csv", roofline.MACHINE_COLUMNS, roofline.MACHINE_KEY
    )
    if any(row["commit"] == results.commit for row in table.rows):
        return
    try:
        table.add([{**r, "commit": results.commit} for r in roofline.machine(device, quick)])
    except Exception as error:  # the cases are worth more than the roofline
        print(f"machine: {reason_of(error)}", flush=True)


def units(engine: Engine, results: Results, tasks: Sequence[Task]) -> None:
    """Measures what is missing of some tasks."""
    for task in tasks:
        unit, file = task.unit, task.unit.case.file or task.unit.case.name
        columns = engine.columns(unit)
        known = results.of(file, **{name: columns[name] for name in rows.UNIT})
        if set(task.functions) <= set(known):
            continue
        often = results.broken()
        broken = {n for n, row in known.items() if row["reason"].startswith(BROKE)}
        broken |= {n for n in task.functions if often[n, unit.name, unit.dtype] >= OFTEN}
        reason = {"reason": f"{BROKE} in other cases"}
        results.add(file, [{**columns, "function": n, **reason} for n in broken - set(known)])
        names = [name for name in task.functions if name not in broken]
        with results.marked(file, [n for n in names if n not in known], columns):
            one_unit(engine, results, Task(unit, tuple(names)))


def one_unit(engine: Engine, results: Results, task: Task) -> None:
    """Measures a unit, and writes its rows."""
    unit, file = task.unit, task.unit.case.file or task.unit.case.name
    columns = engine.columns(unit)
    try:
        found = engine.measure(unit, task.functions)
    except BrokenDevice as error:
        guilty = [error.function] if error.function else task.functions
        reason = {"reason": f"{BROKE}: {error}"}
        results.add(file, [{**columns, "function": name, **reason} for name in guilty])
        raise
    except Exception as error:
        reason = {"reason": reason_of(error)}
        results.add(file, [{**columns, "function": name, **reason} for name in task.functions])
        print(f"{unit}: {reason}", flush=True)
        release(engine.settings.device)
        return
    results.add(file, [outcome.row for outcome in found.values()])
    shown = [name for name in (OURS, "plain", COMPILED) if name in found]
    texts = [f"{name} {found[name].row.get('median_ms') or found[name].reason}" for name in shown]
    print(f"{unit}: {', '.join(texts)}", flush=True)


def others(engine: Engine, results: Results, quick: bool) -> None:
    """Whole models, and growth with N and with B, as far as they have no rows."""
    device, backend = engine.settings.device, engine.settings.backend
    size = "quick" if quick else "full"
    for name in models.MODELS:
        if not results.of("models", case=name):
            with engine.deadline.limit():
                chunk(
                    *(results, "models", name),
                    lambda name=name: [
                        models.measure(name, size, device, torch.float32, backend, 25, 8.0)
                    ],
                )
    kinds = {
        "scaling-n": [(1, n) for n in scaling.sizes_n(device, quick)],
        "scaling-b": [(b, scaling.SMALL) for b in scaling.sizes_b(device, quick)],
    }
    for file, shapes in kinds.items():
        for molecules, atoms in shapes:
            like = {"molecules": str(molecules), "atoms": str(atoms), "pass": MEASURED[-1]}
            if results.of(file, **like):
                continue
            one = scaling.Size(file, molecules, atoms, device, backend, "float32", quick, 2.0)
            with engine.deadline.limit():
                chunk(results, file, f"{molecules} x {atoms}", one.measure)


def chunk(
    results: Results, file: str, name: str, make: Callable[[], Iterable[list[dict[str, str]]]]
) -> None:
    """Writes rows as they are made; an error ends these, not the run."""
    try:
        for found in make():
            results.add(file, found)
    except Exception as error:
        print(f"{file}, {name}: {reason_of(error)}", flush=True)
        if re.search(BREAKS, str(error)):
            raise BrokenDevice(reason_of(error)) from error
    else:
        print(f"{file}, {name}: measured", flush=True)


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
    return [*lines, f"system: {platform.platform()}"]


class Stage:
    """A command in a process of its own.

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
        # A pipe that nobody reads would fill up.
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.lines: list[str] = []

    def wait(self) -> int:
        """The exit status; 124 where time was over."""
        try:
            status = self._process.wait(max(self.end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # what it has started, too
            self._process.wait()
            status = 124
        self._output.seek(0)
        self.lines = self._output.read().splitlines()
        self._output.close()
        print(f"== {self.title}: exit status {status}", flush=True)
        print("\n".join(self.lines[-SHOWN:]), flush=True)
        return status


def run(asked: argparse.Namespace, device: str, folder: Path) -> int:
    """All stages; 1 where something of ours failed."""
    deadline = Deadline(asked.seconds)

    def stage(title: str, *command: str, seconds: float, **variables: str) -> Stage:
        left = max(min(seconds, deadline.left() - SUMMARY_S), 1.0)
        return Stage(title, [sys.executable, "-m", *command], left, variables)

    print("\n".join(environment(device)), flush=True)
    summary: list[str] = []
    failed = False
    done = folder / f"tests-passed-{asked.commit or rows.where(device)['commit']}"
    if device == "cuda" and not asked.no_tests and not done.exists():
        for tests in build_and_test(stage):
            failed |= tests.wait() != 0
            found = [line for line in tests.lines if re.search("FAILED|ERROR", line)]
            summary += [f"{tests.title}: {line}" for line in [*found[-SHOWN:], *tests.lines[-1:]]]
        if not failed:
            folder.mkdir(parents=True, exist_ok=True)
            done.touch()
    for _ in range(RESTARTS):
        seconds = deadline.left() - SUMMARY_S
        if seconds < 2 * SLACK_S:
            break
        options = ["--measure", "--seconds", f"{seconds - SLACK_S:.0f}", *passed_on(asked)]
        measuring = stage("measure", "bench.gpu", *options, seconds=seconds)
        status = measuring.wait()
        if status in (0, 124):
            break
        failed = True
        summary.append(f"the process that measures ended with {status} and was started again")
    wrong = failures(folder, rows.where(device, asked.backend, asked.commit)["commit"])
    print("\n".join(["", "== summary", *environment(device), *summary, *wrong]), flush=True)
    with contextlib.suppress(Exception):  # what was measured is written, whatever happens here
        print("\n".join(tables(folder)), flush=True)
    return 1 if failed or wrong else 0


def tables(folder: Path) -> list[str]:
    """What the rows say."""
    device_rows = ratios.read(folder)
    if not device_rows.rows():
        return ["no rows"]
    report.write(device_rows)
    return [*report.summary(device_rows).splitlines(), *static_times.table(folder)]


def build_and_test(stage: Callable[..., Stage]) -> Iterator[Stage]:
    """Builds the CUDA kernels while Triton's are tested, then tests the rest."""
    parallel = ("-n", "6") if importlib.util.find_spec("xdist") else ()
    arch = ".".join(map(str, torch.cuda.get_device_capability()))
    build = stage("build", "geot_kernels", "build", seconds=BUILD_S, TORCH_CUDA_ARCH_LIST=arch)
    files = [str(x) for x in sorted(TESTS.glob("test_*.py")) if "mark.gpu" in x.read_text()]
    test = ("pytest", *files, "-m", "gpu", "-v", "--tb=line", *parallel, "-k")
    triton = stage("tests of Triton", *test, "triton", seconds=TESTS_S)
    yield build
    others = stage("other tests", *test, "not triton", seconds=TESTS_S)
    yield triton
    yield others


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
        if path.stem in FILES
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
    elif asked.device == "cuda":
        settings = replace(settings, unit_s=2.5)
    size = "check" if asked.tiny else "full"
    return measure(settings, folder, asked.seconds, asked.dtype, size)


if __name__ == "__main__":
    raise SystemExit(main())
