"""What `make demo` ends with, as rows: `python -m bench.demo`."""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import rows

COLUMNS = (
    *("target", "unit", "mae_geot", "mae_linear", "mae_mean", "seconds"),
    *("device", "threads", "machine", "processor", "python", "torch", "triton"),
    *("geot_kernels", "commit"),
)


def main() -> None:
    """Runs the demo and writes its errors, and the seconds that it took."""
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        command = [sys.executable, "-m", "geot_model", "demo", "-o", folder]
        subprocess.run(command, cwd=root, check=True)
        seconds = f"{time.monotonic() - start:.0f}"
        with (Path(folder) / "results.csv").open(newline="") as file:
            found = list(csv.DictReader(file))
    where = {**rows.where("cpu"), "seconds": seconds}
    for row in found:
        row.update({n: f"{float(row[n]):.4f}" for n in row if n.startswith("mae")})
    rows.Rows(rows.folder("cpu") / "demo.csv", COLUMNS, ("target", "device", "threads")).add(
        {**where, **row} for row in found
    )


if __name__ == "__main__":
    main()
