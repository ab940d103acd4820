"""Rows of measurements: their columns, the files they stand in, and where they were made.

A row is a function (one way to compute something) in one case; a time in its columns is that of
one call. A run replaces the rows of its own measurements and keeps all others, so a file is what
was measured last. Speed-ups are never stored: whoever shows one computes it from two rows of the
same unit, which were timed in turn.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import geot_kernels as gk

RESULTS = Path(__file__).parent / "results"
NUMBERS = ("min_ms", "lower_quartile_ms", "median_ms", "upper_quartile_ms")
UNIT = (
    *("case", "pass", "dtype", "mode", "molecules", "atoms", "heads", "head_dim", "gaussians"),
    *("backend", "device", "threads"),
)
"""What identifies things that were timed in turn; `atoms` counts padding, `mode` is "eager", or
"graph" for replays of a CUDA graph."""
KEY = (*UNIT, "function")
COLUMNS = (
    *KEY,
    *("mean_atoms", *NUMBERS, "wall_ms", "rounds"),
    *("extra_memory_mb", "peak_memory_mb", "least_traffic_mb", "gflop"),
    *("worst_result", "relative_error", "error_budget", "reason", "other_cores"),
    *("machine", "processor", "python", "torch", "triton", "cuda", "geot_kernels", "commit"),
)
"""`mean_atoms`: real atoms of a molecule. `*_ms`: by CUDA events on a GPU; `wall_ms`: the median
by the clock, until the device is done. `extra_memory_mb`: at the peak, beyond inputs, outputs and
gradients; `peak_memory_mb`: with them (MB of 10^6 bytes). `least_traffic_mb`, `gflop`: what the
pass must move and compute (`bench.roofline`). `reason`: why there is no time. `other_cores`: that
other processes kept busy, on average, while the unit was timed."""


class Rows:
    """Rows of a file; what is measured again takes the place of the row it was in.

    Args:
        path: CSV file; rows that it has are in `rows`.
        columns: Its header.
        key: Columns that identify a row.

    Raises:
        ValueError: The file has other columns.
    """

    def __init__(
        self, path: Path, columns: Sequence[str] = COLUMNS, key: Sequence[str] = KEY
    ) -> None:
        self.path, self.columns, self.key = path, tuple(columns), tuple(key)
        self.rows: list[dict[str, str]] = []
        if not path.exists() or not path.read_text():
            return
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != self.columns:
                raise ValueError(f"{path} has other columns than this version writes")
            self.rows = list(reader)

    def add(self, rows: Iterable[dict[str, str]]) -> None:
        """Adds or replaces rows, and writes the file; columns not given stay empty."""
        new = [{column: row.get(column, "") for column in self.columns} for row in rows]
        place = {self._key(row): n for n, row in enumerate(self.rows)}
        for row in new:
            n = place.setdefault(self._key(row), len(self.rows))
            self.rows[n : n + 1] = [row]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".part")
        with scratch.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        scratch.replace(self.path)

    def _key(self, row: dict[str, str]) -> tuple[str, ...]:
        return tuple(row[name] for name in self.key)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of a single value, that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def numbers(values: Sequence[float]) -> dict[str, str]:
    """The columns that say how long a call took, of microseconds."""
    low, median, high = quartiles(values)
    shown = [f"{us / 1e3:.4g}" for us in (min(values), low, median, high)]
    return {**dict(zip(NUMBERS, shown, strict=True)), "rounds": str(len(values))}


def where(device: str, backend: str = "", commit: str | None = None) -> dict[str, str]:
    """On what, and with what, a number is measured.

    Args:
        device: "cuda" or "cpu".
        backend: Of ours.
        commit: Where there is no git.
    """
    found = {
        "backend": backend,
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "machine": platform.machine(),
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "geot_kernels": gk.__version__,
        "commit": _commit() if commit is None else commit,
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    return found


def device_name(device: str) -> str:
    """The GPU, or the number of cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU, {count} cores"


def folder(device: str, quick: bool = False) -> Path:
    """`bench/results/<device>`; rows of quick runs, which are of smaller sizes, stand apart."""
    path = RESULTS / re.sub(r"\W+", "-", device_name(device).lower())
    return path / "quick" if quick else path


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    """The commit checked out, with `-dirty` where code differs from it; "" outside git."""
    not_code = [":/", ":(exclude,top)bench/results", ":(exclude,top)docs", ":(exclude,top)*.md"]
    commands = (
        ["git", "rev-parse", "--short=7", "HEAD"],
        ["git", "status", "--porcelain", "--untracked-files=no", "--", *not_code],
    )
    try:
        commit, changes = (
            subprocess.run(
                command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{commit}-dirty" if changes else commit
