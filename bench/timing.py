"""Timing functions in turn; rows of a file and lines of a report made of the times."""

from __future__ import annotations

import csv
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import geot_kernels as gk

SAMPLE_US = 5000.0  # as many calls make one number
SLOW_US = 50_000.0  # one call slower than that makes a number without an untimed one before it
WARM_UP = 3
FEWEST = 5  # rounds, however slow
IDLE = 30.0  # preemptions a second; with more of them, other processes take part in the times

NUMBERS = ("min_ms", "lower_quartile_ms", "median_ms", "upper_quartile_ms")
COLUMNS = (
    "case",
    "function",
    *NUMBERS,
    "extra_memory_mb",
    "rounds",
    "preemptions_per_s",
    "threads",
    "machine",
    "processor",
    "torch",
    "geot_kernels",
    "commit",
)

Functions = dict[str, Callable[[], Any]]
Times = dict[str, list[float]]  # us of one call, by round
Stopwatch = Callable[[Callable[[], Any], int], float]  # function and number of calls to us of one


def cuda_us(function: Callable[[], Any], number: int) -> float:
    """Microseconds of one call on the current CUDA device, by events; calls may overlap there."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(number):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / number


def wall_us(clock: Callable[[], float]) -> Stopwatch:
    """Microseconds of one call by a clock of seconds."""

    def measure(function: Callable[[], Any], number: int) -> float:
        start = clock()
        for _ in range(number):
            function()
        return (clock() - start) / number * 1e6

    return measure


def stopwatch(device: str) -> Stopwatch:
    """How time is taken on a type of device."""
    return cuda_us if device == "cuda" else wall_us(time.perf_counter)


def interleaved(
    functions: Functions,
    rounds: int,
    *,
    calls: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
    measure: Stopwatch | None = None,
    at_most_s: float = float("inf"),
) -> Times:
    """Times each function in turn, round by round.

    Before a function is timed it is called once untimed: that brings back to the caches what
    the others displaced. Functions slower than 50 ms go without.

    Args:
        functions: By name.
        rounds: Numbers to take of each.
        calls: Calls that make one number; None: as many as take 5 ms.
        clock: Seconds.
        measure: Takes the place of `clock`, as `cuda_us`.
        at_most_s: After that time no further round begins, unless there are fewer than 5.

    Returns:
        Microseconds of one call, by name and round.
    """
    first = measure or wall_us(time.perf_counter)
    measure = measure or wall_us(clock)
    speeds = {name: _first_sight(function, first) for name, function in functions.items()}
    times: Times = {name: [] for name in functions}
    until = time.perf_counter() + at_most_s
    for number in range(rounds):
        if number >= FEWEST and time.perf_counter() > until:
            break
        for name, function in functions.items():
            if speeds[name] < SLOW_US:
                function()
            times[name].append(measure(function, calls or max(round(SAMPLE_US / speeds[name]), 1)))
    return times


def _first_sight(function: Callable[[], Any], measure: Stopwatch) -> float:
    """Warms a function up and says about how many microseconds a call takes."""
    return min(measure(function, 1) for _ in range(WARM_UP))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of a single value, that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


@dataclass(frozen=True)
class Goal:
    """Two functions to compare, or one to hold against a time, and what is to be reached.

    Attributes:
        ours: Name of a function.
        opponent: Name of another; "" holds the median of `ours`, in us, against `at_most`.
        at_most: For `ours / opponent`.
        at_least: For `opponent / ours`.
        note: Printed with the goal.
    """

    ours: str
    opponent: str = ""
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    def line(self, times: Times) -> str:
        """What, both times, the ratio, the goal, and whether it is met."""
        names = [name for name in (self.ours, self.opponent) if name]
        shown = [f"{name} {_milliseconds(times[name])}" for name in names]
        value, text = self.value(times)
        if self.at_most is None and self.at_least is None:
            goal = "no goal"
        else:
            limit = f"<= {self.at_most:g}" if self.at_least is None else f">= {self.at_least:g}"
            goal = f"goal {limit}{self.note}: {'met' if self.met(value) else 'NOT MET'}"
        return f"  {' | '.join([*shown, text, goal])}"

    def value(self, times: Times) -> tuple[float, str]:
        """The number that the goal is about, computed from medians, and how it is printed."""
        ours = quartiles(times[self.ours])[1]
        if not self.opponent:
            return ours, f"{ours:.1f} us"
        opponent = quartiles(times[self.opponent])[1]
        if self.at_most is not None or (self.at_least is None and ours > opponent):
            return ours / opponent, f"{ours / opponent:.2f}x its time"
        return opponent / ours, f"{opponent / ours:.3g}x faster"

    def met(self, value: float) -> bool:
        """Whether the goal is reached."""
        if self.at_most is not None and value > self.at_most:
            return False
        return self.at_least is None or value >= self.at_least


def _milliseconds(values: Sequence[float]) -> str:
    low, median, high = (f"{value / 1e3:.4g}" for value in quartiles(values))
    return f"{median} ms ({low} to {high})"


def numbers(values: Sequence[float]) -> dict[str, str]:
    """The columns that say how long a call took."""
    low, median, high = quartiles(values)
    shown = [f"{us / 1e3:.4g}" for us in (min(values), low, median, high)]
    return {**dict(zip(NUMBERS, shown, strict=True)), "rounds": str(len(values))}


class Report:
    """Collects the rows of a run and prints its lines.

    Args:
        rounds: Numbers to take of each function.
    """

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.rows: list[dict[str, str]] = []

    def measure(self, case: str, functions: Functions, goals: Iterable[Goal]) -> None:
        """Times the functions of a case and prints a line for each goal."""
        start, before = time.perf_counter(), preemptions()
        times = interleaved(functions, self.rounds)
        preempted = (preemptions() - before) / (time.perf_counter() - start)
        print(case)
        if preempted > IDLE:
            print(f"  other processes are running: preempted {preempted:.0f} times a second")
        for goal in goals:
            print(goal.line(times), flush=True)
        for name, values in times.items():
            self._add(case, name, **numbers(values), preemptions_per_s=f"{preempted:.1f}")

    def memory(self, case: str, function: str, megabytes: float, at_most: float) -> None:
        """Prints and keeps a measured size."""
        word = "met" if megabytes <= at_most else "NOT MET"
        print(f"{case}\n  {function} | {megabytes:.1f} MB | goal <= {at_most:g}: {word}")
        self._add(case, function, extra_memory_mb=f"{megabytes:.1f}", rounds="1")

    def _add(self, case: str, function: str, **values: str) -> None:
        given = {"case": case, "function": function, **values, **provenance()}
        self.rows.append({column: given.get(column, "") for column in COLUMNS})

    def write(self, path: Path) -> None:
        """Writes the rows."""
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


class Rows:
    """Rows of a file to which a run adds, each as soon as it is known.

    Args:
        path: CSV file; rows that it has are kept, and are in `rows`.
        columns: Its header.

    Raises:
        ValueError: The file has other columns.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, tuple(columns)
        self.rows: list[dict[str, str]] = []
        if not path.exists() or not path.read_text():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(",".join(columns) + "\n")
            return
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != self.columns:
                raise ValueError(f"{path} has other columns than this version writes")
            self.rows = list(reader)

    def add(self, rows: Iterable[dict[str, str]]) -> None:
        """Appends rows to the file; columns not given stay empty."""
        full = [{column: row.get(column, "") for column in self.columns} for row in rows]
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerows(full)
        self.rows += full


def provenance() -> dict[str, str]:
    """Where and with what a number was measured."""
    return {
        "threads": str(torch.get_num_threads()),
        "machine": platform.machine(),
        "processor": _processor(),
        "torch": torch.__version__,
        "geot_kernels": gk.__version__,
        "commit": _commit(),
    }


def preemptions() -> int:
    """How often the system took the processor away from a thread of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    """The commit checked out, with `-dirty` where files differ from it; "" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
