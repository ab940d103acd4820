"""Timing functions in turn, until their medians are known."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .rows import quartiles

STAT = Path("/proc/stat")
SAMPLE_US = 5000.0  # as many calls make one number
SLOW_US = 50_000.0  # one call slower than that makes a number without an untimed one before it
WARM_UP = 3
FEWEST = 5  # rounds, however slow
STABLE = 0.02  # share of itself to which a median is to be known

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


def wall_us(clock: Callable[[], float], wait: Callable[[], None] | None = None) -> Stopwatch:
    """Microseconds of one call by a clock of seconds, until the device is done."""

    def measure(function: Callable[[], Any], number: int) -> float:
        if wait is not None:
            wait()
        start = clock()
        for _ in range(number):
            function()
        if wait is not None:
            wait()
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
    stable: float = 0.0,
) -> Times:
    """Times each function in turn, round by round.

    Before a function is timed it is called once untimed: that brings back to the caches what
    the others displaced. Functions slower than 50 ms go without.

    Args:
        functions: By name.
        rounds: Numbers to take of each, at most.
        calls: Calls that make one number; None: as many as take 5 ms.
        clock: Seconds.
        measure: Takes the place of `clock`, as `cuda_us`.
        at_most_s: After that time no further round begins, unless there are fewer than 5.
        stable: After 5 rounds, the last one is that after which each median is known to this
            share of itself (`uncertainty`).

    Returns:
        Microseconds of one call, by name and round.
    """
    first = measure or wall_us(time.perf_counter)
    measure = measure or wall_us(clock)
    speeds = {name: _first_sight(function, first) for name, function in functions.items()}
    times: Times = {name: [] for name in functions}
    until = time.perf_counter() + at_most_s
    for number in range(rounds):
        known = all(uncertainty(values) <= stable for values in times.values())
        if number >= FEWEST and (known or time.perf_counter() > until):
            break
        for name, function in functions.items():
            if speeds[name] < SLOW_US:
                function()
            times[name].append(measure(function, calls or max(round(SAMPLE_US / speeds[name]), 1)))
    return times


def uncertainty(values: Sequence[float]) -> float:
    """Half the 95 % interval of a median, relative to it: `1.57 IQR / sqrt(n)`, as of a notch.

    Source: McGill, Tukey and Larsen, Variations of box plots, Am. Stat. 32, 12 (1978).
    """
    if len(values) < FEWEST:
        return float("inf")
    low, median, high = quartiles(values)
    return 1.57 * (high - low) / len(values) ** 0.5 / median


def _first_sight(function: Callable[[], Any], measure: Stopwatch) -> float:
    """Warms a function up and says about how many microseconds a call takes."""
    return min(measure(function, 1) for _ in range(WARM_UP))


def elsewhere_s() -> float:
    """Processor time, s, that all other processes have taken so far (Linux; else 0).

    How often a process is preempted says little: with as many threads as cores the system's own
    upkeep preempts one of them some hundred times a second.
    """
    if not STAT.exists():
        return 0.0
    user, nice, system, _, _, *interrupts = map(int, STAT.read_text().split()[1:9])
    ticks = user + nice + system + sum(interrupts)
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def watch() -> Callable[[], str]:
    """Begins to watch other processes; what it returns gives the column `other_cores`."""
    start, before = time.perf_counter(), elsewhere_s()
    return lambda: f"{(elsewhere_s() - before) / (time.perf_counter() - start):.2f}"
