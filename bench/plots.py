"""Plots of rows, drawn by `bench.report`: cases, growth with N and with B, whole models.

Every function has one colour (Okabe and Ito's, which the colour-blind tell apart) and one marker
in all plots; whiskers are quartiles. Figures are made by matplotlib's objects, so drawing changes
no global state.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from . import geot, ratios, report
from .peers import BUILT, OURS
from .ratios import SETTING, Device, Row, Unit
from .rows import UNIT

DPI = 150
BLUE, SKY, GREEN, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#CC79A7"
ORANGE, VERMILION, BLACK, GREY = "#E69F00", "#D55E00", "#000000", "#777777"
STYLES = {
    "ours": (BLUE, "o"),
    "ours with table": (SKY, "s"),
    "ours, CUDA C++": (BLUE, "D"),
    "plain": (BLACK, "^"),
    "SDPA, bias given": (PURPLE, "v"),
    "SDPA, bias recomputed": (PURPLE, "P"),
    "eager": (VERMILION, "*"),
    "compiled eager": (ORANGE, "X"),
    "eager MATH": (VERMILION, "<"),
    "FlexAttention, Gaussians": (GREEN, ">"),
    "FlexAttention, table": (GREEN, "p"),
    "cuEquivariance": (SKY, "h"),
    "jvp_flash_attention": (BLACK, "d"),
    "original attention": (VERMILION, "s"),
    "original attention, compiled": (ORANGE, "s"),
}
OTHER = (GREY, "8")
SPREAD = 0.7  # of the distance between two cases, over which functions are spread
PANEL, ROW, EDGES = 3.6, 0.75, 1.4  # inches


def write(device: Device) -> list[Path]:
    """Draws what there are rows of, as `plots/*.png` beside them."""
    figures = {"cases": cases(device)}
    figures |= {name: scaling(device, name) for name in ratios.SCALING}
    figures |= {"models": models(device), "message-passing": learning(device)}
    figures["simulation"] = deletion(device)
    folder = device.folder / "plots"
    drawn = []
    for name, figure in figures.items():
        if figure is not None:
            folder.mkdir(exist_ok=True)
            drawn.append(folder / f"{name}.png")
            FigureCanvasAgg(figure)
            figure.savefig(drawn[-1], dpi=DPI)
    return drawn


def style(function: str) -> dict[str, str]:
    """Colour and marker of a function."""
    return dict(zip(("color", "marker"), STYLES.get(function, OTHER), strict=True))


def cases(device: Device) -> Figure | None:
    """For each pass a panel: times over those of ours that do the same work."""
    rows = device.named()
    settings = ratios.grouped(rows, SETTING)
    named = [(ratios.label(group[0], rows), ratios.units(group)) for group in settings]
    passes = ratios.ordered((name for _, units in named for name in units), ratios.PASSES)
    passes = [name for name in passes if any(_ratios(units.get(name, {})) for _, units in named)]
    if not passes:
        return None
    size = (PANEL * len(passes) + 4, ROW * len(named) + EDGES)
    figure = Figure(size, layout="constrained")
    panels = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, passes, strict=True):
        for y, (_, units) in enumerate(named):
            _dots(panel, y, units.get(name, {}))
        _ratio_axis(panel, len(named), ratios.PASSES.get(name, name))
    panels[0].set_yticks(range(len(named)), [name for name, _ in named])
    panels[0].invert_yaxis()
    _legend(figure)
    return _caption(figure, rows, "Right of the line ours is faster. ")


def _ratios(unit: Unit) -> dict[str, ratios.Ratio]:
    found = {name: ratios.faster(unit, name) for name in unit}
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def _dots(panel: Axes, y: float, unit: Unit) -> None:
    known = [name for name in ratios.FUNCTIONS if name not in (OURS, BUILT)]
    for name, ratio in _ratios(unit).items():
        place = known.index(name) if name in known else len(known)
        at = y + SPREAD * (place / len(known) - 0.5)
        error = [[max(ratio.value - ratio.low, 0)], [max(ratio.high - ratio.value, 0)]]
        form = {"linestyle": "none", "markersize": 6, "elinewidth": 1, **style(name)}
        panel.errorbar([ratio.value], [at], xerr=error, label=name, **form)


def _ratio_axis(panel: Axes, count: int, title: str) -> None:
    panel.set_xscale("log")
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("time / time of ours")
    panel.axvline(1, color="black", linewidth=1)
    panel.set_ylim(-0.5, count - 0.5)
    for y in range(1, count):
        panel.axhline(y - 0.5, color="#dddddd", linewidth=0.6)
    _plain_ticks(panel.xaxis, "×")
    panel.grid(axis="x", color="#eeeeee")
    panel.set_axisbelow(True)


def _plain_ticks(axis: Axis, unit: str = "") -> None:
    """Numbers, not powers; between decades only where there are few of them."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}{unit}"))
    axis.set_minor_formatter(NullFormatter())


def scaling(device: Device, name: str) -> Figure | None:
    """Time and memory against the size of a molecule or a batch, with exponents."""
    axis, symbol = ratios.SCALING[name]
    rows = device.files.get(name, [])
    columns = {"median_ms": "time, ms", "extra_memory_mb": "memory beyond inputs and outputs, MB"}
    columns = {column: unit for column, unit in columns.items() if any(r[column] for r in rows)}
    passes = ratios.ordered((row["pass"] for row in rows), ratios.PASSES)
    if not columns:
        return None
    size = ((PANEL + 2.6) * len(columns), PANEL * len(passes) + 0.5)
    figure = Figure(size, layout="constrained")
    panels = figure.subplots(len(passes), len(columns), squeeze=False)
    for line, pass_name in zip(panels, passes, strict=True):
        some = [row for row in rows if row["pass"] == pass_name]
        for panel, (column, unit) in zip(line, columns.items(), strict=True):
            panel.set_visible(any(row[column] for row in some))
            for points in report.series(some, axis):
                _line(panel, points, (axis, symbol, column), rows)
            _sizes_axis(panel, some, axis, f"{axis}, {symbol}")
            panel.set_ylabel(unit)
            panel.set_title(ratios.PASSES.get(pass_name, pass_name), fontsize=10)
    return _caption(figure, rows, f"Exponents: of the {ratios.FITTED} largest sizes. ")


def _line(panel: Axes, points: list[Row], names: tuple[str, str, str], rows: list[Row]) -> None:
    axis, symbol, column = names
    points = [row for row in points if (ratios.number(row, column) or 0) > 0]
    if not points:
        return
    power = report.fit(points, axis, column)
    function = ", ".join([points[0]["function"], *ratios.extras(points[0], rows)])
    text = function if power is None else f"{function}: {symbol}$^{{{power:.2f}}}$"
    error = None
    if column == "median_ms":
        low, values, high = zip(*map(ratios.times, points), strict=True)
        error = [_apart(values, low), _apart(high, values)]
    xs, ys = ([float(row[name]) for row in points] for name in (axis, column))
    form = {
        "linewidth": 1.2,
        "markersize": 7,
        "markerfacecolor": "none",
        **style(points[0]["function"]),
    }
    panel.errorbar(xs, ys, yerr=error, label=text, **form)


def _apart(larger: Sequence[float], smaller: Sequence[float]) -> list[float]:
    return [max(a - b, 0) for a, b in zip(larger, smaller, strict=True)]


def _sizes_axis(panel: Axes, rows: list[Row], axis: str, title: str) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.xaxis.set_major_locator(FixedLocator(sorted({float(row[axis]) for row in rows})))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    _plain_ticks(panel.yaxis)
    panel.set_xlabel(title)
    panel.tick_params(axis="x", labelsize=8)
    panel.grid(color="#eeeeee")
    if panel.get_legend_handles_labels()[1]:
        panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False)


def models(device: Device) -> Figure | None:
    """For each model a panel with the time of a training step."""
    rows = [row for row in device.files.get("models", []) if row["median_ms"]]
    groups = ratios.grouped(rows, UNIT)
    if not groups:
        return None
    heights = [len(group) + 1.2 for group in groups]
    figure = Figure((8, 0.38 * sum(heights) + 0.8), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, group in zip(panels, groups, strict=True):
        _bars(panel, group)
        title = f"{ratios.label(group[0], rows)}, {ratios.shown_pass(group[0])}"
        panel.set_title(title, fontsize=10, loc="left")
    panels[-1].set_xlabel("time of a step, ms")
    return _caption(figure, rows)


def _bars(panel: Axes, group: list[Row]) -> None:
    for y, row in enumerate(group):
        low, median, high = ratios.times(row)
        error = [_apart([median], [low]), _apart([high], [median])]
        colour = style(row["function"])["color"]
        panel.barh(y, median, 0.65, xerr=error, color=colour, error_kw={"capsize": 3})
        panel.annotate(
            ratios.digits(median), (high, y), (5, 0), textcoords="offset points", va="center"
        )
    panel.set_yticks(range(len(group)), [row["function"] for row in group])
    panel.set_ylim(len(group) - 0.5, -0.5)
    panel.set_xlim(0, 1.12 * max(ratios.times(row)[2] for row in group))


def _legend(figure: Figure) -> None:
    """Of all functions, once, beside the panels."""
    handles = {}
    for panel in figure.axes:
        found, names = panel.get_legend_handles_labels()
        handles |= dict(zip(names, found, strict=True))
    names = ratios.ordered(handles, ratios.FUNCTIONS)
    figure.legend([handles[name] for name in names], names, loc="outside right upper", fontsize=8)


def _caption(figure: Figure, rows: Sequence[Row], note: str = "") -> Figure:
    """Beneath all panels: where rows were made, and with what."""
    text = f"{note}Whiskers: quartiles. {ratios.caption(rows)}"
    lines = textwrap.wrap(text, int(figure.get_figwidth() * 19))
    figure.supxlabel("\n".join(lines), fontsize=7, color="#333333")
    return figure


def learning(device: Device) -> Figure | None:
    """Validation error by seconds: a panel for each target."""
    rows = geot.by_target(device.others["message_passing_curves"])
    targets = list(dict.fromkeys(row["target"] for row in rows))
    if not targets:
        return None
    figure = Figure((3.4 * len(targets) + 0.4, 3.2), layout="constrained")
    panels = figure.subplots(1, len(targets), squeeze=False)[0]
    styles = {geot.GEOT: (BLUE, "o", "-"), geot.SCHNET: (VERMILION, "s", "--")}
    for panel, target in zip(panels, targets, strict=True):
        for network, (color, marker, line) in styles.items():
            points = [r for r in rows if r["target"] == target and r["network"] == network]
            panel.plot(
                [float(row["seconds"]) for row in points],
                [float(row["validation_mae"]) for row in points],
                **{"color": color, "marker": marker, "linestyle": line, "label": network},
            )
        unit = next(row["unit"] for row in rows if row["target"] == target)
        panel.set(title=target, xlabel="processor seconds", yscale="log")
        panel.set_ylabel(f"validation error, {unit}")
        panel.grid(True, which="both", alpha=0.3)
    panels[0].legend()
    return figure


def deletion(device: Device) -> Figure | None:
    """Change of the prediction by the share of pairs taken out: a panel for each energy.

    Lines are medians of trainings, bands from the least to the greatest.
    """
    rows = device.others["simulation_curves"]
    energies = ratios.ordered((row["energy"] for row in rows), geot.ENERGIES)
    if not energies:
        return None
    figure = Figure((4.2 * len(energies) + 2.0, 3.6), layout="constrained")
    panels = figure.subplots(1, len(energies), squeeze=False)[0]
    styles = {
        "weight": (ORANGE, "o", "-"),
        "weight x value": (GREEN, "s", "-"),
        "gradient x weight": (BLUE, "D", "-"),
        geot.TRUTH: (BLACK, "^", "--"),
        "random pairs": (GREY, "x", ":"),
    }
    for panel, energy in zip(panels, energies, strict=True):
        for method, (color, marker, line) in styles.items():
            chosen = [r for r in rows if r["energy"] == energy and r["method"] == method]
            points = ratios.grouped(chosen, ("share",))
            shares = [100 * float(trainings[0]["share"]) for trainings in points]
            changes = [[float(row["change_eV"]) for row in trainings] for trainings in points]
            panel.plot(
                shares,
                [statistics.median(found) for found in changes],
                **{"color": color, "marker": marker, "linestyle": line, "label": method},
            )
            ends = ([choose(found) for found in changes] for choose in (min, max))
            panel.fill_between(shares, *ends, color=color, alpha=0.15, linewidth=0)
        panel.set(title=geot.ENERGIES[energy], xlabel="pairs taken out, %")
        panel.set_ylabel("change of the prediction, eV")
        panel.grid(True, alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure
