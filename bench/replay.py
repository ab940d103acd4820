"""A clock for pytest-benchmark that shows times measured before.

pytest-benchmark times one function after the other; here functions are timed in turn, first. Then
each test replays its numbers by this clock, so tables, `--benchmark-json` and
`--benchmark-compare` are those of pytest-benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_seconds = 0.0


def now() -> float:
    """The time that this clock shows, seconds."""
    return _seconds


def replay(benchmark: Any, times: Sequence[float]) -> None:
    """Hands measured times to the fixture `benchmark`.

    Args:
        benchmark: The fixture, whose timer is `now`.
        times: Microseconds of one call.
    """
    left = iter(times)

    def call() -> None:
        global _seconds
        _seconds += next(left) / 1e6

    benchmark.pedantic(call, rounds=len(times))
