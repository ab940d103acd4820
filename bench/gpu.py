"""Speed and memory of the GPU kernels: `python -m bench.gpu [--case NAME ...] [--seconds S]`.

A unit is one pass of one problem, computed in several ways that are timed in turn. Before that,
each way is held against a float64 oracle; its budget is twice what eager PyTorch loses in that
dtype (`bench.ways.budgets`). Rows are written as they come: what cannot run, or is wrong, is a
row with its reason. A run stops when its `--seconds` are over, and the next one with the same
file does what is missing. Speed-ups are computed from the rows, and printed.

    bias     bias+softmax, B*N = 32768, N = 16 ... 2048, bfloat16 and float32; N = 16 and 32 also
             as replays of CUDA graphs
    filter   filter+linear at GeoT's published size
    flex     one molecule of 1600 and of 4096 atoms, 4 heads, 5 Gaussians: pytorch#152593
    memory   forward+backward of one molecule of 2048 and of 4096 atoms

    ours                         the table given; where the pass has its gradient, to the knots
    ours with table              from the Gaussians' weights on
    ours, CUDA C++               `ours` by backend "cuda"
    plain                        `scaled_dot_product_attention`, no geometry: the floor
    SDPA, bias given             the same with a bias in memory, and its gradient, no more
    SDPA, bias recomputed        from the Gaussians' weights on, as all of the following
    eager, compiled eager        distances, Gaussians, bias, softmax, all in memory
    eager MATH                   the backend of PyTorch's attention with a second derivative
    FlexAttention, Gaussians     in `score_mod`
    FlexAttention, table         in `score_mod`, to the knots

Times are by CUDA events over calls in a row, 5 ms or more of them: so where launches take longer
than kernels, they are what is measured. Inputs stay in the caches as far as they fit.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import platform
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import geot_kernels as gk

from . import memory, timing
from .problems import BiasProblem, FilterProblem, Problem, geot_filter, qm9_molecules
from .ways import PASSES, Way, compiled, compiled_force_step

ROUNDS, UNIT_S, WAY_S = 15, 10.0, 150.0
COLUMNS = (
    *("case", "group", "pass", "dtype", "molecules", "atoms", "heads", "head_dim", "gaussians"),
    *("mode", "function", *timing.NUMBERS, "rounds", "extra_memory_mb", "peak_memory_mb"),
    *("worst_result", "relative_error", "error_budget", "reason", "preemptions_per_s"),
    *("backend", "device", "machine", "processor", "threads", "python", "torch", "triton"),
    *("cuda", "geot_kernels", "commit"),
)
OURS, BUILT, PLAIN, GIVEN = "ours", "ours with table", "plain", "SDPA, bias given"
RECOMPUTED, EAGER, MATH = "SDPA, bias recomputed", "eager", "eager MATH"
IN_CUDA = "ours, CUDA C++"
COMPILED, FLEX, FLEX_TABLE = "compiled eager", "FlexAttention, Gaussians", "FlexAttention, table"
GROUPS = {
    "core": (OURS, BUILT, PLAIN, GIVEN),
    "kernels": (OURS, IN_CUDA, PLAIN),
    "plain": (OURS, BUILT, RECOMPUTED, EAGER, MATH),
    "compiled": (OURS, BUILT, COMPILED),
    "flex": (OURS, BUILT, FLEX, FLEX_TABLE),
    "filter": (OURS, BUILT, EAGER),
    "one molecule": (OURS, BUILT, PLAIN, EAGER),
}
RADIAL = {
    OURS: "table",
    IN_CUDA: "table",
    FLEX_TABLE: "table",
    PLAIN: "none",
}  # the oracle; others: "gaussians"
AGAINST_GIVEN = (IN_CUDA, PLAIN, GIVEN, FLEX_TABLE)  # these make no table and no bias: nor do ours
STRICT = (OURS, BUILT, IN_CUDA, PLAIN, FLEX, FLEX_TABLE)  # no radial function in 16 bits
NO_FORCES = (PLAIN, GIVEN)  # which do not know the positions
FORCES_ONLY = (MATH,)


BROKEN = "illegal (memory|instr|addr)|misaligned addr|launch fail|device-side assert|uncorrectable"


@dataclass(frozen=True)
class Shape:
    """Of a problem."""

    case: str
    molecules: int
    atoms: int
    heads: int
    head_dim: int
    gaussians: int = 64


@dataclass(frozen=True)
class Unit:
    """What is timed in turn."""

    shape: Shape
    group: str
    name: str  # of the pass
    dtype: str
    mode: str = "eager"

    def functions(self) -> tuple[str, ...]:
        """Names of the ways."""
        names = GROUPS[self.group]
        if self.mode == "graph":
            return tuple(n for n in names if n != GIVEN)
        left_out = NO_FORCES if self.name == "force_step" else FORCES_ONLY
        if self.shape.case == "filter":
            left_out = (*left_out, PLAIN)
        return tuple(n for n in names if n not in left_out)

    def columns(self) -> dict[str, str]:
        """What identifies its rows, but for the function."""
        shape = {name: str(value) for name, value in vars(self.shape).items()}
        named = {"group": self.group, "pass": self.name, "dtype": self.dtype, "mode": self.mode}
        return {**shape, **named}


@dataclass(frozen=True)
class Sizes:
    """Which shapes there are; the first numbers of atoms come first."""

    first: tuple[int, ...] = (64, 16, 32, 128)
    then: tuple[int, ...] = (2048, 512, 256, 1024)
    total: int = 32768
    heads: tuple[tuple[int, int], ...] = ((8, 32), (32, 16))
    captured: tuple[int, ...] = (16, 32)
    issue: tuple[int, ...] = (1600, 4096)
    growth: tuple[int, ...] = (2048, 4096)
    filter: Shape = Shape("filter", 32, 32, 64, 16, 300)


TINY = Sizes((4,), (6,), 12, ((2, 16),), (4,), (8,), (8, 16), Shape("filter", 2, 24, 2, 4, 300))


@dataclass
class Settings:
    """Of a run."""

    device: str
    backend: str
    sizes: Sizes = field(default_factory=Sizes)
    rounds: int = ROUNDS
    way_s: float = WAY_S
    retry: bool = False
    commit: str | None = None


def plan(
    sizes: Sizes, cases: Sequence[str], dtypes: Sequence[str], passes: Sequence[str], device: str
) -> list[Unit]:
    """The units, the most valuable ones first."""

    def of(shapes: Sequence[Shape], *groups: str, only: Sequence[str] = passes) -> list[Unit]:
        return [
            Unit(shape, group, name, dtype, mode)
            for shape in shapes
            for dtype in dtypes
            if dtype == "float32" or shape.case != "flex"
            for group in groups
            for mode in ("eager", "graph")
            if mode == "eager" or (device, group) == ("cuda", "core")
            if mode == "eager" or shape.atoms in sizes.captured
            for name in only
        ]

    def late(unit: Unit) -> tuple[bool, ...]:
        """Compiling takes long: one dtype, one number of heads and two passes for all N first."""
        heads = unit.shape.heads, unit.shape.head_dim
        return heads != sizes.heads[0], unit.dtype != dtypes[0], unit.name not in passes[:2]

    first, then = (
        [Shape("bias", sizes.total // n, n, *heads) for n in atoms for heads in sizes.heads]
        for atoms in (sizes.first, sizes.then)
    )
    issue = [Shape("flex", 1, n, 4, 32, 5) for n in sizes.issue]
    growth = [Shape("memory", 1, n, 8, 32) for n in sizes.growth]
    both = [name for name in passes if name != "force_step"]
    units = [
        *of(first, "core"),
        *of(first if device == "cuda" else (), "kernels"),
        *of([sizes.filter], "filter", only=both),
        *of([sizes.filter] if device == "cuda" else (), "kernels", only=both),
        *of(issue, "one molecule", only=both),
        *of(growth, "one molecule", only=[n for n in both if n == "backward+table"]),
        *of(then, "core"),
        *of(then if device == "cuda" else (), "kernels"),
        *of([*first, *then], "plain"),
        *of(issue, "flex", only=both),
        *of([sizes.filter], "compiled", only=both),
        *sorted(of(first, "compiled", "flex"), key=late),
        *sorted(of(then, "compiled", "flex"), key=late),
    ]
    return [unit for unit in units if unit.shape.case in cases]


def make_problem(shape: Shape, dtype: str, settings: Settings) -> Problem:
    """The tensors of a shape."""
    options: dict[str, Any] = {"device": settings.device, "dtype": getattr(torch, dtype)}
    if shape.case != "filter":
        sizes = (shape.molecules, shape.atoms, shape.heads, shape.head_dim, shape.gaussians)
        return BiasProblem(*sizes, **options)
    if shape == Sizes.filter:
        return FilterProblem.geot(**options)
    radial = geot_filter(shape.heads * shape.head_dim)
    molecules = qm9_molecules(shape.molecules, shape.atoms)
    return FilterProblem(*molecules, shape.heads, shape.head_dim, radial, **options)


def make_way(problem: Any, function: str, name: str, backend: str) -> Way:
    """A way by its name, for one pass."""
    if function == IN_CUDA:
        return problem.ours("cuda")
    if function in (OURS, BUILT):
        make = problem.ours if function == OURS else problem.ours_building_the_table
        return make(backend)
    if function == COMPILED and name == "force_step":
        return compiled_force_step(problem.eager())
    if function in (COMPILED, FLEX, FLEX_TABLE):
        way = {COMPILED: "eager", FLEX: "flex", FLEX_TABLE: "flex_table"}[function]
        return compiled(getattr(problem, way)(), fresh=False)
    names = {PLAIN: "plain", GIVEN: "bias_given", RECOMPUTED: "bias_recomputed"}
    return getattr(problem, {**names, EAGER: "eager", MATH: "math"}[function])()


class OutOfTime(BaseException):
    """The time of the run is over; nothing may catch it but the run itself."""


class TooSlow(BaseException):
    """One way took too long to prepare."""


class Deadline:
    """Ends what takes too long, by a signal; only in the main thread.

    Args:
        seconds: Of the run, from now on; None: no end.
    """

    def __init__(self, seconds: float | None) -> None:
        self.end = float("inf") if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    @contextlib.contextmanager
    def limit(self, seconds: float = float("inf")) -> Iterator[None]:
        """Raises `OutOfTime`, or `TooSlow` where only these seconds are over."""
        left = self.left()
        if left <= 0:
            raise OutOfTime
        until = min(seconds, left)
        if until == float("inf") or threading.current_thread() is not threading.main_thread():
            yield
            return

        def ring(*_: Any) -> None:
            raise OutOfTime if seconds >= left else TooSlow

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, until)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class BrokenDevice(RuntimeError):
    """After an error on the device, such as an illegal access, nothing more can run there."""


def reason_of(error: BaseException) -> str:
    """Why a way could not run, in a line."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        tried = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
        return f"out of memory{f', for {tried[1]} more' if tried else ''}"
    return f"{type(error).__name__}: {text}"[:300]


def breaks_the_device(error: BaseException) -> bool:
    """Whether an error leaves the device unusable."""
    return re.search(BROKEN, str(error)) is not None


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """A call as a CUDA graph; each replay gives the same tensors, with new numbers in them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


class Failed(Exception):
    """A function failed while it was timed."""

    def __init__(self, function: str, error: Exception) -> None:
        super().__init__(function)
        self.function, self.error = function, error


def guarded(function: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """Says which function it is that fails."""

    @functools.wraps(call)
    def run() -> Any:
        try:
            return call()
        except Exception as error:
            raise Failed(function, error) from error

    return run


class Run:
    """Works through a plan.

    Args:
        rows: Where the rows go.
        settings: Of the run.
        deadline: Of the run.
    """

    def __init__(self, rows: timing.Rows, settings: Settings, deadline: Deadline) -> None:
        self.rows, self.settings, self.deadline = rows, settings, deadline
        self.wrong: list[str] = []
        self._problem: tuple[Any, Problem] | None = None
        self._where = where(settings)

    def unit(self, unit: Unit) -> None:
        """Does what is missing of a unit: nothing, or all that has not failed before."""
        known = {row["function"]: row["reason"] for row in self._rows_of(unit)}
        if self.settings.retry:
            known = {function: reason for function, reason in known.items() if not reason}
        if all(function in known for function in unit.functions()):
            return
        print(", ".join(unit.columns().values()), flush=True)
        try:
            with self.deadline.limit():
                problem = self._make(unit)
                problem.losses(unit.name, "table")
        except torch.OutOfMemoryError as error:
            reason = f"the oracle: {reason_of(error)}"
            self._add(unit, {name: {"reason": reason} for name in unit.functions()})
            return
        if unit.group in ("compiled", "flex"):
            torch._dynamo.reset()
        calls: dict[str, Callable[[], Any]] = {}
        found: dict[str, dict[str, str]] = {}
        for function in unit.functions():
            if not known.get(function):
                self._prepare(problem, unit, function, calls, found)
        self._time(problem, unit, calls, found)

    def _rows_of(self, unit: Unit) -> list[dict[str, str]]:
        wanted = {**unit.columns(), "backend": self.settings.backend}
        wanted["device"] = self._where["device"]
        return [r for r in self.rows.rows if all(r[n] == value for n, value in wanted.items())]

    def _make(self, unit: Unit) -> Problem:
        key = unit.shape, unit.dtype
        if self._problem is None or self._problem[0] != key:
            self._problem = None
            release(self.settings.device)
            self._problem = key, make_problem(*key, self.settings)
        return self._problem[1]

    def _prepare(
        self, problem: Problem, unit: Unit, function: str, calls: dict[str, Any], found: Any
    ) -> None:
        """Makes a way and checks it; what fails is a row at once."""
        try:
            with self.deadline.limit(self.settings.way_s):
                found[function], calls[function] = self._checked(problem, unit, function)
        except TooSlow:
            self._fail(unit, function, f"not ready after {self.settings.way_s:.0f} s")
        except Exception as error:
            self._fail(unit, function, reason_of(error), error)

    def _checked(
        self, problem: Problem, unit: Unit, function: str
    ) -> tuple[dict[str, str], Callable[[], Any]]:
        """What was found out about a way before it is timed, and the function to time."""
        name, on_gpu = unit.name, self.settings.device == "cuda"
        way = make_way(problem, function, name, self.settings.backend).prepare(name)
        call = way.call(name) if unit.mode == "eager" else captured(way.call(name))
        result, error, budget = problem.verify(
            way, name, call(), RADIAL.get(function, "gaussians"), function in STRICT
        )
        row = {"worst_result": result, "relative_error": f"{error:.2g}"}
        row["error_budget"] = f"{budget:.2g}"
        if not error <= budget:
            raise ArithmeticError(f"wrong: {result} is off by {error:.2g}, allowed {budget:.2g}")
        if unit.mode == "eager" and (on_gpu or unit.shape.case in ("flex", "memory")):
            peak, extra = memory.of_a_pass(way, name)
            row |= {"peak_memory_mb": f"{peak:.1f}", "extra_memory_mb": f"{extra:.1f}"}
        return row, guarded(function, call)

    def _time(self, problem: Problem, unit: Unit, calls: dict[str, Any], found: Any) -> None:
        """Times what can run, without those that fail while they are timed."""
        measure = timing.stopwatch(self.settings.device)
        while calls:
            start, before = time.perf_counter(), timing.preemptions()
            try:
                with self.deadline.limit():
                    times = timing.interleaved(
                        calls, self.settings.rounds, measure=measure, at_most_s=UNIT_S
                    )
            except Failed as failed:
                del calls[failed.function]
                self._fail(unit, failed.function, reason_of(failed.error), failed.error)
                continue
            except Exception as error:  # of the device, which does not say whose it is
                self._stop_if_broken(error)
                raise
            lost = (timing.preemptions() - before) / (time.perf_counter() - start)
            for function, values in times.items():
                found[function] |= timing.numbers(values)
                found[function]["preemptions_per_s"] = f"{lost:.1f}"
            self._add(unit, {function: found[function] for function in times})
            return

    def _fail(
        self, unit: Unit, function: str, reason: str, error: Exception | None = None
    ) -> None:
        print(f"  {function}: {reason}", flush=True)
        self._add(unit, {function: {"reason": reason}})
        if function in (OURS, BUILT, IN_CUDA):
            self.wrong.append(f"{', '.join(unit.columns().values())}: {function}: {reason}")
        if error is not None:
            self._stop_if_broken(error)
            error.__traceback__ = None  # which holds tensors
        release(self.settings.device)

    def _stop_if_broken(self, error: Exception) -> None:
        if breaks_the_device(error):
            raise BrokenDevice(reason_of(error)) from error

    def _add(self, unit: Unit, found: dict[str, dict[str, str]]) -> None:
        columns = {**unit.columns(), **self._where}
        self.rows.add({**columns, "function": name, **row} for name, row in found.items())


def release(device: str) -> None:
    """Gives back what earlier ways left behind."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def where(settings: Settings) -> dict[str, str]:
    """On what, and with what, the numbers are measured."""
    found = {
        **timing.provenance(),
        "backend": settings.backend,
        "device": device_name(settings.device),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "",
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    return found if settings.commit is None else {**found, "commit": settings.commit}


def device_name(device: str) -> str:
    """The GPU, or the number of cores in use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} cores"


def default_path(device: str) -> Path:
    """`bench/results/<device>/gpu.csv`."""
    name = device_name(device).lower()
    return Path(__file__).parent / "results" / re.sub(r"\W+", "-", name) / "gpu.csv"


def table(rows: Sequence[dict[str, str]]) -> list[str]:
    """Lines: our times, and how many times as long the other ways take, from the rows alone."""
    units: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    names = [*Unit(Sizes.filter, "", "", "").columns(), "backend", "device"]
    for row in rows:  # a later row takes the place of an earlier one
        units.setdefault(tuple(row[n] for n in names), {})[row["function"]] = row
    lines = []
    for key, found in units.items():
        lines.append(", ".join(key[:-2]))
        lines += [f"    {function:26} {described(function, found)}" for function in found]
    return lines


def described(function: str, found: dict[str, dict[str, str]]) -> str:
    """One row in words, its time against that of ours which does the same."""
    row = found[function]
    if row["reason"]:
        return row["reason"]
    text = "{median_ms} ms ({lower_quartile_ms} to {upper_quartile_ms})".format(**row)
    ours = found.get(OURS if function in AGAINST_GIVEN else BUILT, {})
    if function not in (OURS, BUILT) and ours.get("median_ms"):
        ratio = float(row["median_ms"]) / float(ours["median_ms"])
        text += f", {ratio:.3g}x the time of {ours['function']}"
    return text + (f", {row['extra_memory_mb']} MB extra" if row["extra_memory_mb"] else "")


def run(
    units: Sequence[Unit], rows: timing.Rows, settings: Settings, seconds: float | None
) -> int:
    """Does the units as far as time goes, and prints the table; the exit status."""
    doing = Run(rows, settings, Deadline(seconds))
    commits = {row["commit"] for row in rows.rows} - {where(settings)["commit"]}
    if commits:
        print(f"{rows.path} keeps rows of other commits: {', '.join(sorted(commits))}")
    ended = "done"
    try:
        for unit in units:
            doing.unit(unit)
    except OutOfTime:
        ended = "out of time; the same command continues"
    except BrokenDevice as error:
        ended = f"the device is unusable now ({error}); the same command continues"
    print("\n".join(table(rows.rows)))
    print(ended)
    for line in doing.wrong:
        print(f"OURS FAILED: {line}")
    return 1 if doing.wrong or ended.startswith("the device") else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the plan asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cases, dtypes = ("bias", "filter", "flex", "memory"), ("bfloat16", "float32")
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"))
    add("--backend", choices=("triton", "cuda", "eager", "cpu"))
    add("--case", nargs="+", choices=cases, default=cases, metavar="NAME")
    add("--dtype", nargs="+", choices=dtypes, default=dtypes)
    note = "default: all but training, which has no gradient of positions"
    add("--pass", nargs="+", choices=PASSES, default=PASSES[:-1], dest="passes", help=note)
    add("--group", nargs="+", choices=GROUPS, default=tuple(GROUPS), metavar="NAME")
    add("--seconds", type=float, help="after which the run stops; none: when it is done")
    add("--way-seconds", type=float, default=WAY_S, help="to compile and check one way")
    add("--rounds", type=int, default=ROUNDS)
    add("--out", type=Path, help="CSV file; default: bench/results/<device>/gpu.csv")
    add("--retry", action="store_true", help="what failed before counts as missing")
    add("--commit", help="for the rows, where there is no git")
    add("--tiny", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device")
    backend = asked.backend or {"cuda": "triton", "cpu": "cpu"}[device]
    missing = gk.available_backends(device)[backend]
    if missing is not None:
        parser.error(f"backend {backend} cannot run on {device}: {missing}")
    sizes = TINY if asked.tiny else Sizes()
    limits = asked.rounds, asked.way_seconds, asked.retry
    settings = Settings(device, backend, sizes, *limits, asked.commit)
    units = plan(sizes, asked.case, asked.dtype, asked.passes, device)
    units = [unit for unit in units if unit.group in asked.group]
    rows = timing.Rows(asked.out or default_path(device), COLUMNS)
    return run(units, rows, settings, asked.seconds)


if __name__ == "__main__":
    raise SystemExit(main())
