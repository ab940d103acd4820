"""What the machine can do: the limits that the roofline is made of."""

from __future__ import annotations

import pytest

from . import roofline, rows
from .conftest import Bench, wanted


def test_machine(bench: Bench, pytestconfig: pytest.Config) -> None:
    if not wanted(pytestconfig, "machine") and pytestconfig.option.case:
        pytest.skip("not asked for")
    options = bench.options
    found = roofline.machine(options.device, quick=not options.benchmark or options.quick)
    assert all(float(row["value"]) > 0 for row in found)
    if options.benchmark:
        path = bench.folder / "machine.csv"
        rows.Rows(path, roofline.MACHINE_COLUMNS, roofline.MACHINE_KEY).add(found)
