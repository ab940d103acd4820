"""Time and memory against the number of atoms and of molecules; whole models."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from . import models, scaling
from .conftest import Bench, wanted

SECONDS = {True: 0.3, False: 6.0}  # for a size, in a quick run or not


def _write(bench: Bench, file: str, chunks: Iterable[list[dict[str, str]]]) -> None:
    for found in chunks:
        bench.add(file, found)
        for row in found:
            assert row.get("median_ms") or row.get("reason") or row.get("extra_memory_mb")
            assert not (row["function"] == "ours" and row.get("reason")), row["reason"]


@pytest.mark.parametrize("file", ["scaling-n", "scaling-b"])
def test_scaling(file: str, bench: Bench, pytestconfig: pytest.Config) -> None:
    options = bench.options
    if not options.benchmark:
        pytest.skip("nothing to check beyond tests/test_bench_scaling.py")
    if not wanted(pytestconfig, file):
        pytest.skip("not asked for")
    measure = {"scaling-n": scaling.measure_n, "scaling-b": scaling.measure_b}[file]
    quick, seconds = bool(options.quick), SECONDS[bool(options.quick)]
    _write(bench, file, measure(options.device, options.backend, quick, "float32", seconds))


@pytest.mark.parametrize("name", models.MODELS)
def test_model(name: str, bench: Bench, pytestconfig: pytest.Config) -> None:
    options = bench.options
    if not options.benchmark:
        pytest.skip("checked in tests/test_bench_models.py")
    if not wanted(pytestconfig, "models"):
        pytest.skip("not asked for")
    size = "quick" if options.quick else "full"
    rounds, seconds = (5, 3.0) if options.quick else (15, 40.0)
    found = models.measure(
        name, size, options.device, torch.float32, options.backend, rounds, seconds
    )
    _write(bench, "models", [found])
