"""Named cases: every way to compute them, checked, and with `--benchmark` timed in turn."""

from __future__ import annotations

from typing import Any

from .conftest import Bench, conclude
from .engine import Unit


def test_case(unit: Unit, function: str, bench: Bench, benchmark: Any) -> None:
    benchmark.group = str(unit)
    conclude(bench.outcome(unit, function), function, benchmark)
