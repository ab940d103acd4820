"""Errors on molecules never seen, beside those of simple models."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from .model import GeoT
from .molecules import Molecules
from .prediction import predict
from .targets import element_counts

if TYPE_CHECKING:
    from .splits import Split


@dataclass(frozen=True)
class TargetError:
    """Errors of a target on the test molecules, in `unit`; NaN if there are none.

    Attributes:
        target: Name of the target.
        unit: Its unit; "" where it is not known.
        molecules: How many were compared: those with a known value that the model predicts.
        geot: Mean absolute error of the model.
        rmse: Its root mean square error.
        mean: Mean absolute error of predicting the mean of the training molecules.
        linear: That of a linear model on element counts, fitted to the training molecules.
    """

    target: str
    unit: str
    molecules: int
    geot: float
    rmse: float
    mean: float
    linear: float


def measure(model: GeoT, split: Split) -> tuple[TargetError, ...]:
    """Measure a trained model on the test molecules, beside the mean and the linear model."""
    prediction = predict(model, split.test)
    found = zip(prediction.targets, prediction.units, prediction.values.T, strict=True)
    return tuple(_measure(split, target, unit, values) for target, unit, values in found)


def _measure(split: Split, target: str, unit: str, predicted: NDArray[np.float64]) -> TargetError:
    train = split.train[np.isfinite(split.train.targets[target])]
    known = np.isfinite(split.test.targets[target]) & np.isfinite(predicted)
    test = split.test[known]
    fitted, truth = train.targets[target], test.targets[target]
    elements = sorted({*train.elements, *test.elements})
    weights = np.linalg.lstsq(_design(train, elements), fitted, rcond=None)[0]
    errors = {
        "geot": predicted[known] - truth,
        "mean": fitted.mean() - truth,
        "linear": _design(test, elements) @ weights - truth,
    }
    return TargetError(
        target,
        unit,
        len(truth),
        rmse=float(np.sqrt(_mean(np.square(errors["geot"])))),
        **{name: _mean(np.abs(error)) for name, error in errors.items()},
    )


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _design(molecules: Molecules, elements: Sequence[int]) -> NDArray[np.float64]:
    """1 and the number of atoms of each element: float64 [M, 1 + elements]."""
    counts = element_counts(molecules, elements)
    return np.concatenate([np.ones((len(molecules), 1)), counts], axis=1)


def errors_table(errors: Sequence[TargetError], train: int) -> Table:
    """Make the table of errors for a console.

    Args:
        errors: Of all targets.
        train: Number of training molecules.
    """
    most = max(row.molecules for row in errors)
    table = Table(
        title=f"Mean absolute error on {most:,} molecules never seen",
        caption=f"fitted to {train:,} molecules; linear model: on element counts",
    )
    for column in ("target", "unit"):
        table.add_column(column)
    for column in ("GeoT", "linear model", "always the mean"):
        table.add_column(column, justify="right", style="bold" if column == "GeoT" else None)
    for row in errors:
        numbers = (f"{value:.4g}" for value in (row.geot, row.linear, row.mean))
        table.add_row(row.target, row.unit, *numbers)
    return table


def write_errors(errors: Sequence[TargetError], path: str | Path) -> None:
    """Write the errors as CSV, a row for each target."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["target", "unit", "molecules", "mae_geot", "rmse_geot", "mae_linear", "mae_mean"]
        )
        for row in errors:
            numbers = (row.geot, row.rmse, row.linear, row.mean)
            writer.writerow([row.target, row.unit, row.molecules, *numbers])
