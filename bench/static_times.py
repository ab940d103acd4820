"""The static report beside measured times: `python -m bench.static_times` writes its rows.

Clocks of the busiest pipe come from machine code (`bench.static_cost`), for 64 x 64 pairs of one
head, and stand in `bench/results/static/sm90.csv`. Where a GPU has measured the same pass, the
model says at least

    clocks * molecules * heads * atoms² / 64² / multiprocessors / frequency

A forward+backward pass is the sum of its two kernels, without the gradient of the table.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import torch

from . import rows

STATIC = rows.RESULTS / "static" / "sm90.csv"
COLUMNS = (
    *("pass", "dtype", "head_dim", "atoms", "clocks", "binds", "times_plain"),
    *("registers", "spilled_bytes", "shared_kib", "triton", "geot_kernels", "commit"),
)
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
GIGAHERTZ = 1.7  # of an H200 at work
TILE = 64 * 64


def static_rows() -> list[dict[str, str]]:
    """What the Triton kernels cost by their machine code, for capability 9.0."""
    from . import static_cost

    known = {case.name: case for case in static_cost.PLAIN}
    where = rows.where("cpu")
    found, plain = [], dict[str, float]()
    for case in static_cost.GEOMETRY:
        *name, numbers, dim, atoms = case.name.split()
        kernels = static_cost.measure(case)
        clocks = static_cost.busiest(kernels)
        if case.plain and case.plain not in plain:
            plain[case.plain] = static_cost.busiest(static_cost.measure(known[case.plain]))
        row = kernels[-1][-1]
        spilled = row.needs.spill_stores + row.needs.spill_loads
        found.append(
            {
                **where,
                **{"pass": " ".join(name), "dtype": DTYPES[numbers]},
                **{"head_dim": dim[2:], "atoms": atoms[2:], "clocks": f"{clocks:.0f}"},
                **{"binds": row.work.binding, "registers": str(row.needs.registers)},
                **{"spilled_bytes": str(spilled), "shared_kib": f"{row.needs.shared / 1024:.1f}"},
                "times_plain": f"{clocks / plain[case.plain]:.2f}" if case.plain else "",
            }
        )
    return found


def table(folder: Path, multiprocessors: int | None = None) -> list[str]:
    """Lines: times by the model and measured ones, where a GPU has measured the grid.

    Args:
        folder: Of the rows of a device.
        multiprocessors: None: of this machine's GPU.
    """
    path = folder / "grid.csv"
    if not (path.exists() and STATIC.exists()):
        return []
    if multiprocessors is None:
        if not torch.cuda.is_available():
            return []
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    with STATIC.open(newline="") as file:
        known = list(csv.DictReader(file))
    lines = ["Static report (machine code of Triton's kernels) beside measured times:"]
    for row in rows.Rows(path).rows:
        if row["function"] != "ours" or not row["median_ms"] or row["mode"] != "eager":
            continue
        clocks = _clocks(known, row)
        if clocks is None:
            continue
        tiles = int(row["molecules"]) * int(row["heads"]) * int(row["atoms"]) ** 2 / TILE
        model = clocks * tiles / multiprocessors / GIGAHERTZ / 1e6
        measured = float(row["median_ms"])
        lines.append(
            f"  {row['case']}, {row['pass']}, {row['dtype']}: model {model:.3g} ms, "
            f"measured {measured:.3g} ms, {measured / model:.2g} times the model"
        )
    return lines


def _clocks(known: Sequence[dict[str, str]], row: dict[str, str]) -> float | None:
    """Of the kernels of a pass."""
    passes = {"forward": ("forward",), "backward+table": ("forward", "backward")}
    kernels = passes.get(row["pass"], ())
    same = ("dtype", "head_dim", "atoms")
    found = [
        float(other["clocks"])
        for kernel in kernels
        for other in known
        if other["pass"] == kernel and all(other[name] == row[name] for name in same)
    ]
    return sum(found) if kernels and len(found) == len(kernels) else None


def main() -> None:
    """Writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.parse_args()
    STATIC.unlink(missing_ok=True)
    rows.Rows(STATIC, COLUMNS, COLUMNS[:4]).add(static_rows())
    print(STATIC.read_text(), end="")


if __name__ == "__main__":
    main()
