"""The learning curve of a run as a picture."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

# Okabe and Ito's blue and vermilion, which the colour-blind tell apart; so do dashes.
_STYLES = {"training": ("#0072B2", "--"), "validation": ("#D55E00", "-")}


def draw_learning_curve(metrics: Path, path: Path) -> None:
    """Draw the errors of training and validation over the epochs.

    Args:
        metrics: CSV with columns `epoch` (from 0), `training` and `validation`.
        path: PNG to write.
    """
    with metrics.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    epochs = [int(float(row["epoch"])) + 1 for row in rows]
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    curves = {name: [float(row[name]) for row in rows] for name in _STYLES}
    best = min(range(len(rows)), key=curves["validation"].__getitem__)
    labels = {name: name for name in _STYLES}
    labels["validation"] += f" (best: {curves['validation'][best]:.3g}, epoch {epochs[best]})"
    marks = {"training": [], "validation": [best]} if len(rows) > 1 else {}
    for name, (colour, line) in _STYLES.items():
        marked = marks.get(name, [0])
        axes.plot(
            *(epochs, curves[name], line),
            color=colour,
            label=labels[name],
            marker="o" if marked else "",
            markevery=marked,
        )
    axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")
    axes.set_ylabel("mean absolute error / standard deviation")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
    figure.savefig(path)
