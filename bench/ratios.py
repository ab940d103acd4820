"""Numbers made of rows: ratios with their ranges, exponents, shares of the roofline, captions.

    ratio          median(a) / median(b)
    its range      [lower(a) / upper(b), upper(a) / lower(b)], of quartiles; "≈ 1" if 1 is in it
    roofline       max(least traffic / speed of a copy, operations / speed of a product)

A ratio compares functions that were timed in turn, and what does the same work (`opponent`).
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .cases import CASES
from .peers import OWN, PEERS, opponent
from .rows import COLUMNS, UNIT

CARRIES_GEOMETRY = {
    name
    for name, peer in PEERS.items()
    if name not in OWN and (peer.oracle == "table" or not peer.given)
}
"""Peers to which positions are given, not a dense bias."""
FUNCTIONS = (*PEERS, "original attention", "original attention, compiled")
PASSES = {
    "forward": "forward",
    "backward+table": "forward+backward",
    "force_step": "force step",
    "backward": "forward+backward, of the inputs alone",
    "training": "forward+backward, of all but positions",
}
PROVENANCE = {
    **{"device": "{}", "processor": "{}", "threads": "{} threads", "torch": "torch {}"},
    **{"triton": "triton {}", "geot_kernels": "geot_kernels {}", "commit": "commit {}"},
}
SCALING = {"scaling-n": ("atoms", "N"), "scaling-b": ("molecules", "B")}
SETTING = tuple(name for name in UNIT if name != "pass")
OTHERS = (
    *("demo", "inference", "message_passing", "message_passing_curves"),
    *("simulation", "simulation_curves"),
)
"""Files whose rows are no times of functions, each with columns of its own."""
BUSY, FITTED = 0.15, 4  # cores used by others; the largest sizes, to which exponents are fitted

Row = dict[str, str]
Unit = dict[str, Row]  # by function, in one pass of one setting


@dataclass
class Device:
    """Rows of a folder by the name of their file; speeds for the roofline; and `OTHERS`."""

    folder: Path
    files: dict[str, list[Row]] = field(default_factory=dict)
    machine: list[Row] = field(default_factory=list)
    others: dict[str, list[Row]] = field(default_factory=lambda: {name: [] for name in OTHERS})
    skipped: list[str] = field(default_factory=list)

    def named(self) -> list[Row]:
        """Rows of all named cases."""
        names = [n for n in self.files if n not in (*SCALING, "grid", "models")]
        return [row for name in ordered(names, CASES) for row in self.files[name]]

    def rows(self) -> list[Row]:
        return [row for rows in self.files.values() for row in rows]


@dataclass(frozen=True)
class Ratio:
    """Of two times, with the range that their quartiles leave it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low <= 1 <= self.high:
            return f"≈ 1 ({self.low:.2f} to {self.high:.2f})"
        near = 0.9 < self.value < 1.1
        return f"{self.value:.2f}×" if near else f"{digits(self.value, 2)}×"


class Notes:
    """Numbered notes beneath a table; the same text has the same number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        text = " ".join(text.split())
        if not text:
            return ""
        if text not in self.texts:
            self.texts.append(text)
        return f"<sup>{self.texts.index(text) + 1}</sup>"

    def __str__(self) -> str:
        return "; ".join(f"<sup>{n}</sup> {text}" for n, text in enumerate(self.texts, 1))


def read(folder: Path) -> Device:
    """All rows of a folder; files with other columns are left out, by name in `skipped`."""
    device = Device(folder)
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if path.stem == "machine":
                device.machine = list(reader)
            elif path.stem in OTHERS:
                device.others[path.stem] = list(reader)
            elif tuple(reader.fieldnames or ()) != COLUMNS:
                device.skipped.append(path.name)
            elif rows := list(reader):
                device.files[path.stem] = rows
    return device


def devices(results: Path, names: Sequence[str] = (), quick: bool = False) -> list[Device]:
    """Folders that have rows; by default all."""
    folders = [results / n for n in names] or sorted(p for p in results.glob("*") if p.is_dir())
    found = [read(folder / "quick" if quick else folder) for folder in folders]
    return [device for device in found if device.rows()]


def number(row: Row, column: str) -> float | None:
    return float(row[column]) if row.get(column) else None


def times(row: Row) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile, ms."""
    low, median, high = (
        float(row[f"{name}_ms"]) for name in ("lower_quartile", "median", "upper_quartile")
    )
    return low, median, high


def ratio(row: Row | None, other: Row | None) -> Ratio | None:
    """Of the times of two functions, or None where one has no time."""
    if not (row and other and row["median_ms"] and other["median_ms"]):
        return None
    (low, median, high), (other_low, other_median, other_high) = times(row), times(other)
    return Ratio(median / other_median, low / other_high, high / other_low)


def faster(unit: Unit, function: str) -> Ratio | None:
    """Time of a function over that of ours which does the same work."""
    row = unit.get(function)
    return row and ratio(row, unit.get(opponent(function, row["pass"])))


def roofline(row: Row, machine: Iterable[Row]) -> tuple[float, str] | None:
    """The least time, ms, and whether memory or compute asks for it; MB/(GB/s) is ms."""
    speeds = {
        (speed["measure"], speed["dtype"]): float(speed["value"])
        for speed in machine
        if all(speed.get(name, row[name]) == row[name] for name in ("device", "threads"))
    }
    copies = [value for (measure, _), value in speeds.items() if measure == "copy"]
    peak = speeds.get(("matrix product", row["dtype"]))
    traffic, gflop = number(row, "least_traffic_mb"), number(row, "gflop")
    if not copies or peak is None or traffic is None or gflop is None:
        return None
    return max((traffic / max(copies), "memory"), (gflop / peak, "compute"))


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the power law y ~ x^p nearest to the points, by least squares of logarithms."""
    logs = [[math.log(value) for value in values] for values in (xs, ys)]
    return statistics.linear_regression(*logs).slope


def grouped(rows: Iterable[Row], names: Sequence[str]) -> list[list[Row]]:
    """Rows that agree in some columns."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.values())


def units(rows: Iterable[Row]) -> dict[str, Unit]:
    """Rows of one setting, by pass and function."""
    found: dict[str, Unit] = {}
    for row in rows:
        found.setdefault(row["pass"], {})[row["function"]] = row
    return {name: found[name] for name in ordered(found, PASSES)}


def ordered(names: Iterable[str], order: Iterable[str]) -> list[str]:
    """Without repetitions; those that `order` does not know at the end."""
    place = {name: n for n, name in enumerate(order)}
    return sorted(dict.fromkeys(names), key=lambda name: place.get(name, len(place)))


def label(row: Row, rows: Iterable[Row]) -> str:
    """A setting's case, and what tells it from the case's other settings."""
    same = [other for other in rows if other["case"] == row["case"]]
    sizes = {"molecules": "B={}", "atoms": "N={}"}
    return ", ".join([row["case"], *_varying(row, same, sizes), *extras(row, same)])


def extras(row: Row, rows: Iterable[Row]) -> list[str]:
    """What tells a setting from others, beyond its size; dtype and mode where unusual."""
    forms = {"heads": "H={}", "head_dim": "D={}", "gaussians": "{} Gaussians"}
    parts = _varying(row, rows, {**forms, "backend": "{}", "threads": "{} threads"})
    parts += [row["dtype"]] if row["dtype"] not in ("", "float32") else []
    return [*parts, "CUDA graph"] if row["mode"] == "graph" else parts


def _varying(row: Row, rows: Iterable[Row], forms: dict[str, str]) -> list[str]:
    values = {name: {other[name] for other in rows} for name in forms}
    return [form.format(row[name]) for name, form in forms.items() if len(values[name]) > 1]


def shown_pass(row: Row) -> str:
    return PASSES.get(row["pass"], row["pass"])


def caption(rows: Iterable[Row], names: Iterable[str] = ()) -> str:
    """Where rows were made, with which versions, and whether other processes were running."""
    rows, parts = list(rows), []
    for name in names or PROVENANCE:
        values = list(dict.fromkeys(row[name] for row in rows if row[name]))
        parts += [PROVENANCE[name].format(", ".join(values))] if values else []
    if any((number(row, "other_cores") or 0) > BUSY for row in rows):
        parts.append("other processes were running")
    return "; ".join(parts)


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; its first column is text, the others are set to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (head, *lines)]
    cells.insert(1, rule)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def digits(value: float, count: int = 3) -> str:
    """At least so many significant digits, and all before the point."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, count - 1 - math.floor(math.log10(abs(value))))}f}"
