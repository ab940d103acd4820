"""Tables and plots of rows: `python -m bench.report [--device FOLDER ...] [--quick] [--readme]`.

Everything is computed from `bench/results/<device>/*.csv` at the time it is shown. `report.md` and
`plots/` are written beside the rows; `--readme` fills the marked parts of README.md, and `stale`
names those that rows have left behind.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import geot
from .engine import COLD, QUICK, SLOW
from .peers import PLAIN, opponent
from .ratios import (
    CARRIES_GEOMETRY,
    FITTED,
    FUNCTIONS,
    OTHERS,
    PASSES,
    SCALING,
    SETTING,
    Device,
    Notes,
    Ratio,
    Row,
    Unit,
    caption,
    devices,
    digits,
    exponent,
    extras,
    faster,
    grouped,
    label,
    markdown,
    number,
    ordered,
    ratio,
    roofline,
    shown_pass,
    times,
    units,
)
from .rows import KEY, RESULTS, UNIT
from .ways import MEASURED

README = Path(__file__).parents[1] / "README.md"
NOTHING = "Not measured yet."
ERRORS = {
    "mae_geot": "GeoT",
    "mae_linear": "linear model on element counts",
    "mae_mean": "always the mean",
}


def cell(unit: Unit, function: str, machine: Iterable[Row], notes: Notes) -> str:
    """Time of a function, that over ours, and for ours the share of the roofline."""
    row = unit.get(function)
    if row is None:
        return ""
    if not row["median_ms"]:
        return "–" + notes.mark(row["reason"])
    parts = [f"{digits(times(row)[1])} ms"]
    against = faster(unit, function)
    if against is not None:
        parts.append(str(against))
    least = roofline(row, machine) if function.startswith("ours") else None
    if least is not None:
        parts.append(f"{digits(100 * least[0] / times(row)[1], 2)} % of the roofline ({least[1]})")
    return " · ".join(parts)


def case_table(rows: Sequence[Row], machine: Sequence[Row]) -> str:
    """Functions by passes, of one setting, and the memory they need."""
    passes, notes = units(rows), Notes()
    functions = ordered((row["function"] for row in rows), FUNCTIONS)
    head = ["", *(PASSES.get(name, name) for name in passes)]
    lines = [[f, *(cell(u, f, machine, notes) for u in passes.values())] for f in functions]
    parts = [markdown(head, lines), str(notes)]
    memory = [[f, *(_memory(u.get(f)) for u in passes.values())] for f in functions]
    memory = [line for line in memory if any(line[1:])]
    if memory:
        head[0] = "MB beyond inputs, outputs, gradients"
        parts.append(markdown(head, memory))
    return "\n\n".join(part for part in parts if part)


def _memory(row: Row | None) -> str:
    return digits(float(row["extra_memory_mb"])) if row and row["extra_memory_mb"] else ""


def headline(device: Device) -> str:
    """A line for each setting of the named cases; the three passes stand side by side."""
    rows, notes = device.named(), Notes()
    lines = []
    for setting in grouped(rows, SETTING):
        passes = units(setting)
        found = [passes.get(name, {}) for name in MEASURED]
        columns = [
            [_own(unit, name) for unit, name in zip(found, MEASURED, strict=True)],
            [_floor(unit) for unit in found],
            [_best(unit, notes) for unit in found],
            [_eager(unit) for unit in found],
        ]
        lines.append([label(setting[0], rows), *(" / ".join(column) for column in columns)])
    if not lines:
        return ""
    head = ["forward / forward+backward / force step", "ours, ms"]
    head += [
        "times the floor",
        "faster than the best peer with geometry",
        "faster than eager",
    ]
    return _joined(markdown(head, lines), notes)


def _joined(table: str, notes: Notes) -> str:
    return f"{table}\n\n{notes}" if notes.texts else table


def _own(unit: Unit, name: str) -> str:
    """Our time: forward with the table given, else with the table made in the call."""
    kinds = ("ours", "ours with table")
    for function in kinds if name == "forward" else kinds[::-1]:
        if function in unit and unit[function]["median_ms"]:
            return digits(times(unit[function])[1])
    return "–"


def _floor(unit: Unit) -> str:
    floor = unit.get(PLAIN)
    return _first([ratio(unit.get(opponent(PLAIN, floor["pass"])), floor)] if floor else [])


def _best(unit: Unit, notes: Notes) -> str:
    """The smallest ratio among peers that carry geometry, whose it is, and who was not asked."""
    found = {name: faster(unit, name) for name in ordered(unit, FUNCTIONS)}
    known = {n: r for n, r in found.items() if r is not None and n in CARRIES_GEOMETRY}
    if not known:
        return "–"
    name = min(known, key=lambda name: known[name].value)
    absent = [n for n, row in unit.items() if n in CARRIES_GEOMETRY and _not_tried(row)]
    return str(known[name]) + notes.mark(", without ".join([name, *absent]))


def _not_tried(row: Row) -> bool:
    """Whether a way might have run, but nobody waited for it."""
    return row["reason"] in (COLD, QUICK) or row["reason"].startswith(SLOW)


def _eager(unit: Unit) -> str:
    """Against eager PyTorch, with the attention that suits it best."""
    found = [faster(unit, name) for name in ("eager", "eager MATH")]
    known = [ratio for ratio in found if ratio is not None]
    return _first(sorted(known, key=lambda ratio: ratio.value)[:1])


def _first(ratios: Iterable[Ratio | None]) -> str:
    return next((str(found) for found in ratios if found is not None), "–")


def grid(device: Device) -> str:
    """Molecules × atoms: against attention without geometry, and against the usual way."""
    rows = device.files.get("grid", [])
    lines = []
    for setting in grouped(rows, SETTING):
        row = setting[0]
        size = ", ".join([f"{row['molecules']} × {row['atoms']}", *extras(row, rows)])
        passes = units(setting)
        forward, backward, forces = (passes.get(name, {}) for name in MEASURED)
        against = _eager(forces)
        compiled = _first([faster(backward, "compiled eager")])
        lines.append([size, _floor(forward), _floor(backward), compiled, against])
    if not lines:
        return ""
    head = ["molecules × atoms", "forward, times the floor", "forward+backward, times the floor"]
    head += ["forward+backward, faster than compiled PyTorch", "force step, faster than eager"]
    return markdown(head, lines)


def models(device: Device) -> str:
    """Whole models: time of a training step, by function."""
    rows, notes = device.files.get("models", []), Notes()
    functions = ordered((row["function"] for row in rows), FUNCTIONS)
    lines = []
    for group in grouped(rows, UNIT):
        unit = {row["function"]: row for row in group}
        name = f"{label(group[0], rows)}, {shown_pass(group[0])}"
        lines.append([name, *(cell(unit, f, device.machine, notes) for f in functions)])
    return _joined(markdown(["model", *functions], lines), notes) if lines else ""


def series(rows: Iterable[Row], axis: str) -> list[list[Row]]:
    """Rows of one function and pass each, from the smallest molecule or batch to the largest."""
    groups = grouped(rows, [name for name in KEY if name != axis])
    return [sorted(group, key=lambda row: float(row[axis])) for group in groups]


def fit(points: Iterable[Row], axis: str, column: str) -> float | None:
    """Exponent over the largest sizes at which there is something in a column."""
    pairs = [(float(row[axis]), number(row, column) or 0) for row in points]
    pairs = [pair for pair in pairs if pair[1] > 0][-FITTED:]
    return exponent(*zip(*pairs, strict=True)) if len(pairs) > 1 else None


def scaling(device: Device, names: Sequence[str] = ("scaling-n",)) -> str:
    """Exponents of time and memory, and what the largest size takes."""
    tables = [_scaling(device, name) for name in names if name in device.files]
    return "\n\n".join(tables)


def _scaling(device: Device, name: str) -> str:
    (axis, symbol), notes, lines = SCALING[name], Notes(), []
    rows = device.files[name]
    for points in series(rows, axis):
        done = [row for row in points if row["median_ms"] or row["extra_memory_mb"]]
        failed = [f"{symbol} = {r[axis]}: {r['reason']}" for r in points if r["reason"]]
        mark = notes.mark(failed[0]) if failed else ""
        last = done[-1] if done else points[-1]
        time, memory = number(last, "median_ms"), number(last, "extra_memory_mb")
        powers = [fit(points, axis, column) for column in ("median_ms", "extra_memory_mb")]
        lines.append(
            [
                ", ".join([last["function"], shown_pass(last), *extras(last, rows)]),
                *("–" if power is None else f"{symbol}^{power:.2f}" for power in powers),
                (last[axis] if done else "–") + mark,
                "–" if time is None else f"{digits(time)} ms",
                "–" if memory is None else f"{digits(memory)} MB",
            ]
        )
    head = ["", "time", "memory", f"largest {symbol}", "its time", "its memory"]
    return _joined(markdown(head, lines), notes)


def demo(device: Device) -> str:
    """What `make demo` ends with."""
    lines = [
        [f"{row['target']}, {row['unit']}", *(f"{float(row[n]):.3f}" for n in ERRORS)]
        for row in device.others["demo"]
    ]
    if not lines:
        return ""
    table = markdown(["mean absolute error", *ERRORS.values()], lines)
    return f"After {device.others['demo'][0]['seconds']} s:\n\n{table}"


BLOCKS: dict[str, Callable[[Device], str]] = {
    "demo": demo,
    "headline": headline,
    "grid": grid,
    "models": models,
    "scaling": scaling,
    "message_passing": geot.message_passing,
    "simulation": geot.simulation,
    "inference": geot.inference,
}


def report(device: Device, plots: Iterable[Path] = ()) -> str:
    """All tables of a device, with the plots that were drawn."""
    name = device.folder.name
    title = f"{device.folder.parent.name}, quick runs" if name == "quick" else name
    parts = [f"# {title}", caption(device.rows())]
    rows = [*device.named(), *device.files.get("grid", [])]
    for setting in grouped(rows, SETTING):
        remarks = f"{sizes(setting[0])}; {caption(setting, ['commit'])}"
        table = case_table(setting, device.machine)
        parts += [f"## {label(setting[0], rows)}", remarks, table]
    sections = {"Molecules × atoms": grid, "Scaling": _all_scaling, "Whole models": models}
    sections |= {"GeoT beside SchNet": geot.message_passing, "Attention maps": geot.simulation}
    sections |= {"Predictions for QM9": geot.inference}
    for title, make in sections.items():
        table = make(device)
        parts += [f"## {title}", table] if table else []
    parts += [f"![{path.stem}]({path.relative_to(device.folder)})" for path in plots]
    return "\n\n".join(parts) + "\n"


def _all_scaling(device: Device) -> str:
    return scaling(device, tuple(SCALING))


def sizes(row: Row) -> str:
    """What a case computes."""
    forms = {
        "molecules": "{} molecules",
        "atoms": "{} atoms each",
        "mean_atoms": "{} of them real on average",
    }
    forms |= {"heads": "H={}", "head_dim": "D={}", "gaussians": "{} Gaussians", "dtype": "{}"}
    forms |= {"backend": "backend {}", "threads": "{} threads"}
    graph = ["replayed as a CUDA graph"] if row["mode"] == "graph" else []
    return ", ".join([form.format(row[n]) for n, form in forms.items() if row[n]] + graph)


def blocks(results: Path = RESULTS) -> dict[str, str]:
    """What stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`, by name."""
    made: dict[str, list[str]] = {name: [] for name in BLOCKS}
    for device in devices(results):
        for name, make in BLOCKS.items():
            table = make(device)
            if table:
                made[name].append(f"{caption(_shown(device, name))}:\n\n{table}")
    return {name: "\n\n".join(parts) or NOTHING for name, parts in made.items()}


def _shown(device: Device, block: str) -> list[Row]:
    if block == "headline":
        return device.named()
    if block in OTHERS:
        return device.others[block]
    return device.files["scaling-n" if block == "scaling" else block]


def _wanted(text: str) -> list[str]:
    return re.findall(r"<!-- bench:([\w-]+) -->", text)


def filled(text: str, made: dict[str, str]) -> str:
    """The text with all its marked parts replaced.

    Raises:
        ValueError: A part has no end, or a name that nothing is made for.
    """
    for name in _wanted(text):
        start, end = (f"<!-- {slash}bench:{name} -->" for slash in ("", "/"))
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found or name not in made:
            raise ValueError(f"bench:{name}: {'unknown' if found else 'has no end'}")
        text = f"{before}{start}\n\n{made[name]}\n\n{end}{after}"
    return text


def stale(readme_text: str, results: Path = RESULTS) -> list[str]:
    """Names of marked parts that are not what the rows give."""
    made = blocks(results)
    wanted = _wanted(readme_text)
    fresh = {n: f"<!-- bench:{n} -->\n\n{text}\n\n<!-- /bench:{n} -->" for n, text in made.items()}
    return [name for name in wanted if name not in made or fresh[name] not in readme_text]


def summary(device: Device) -> str:
    """The tables that stand in a README, and where the rest is."""
    parts = [caption(device.rows())]
    for name, make in BLOCKS.items():
        table = make(device) if name not in OTHERS else ""
        parts += [f"{name}:", table] if table else []
    parts.append(f"More tables and plots: {device.folder / 'report.md'}")
    return "\n\n".join(parts)


def write(device: Device) -> str:
    """Writes plots and `report.md`, and returns its text."""
    drawn: list[Path] = []
    try:
        from . import plots
    except ModuleNotFoundError as error:
        print(f"plots are left out: {error}", file=sys.stderr)
    else:
        drawn = plots.write(device)
    text = report(device, drawn)
    (device.folder / "report.md").write_text(text)
    return text


def main(
    arguments: Sequence[str] | None = None, results: Path = RESULTS, readme: Path = README
) -> None:
    """Prints and writes the reports of the devices asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", nargs="+", default=[], metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="rows of quick runs")
    parser.add_argument("--readme", action="store_true", help="also fill README.md")
    asked = parser.parse_args(arguments)
    found = devices(results, asked.device, asked.quick)
    if not found:
        print(f"no rows in {results}", file=sys.stderr)
    for device in found:
        for name in device.skipped:
            print(f"{device.folder / name} has other columns: left out", file=sys.stderr)
        print(write(device))
    if asked.readme:
        readme.write_text(filled(readme.read_text(), blocks(results)))


if __name__ == "__main__":
    main()
