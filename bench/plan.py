"""What `bench.gpu` measures, in which order; what has a row is done, what breaks is a row.

All units first, the most telling ones foremost; then whole models and growth; then, with all ways
again, what takes compiling. A way that breaks the device, or ends the process, leaves a row that
says so, and the next process goes on without it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import models, roofline, rows, scaling
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

FIRST = ("grid-512x64-8", "grid-1024x32-8", "grid-2048x16-8", "grid-256x128-8")
BROKEN = 3  # exit status
OFTEN = 2  # times that a way breaks the device before it is left out elsewhere
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
