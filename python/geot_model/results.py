"""Errors on molecules never seen, beside those of simple models."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .checkpoint import Checkpoint
from .dataset import Batches, Split, elements_of, target_matrix
from .molecules import Molecules, pad_batch

_EVALUATION_BATCH = 64


@dataclass(frozen=True)
class TargetError:
    """Mean absolute errors on the test molecules, in `unit`.

    Attributes:
        target: Name of the target.
        unit: Its unit.
        geot: Of the model.
        mean: Of predicting the mean of the training molecules.
        linear: Of a linear model on element counts, fitted to the training molecules.
    """

    target: str
    unit: str
    geot: float
    mean: float
    linear: float


def device_type() -> str:
    """Where to compute: "cuda" if it is there, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def measure(checkpoint: Checkpoint, split: Split) -> tuple[TargetError, ...]:
    """Measure a model on the test molecules, beside the mean and the linear model."""
    targets = tuple(checkpoint.targets)
    fitted, truth = (target_matrix(part, targets) for part in (split.train, split.test))
    elements = elements_of(split)
    design = element_counts(split.train, elements)
    weights = np.linalg.lstsq(design, fitted, rcond=None)[0]
    predictions = {
        "geot": predict(checkpoint, split.test).numpy(),
        "mean": np.broadcast_to(fitted.mean(axis=0), truth.shape),
        "linear": element_counts(split.test, elements) @ weights,
    }
    errors = {name: np.abs(values - truth).mean(axis=0) for name, values in predictions.items()}
    return tuple(
        TargetError(
            target, unit, **{name: float(values[column]) for name, values in errors.items()}
        )
        for column, (target, unit) in enumerate(checkpoint.targets.items())
    )


def element_counts(molecules: Molecules, elements: tuple[int, ...]) -> NDArray[np.float64]:
    """Count the atoms of each element, and put 1 before: float64 [M, 1 + elements]."""
    is_element = molecules.numbers[:, None] == np.array(elements)  # [T, elements]
    sums = np.concatenate([np.zeros((1, len(elements))), np.cumsum(is_element, axis=0)])
    counts = sums[molecules.ptr[1:]] - sums[molecules.ptr[:-1]]
    return np.concatenate([np.ones((len(molecules), 1)), counts], axis=1)


def predict(checkpoint: Checkpoint, molecules: Molecules) -> Tensor:
    """Predict the targets of molecules: float64 [M, T], in their units."""
    model = checkpoint.model(device_type())
    out = torch.empty(len(molecules), len(checkpoint.targets), dtype=torch.float64)
    nothing = torch.empty(len(molecules), 0)
    for rows in Batches(molecules, nothing, _EVALUATION_BATCH).rows():
        batch = pad_batch(molecules[rows])
        out[torch.from_numpy(rows)] = checkpoint.predict(model, *batch)
    return out


def write_errors(errors: tuple[TargetError, ...], path: Path) -> None:
    """Write the table of errors as CSV."""
    rows: list[Mapping[str, Any]] = [
        {
            "target": row.target,
            "unit": row.unit,
            "mae_geot": row.geot,
            "mae_linear": row.linear,
            "mae_mean": row.mean,
        }
        for row in errors
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
