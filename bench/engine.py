"""Measures units: one pass of one case, computed in several ways that are timed in turn.

Before that, each way is held against a float64 oracle; its budget is twice what eager PyTorch
loses in that dtype (`bench.ways.budgets`). What cannot run, or is wrong, is a row with its reason.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import memory, roofline, rows, timing
from .cases import Case
from .peers import COMPILED, OWN, PEERS, is_float
from .problems import Problem
from .ways import refuse_wrong, verdict

WAY_S = 150.0
WALL_ROUNDS = 5
COLD = "compiled only where it is measured"
QUICK = "not compiled in a quick run"
SLOW = "not ready after"
AGAIN_S = 5.0

BROKEN = "illegal (memory|instr|addr)|misaligned addr|launch fail|device-side assert|uncorrectable"


@dataclass(frozen=True)
class Unit:
    """What is timed in turn.

    Attributes:
        case: At the size it is measured at.
        name: Of the pass.
        dtype: Of the features.
        mode: "eager", or "graph" for replays of a CUDA graph.
    """

    case: Case
    name: str
    dtype: str
    mode: str = "eager"

    def __str__(self) -> str:
        mode = () if self.mode == "eager" else (self.mode,)
        return ", ".join((self.case.name, self.name, self.dtype, *mode))


@dataclass
class Settings:
    """Of a run.

    Attributes:
        device: "cuda" or "cpu".
        backend: Of ours.
        rounds: Numbers of each way, at most.
        unit_s: Seconds to time the ways of a unit in.
        way_s: Seconds to compile and check one way.
        stable: How well each median is to be known, as a share of it.
        quick: Compile only in cases that say so.
        compile: Whether to compile anything.
        commit: Where there is no git.
    """

    device: str
    backend: str
    rounds: int = 25
    unit_s: float = 10.0
    way_s: float = WAY_S
    stable: float = timing.STABLE
    quick: bool = False
    compile: bool = True
    commit: str | None = None


@dataclass
class Outcome:
    """Of a way in a unit.

    Attributes:
        row: Its columns.
        reason: Why there is no time; "" where there is one.
        times: Microseconds of one call.
    """

    row: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    times: list[float] = field(default_factory=list)


class OutOfTime(BaseException):
    """The time of the run is over; nothing may catch it but the run itself."""


class TooSlow(BaseException):
    """One way took too long to prepare."""


class BrokenDevice(RuntimeError):
    """After an error on the device, such as an illegal access, nothing more can run there.

    Args:
        reason: What it said.
        function: The way that broke it; "" where that is not known.
    """

    def __init__(self, reason: str, function: str = "") -> None:
        super().__init__(reason)
        self.function = function


class Deadline:
    """Ends what takes too long, by a signal; only in the main thread.

    Args:
        seconds: Of the run, from now on; None: no end.
    """

    def __init__(self, seconds: float | None = None) -> None:
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
        signal.setitimer(signal.ITIMER_REAL, until, AGAIN_S)  # a finalizer may swallow one
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def reason_of(error: BaseException) -> str:
    """Why a way could not run, in a line."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in text:
        tried = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
        return f"out of memory{f', for {tried[1]} more' if tried else ''}"
    debug = re.search(r"Developer debug context: (.+?)(?: For more details|$)", text)
    text = debug[1] if debug else text  # what Dynamo says before that is the same for all
    return f"{type(error).__name__}: {text}"[:300]


class _Failed(Exception):
    """A function failed while it was timed."""

    def __init__(self, function: str, error: Exception) -> None:
        super().__init__(function)
        self.function, self.error = function, error


def _guarded(function: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """Says which function it is that fails."""

    @functools.wraps(call)
    def run() -> Any:
        try:
            return call()
        except Exception as error:
            raise _Failed(function, error) from error

    return run


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


class Engine:
    """Checks and times the ways of units.

    Args:
        settings: Of the run.
        deadline: Of the run.
    """

    def __init__(self, settings: Settings, deadline: Deadline | None = None) -> None:
        self.settings, self.deadline = settings, deadline or Deadline()
        self._where = rows.where(settings.device, settings.backend, settings.commit)
        self._problem: tuple[Any, Problem] | None = None

    def columns(self, unit: Unit) -> dict[str, str]:
        """What identifies the rows of a unit, but for the function."""
        case = unit.case
        molecules, atoms, real = case.shape
        return {
            **self._where,
            **{"case": case.name, "pass": unit.name, "dtype": unit.dtype, "mode": unit.mode},
            **{"molecules": str(molecules), "atoms": str(atoms), "heads": str(case.heads)},
            **{"head_dim": str(case.head_dim), "gaussians": str(case.gaussians)},
            "mean_atoms": f"{real:.4g}",
        }

    def check(self, unit: Unit, function: str) -> Outcome:
        """Computes a way once and holds it against the oracle."""
        outcome = Outcome()
        self._prepare(unit, function, outcome, remember=False)
        return self._finished(unit, function, outcome)

    def measure(self, unit: Unit, functions: Sequence[str]) -> dict[str, Outcome]:
        """Checks ways, and times in turn those that can run."""
        if any(PEERS[function].compiles for function in functions):
            torch._dynamo.reset()
        calls: dict[str, Callable[[], Any]] = {}
        found = {function: Outcome() for function in functions}
        for function, outcome in found.items():
            call = self._prepare(unit, function, outcome, remember=True)
            if call is not None:
                calls[function] = call
        self._time(calls, found)
        return {name: self._finished(unit, name, outcome) for name, outcome in found.items()}

    def _finished(self, unit: Unit, function: str, outcome: Outcome) -> Outcome:
        outcome.row |= {**self.columns(unit), "function": function, "reason": outcome.reason}
        if function in OWN and not outcome.reason:
            outcome.row |= least_work(self._make(unit), unit.name)
        return outcome

    def _make(self, unit: Unit) -> Problem:
        key = unit.case, unit.dtype
        if self._problem is None or self._problem[0] != key:
            self._problem = None
            release(self.settings.device)
            self._problem = key, unit.case.problem(self.settings.device, is_float(unit.dtype))
        return self._problem[1]

    def _prepare(
        self, unit: Unit, function: str, outcome: Outcome, remember: bool
    ) -> Callable[[], Any] | None:
        """Makes a way and checks it; None, with the reason, where that fails."""
        error: Exception | None = None
        try:
            with self.deadline.limit():
                problem = self._make(unit)  # and the oracle, outside a way's limit
                outcome.reason = self._why_not(unit, function, problem)
                if outcome.reason:
                    return None
                problem.losses(unit.name, "table")
                problem.expected(unit.name, PEERS[function].oracle)
            with self.deadline.limit(self.settings.way_s):
                return self._checked(unit, function, outcome, remember)
        except TooSlow:
            outcome.reason = f"{SLOW} {self.settings.way_s:.0f} s"
        except Exception as failure:
            error, outcome.reason = failure, reason_of(failure)
        if error is not None:
            self._stop_if_broken(error, function)
            error.__traceback__ = None  # which holds tensors
        release(self.settings.device)
        return None

    def _why_not(self, unit: Unit, function: str, problem: Problem) -> str:
        """Why a way is not tried; "" where it is."""
        peer = PEERS[function]
        reason = peer.why_not(problem)
        if reason or not peer.compiles:
            return reason or ""
        if not self.settings.compile:
            return COLD
        waits = unit.case.compiles and unit.name != "force_step" and function == COMPILED
        return QUICK if self.settings.quick and not waits else ""

    def _checked(
        self, unit: Unit, function: str, outcome: Outcome, remember: bool
    ) -> Callable[[], Any]:
        """Makes a way, and holds its results against the oracle."""
        problem, peer, name = self._make(unit), PEERS[function], unit.name
        way = peer.make(problem, name, self.settings.backend).prepare(name)
        call = way.call(name) if unit.mode == "eager" else captured(way.call(name))
        worst = problem.verify(way, name, call(), peer.oracle, peer.strict, peer.tabulates)
        outcome.row |= verdict(*worst)
        refuse_wrong(*worst)
        if remember and unit.mode == "eager":
            peak, extra = memory.of_a_pass(way, name)
            outcome.row |= {"peak_memory_mb": f"{peak:.1f}", "extra_memory_mb": f"{extra:.1f}"}
        return _guarded(function, call)

    def _time(self, calls: dict[str, Callable[[], Any]], found: dict[str, Outcome]) -> None:
        """Times what can run, without those that fail while they are timed."""
        settings = self.settings
        while calls:
            others = timing.watch()
            try:
                with self.deadline.limit():
                    times = timing.interleaved(
                        calls,
                        settings.rounds,
                        measure=timing.stopwatch(settings.device),
                        at_most_s=settings.unit_s,
                        stable=settings.stable,
                    )
                    walls = self._walls(calls, times)
            except _Failed as failed:
                del calls[failed.function]
                found[failed.function].reason = reason_of(failed.error)
                self._stop_if_broken(failed.error, failed.function)
                release(settings.device)
                continue
            except Exception as error:  # of the device, which does not say whose it is
                self._stop_if_broken(error)
                raise
            busy = others()
            for function, values in times.items():
                found[function].times = values
                found[function].row |= rows.numbers(values)
                found[function].row["other_cores"] = busy
                found[function].row["wall_ms"] = f"{walls[function] / 1e3:.4g}"
            return

    def _walls(self, calls: timing.Functions, times: timing.Times) -> dict[str, float]:
        """Median microseconds of one call by the clock, until the device is done."""
        if self.settings.device != "cuda":
            return {name: rows.quartiles(values)[1] for name, values in times.items()}
        wall = timing.wall_us(time.perf_counter, torch.cuda.synchronize)
        return {
            name: rows.quartiles([wall(call, 1) for _ in range(WALL_ROUNDS)])[1]
            for name, call in calls.items()
        }

    def _stop_if_broken(self, error: Exception, function: str = "") -> None:
        if re.search(BROKEN, str(error)) is not None:
            raise BrokenDevice(reason_of(error), function) from error


def least_work(problem: Problem, name: str) -> dict[str, str]:
    """Columns: what a pass must at least move and compute."""
    molecules, atoms, heads, dim = problem.features[0].shape
    counts = [atoms] * molecules if problem.mask is None else problem.mask.sum(1).tolist()
    least = roofline.cost(
        name,
        pairs=sum(n * n for n in counts),
        atoms=sum(counts),
        heads=heads,
        head_dim=dim,
        score=problem.score,
        table_bytes=problem.table.knots.nbytes,
        dtype=problem.cotangent.dtype,
    )
    return {
        "least_traffic_mb": f"{least.least_traffic_bytes / 1e6:.4g}",
        "gflop": f"{least.operations / 1e9:.4g}",
    }


def release(device: str) -> None:
    """Gives back what earlier ways left behind."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
