"""The table of errors: against loops over molecules, and with values that are not known."""

import csv
import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from geot_model.checkpoint import Card, build_model
from geot_model.molecules import Molecule, Molecules
from geot_model.prediction import predict
from geot_model.qm9 import load_qm9
from geot_model.results import TargetError, errors_table, measure, write_errors
from geot_model.splits import Split
from geot_model.targets import TargetScaler

TARGETS = ("U0", "gap", "alpha")
CONFIG = {
    "embed_dim": 8,
    "num_heads": 2,
    "num_layers": 1,
    "readout_dim": 4,
    "basis": {"num_basis": 6, "r_max": 12.0},
    "filter_hidden": 8,
    "r_max": 12.0,
    "num_knots": 32,
}


@pytest.fixture(scope="module")
def split():
    sample = load_qm9()
    values = {name: sample.targets[name].copy() for name in TARGETS}
    values["gap"][::3] = np.nan
    values["alpha"][100:] = np.nan  # none of the test molecules has one
    sample = dataclasses.replace(sample, targets=values)
    return Split(sample[:100], sample[100:110], sample[110:160])


@pytest.fixture(scope="module")
def model(split):
    scaler = TargetScaler.fit(split.train, TARGETS, ("sum", "mean", "sum"), {"U0": "fitted"})
    torch.manual_seed(0)
    model = build_model(Card(CONFIG, scaler, split.train.elements, 29, (), {})).eval()
    model.card = Card(CONFIG, scaler, split.train.elements, 29, (), {})
    return model


@pytest.fixture(scope="module")
def errors(model, split):
    return measure(model, split)


def linear(split, target):
    """Predictions of a least-squares fit of 1 and the number of each element."""

    def rows(part):
        return np.array(
            [
                [1, *(int((part.molecule(m).numbers == z).sum()) for z in (1, 6, 7, 8, 9))]
                for m in range(len(part))
            ],
            np.float64,
        )

    known = np.isfinite(split.train.targets[target])
    weights = np.linalg.pinv(rows(split.train)[known]) @ split.train.targets[target][known]
    return rows(split.test) @ weights


@pytest.mark.parametrize("target", ["U0", "gap"])
def test_errors_are_those_of_the_known_values(target, errors, model, split):
    column = TARGETS.index(target)
    row = errors[column]
    truth = split.test.targets[target]
    known = np.isfinite(truth)
    predicted = predict(model, split.test).values[:, column]
    error = (predicted - truth)[known]
    assert (row.target, row.unit, row.molecules) == (target, "eV", known.sum())
    assert row.geot == pytest.approx(np.abs(error).mean())
    assert row.rmse == pytest.approx(np.sqrt((error**2).mean()))
    mean = np.nanmean(split.train.targets[target])
    assert row.mean == pytest.approx(np.abs(mean - truth)[known].mean())
    assert row.linear == pytest.approx(np.abs(linear(split, target) - truth)[known].mean())


def test_target_without_known_values_has_no_errors(errors):
    row = errors[TARGETS.index("alpha")]
    assert row.molecules == 0
    assert all(map(math.isnan, (row.geot, row.rmse, row.mean, row.linear)))


def test_molecule_that_is_refused_is_not_compared(model, split, errors):
    salt = Molecule(np.array([6, 17]), np.eye(2, 3, dtype=np.float32), "salt")
    known = {name: values[:4].copy() for name, values in split.test.targets.items()}
    few = [split.test.molecule(row) for row in range(3)]
    with_salt = Molecules.join([*few, salt], known, split.test.units)
    compared = measure(model, dataclasses.replace(split, test=with_salt))
    expected = measure(model, dataclasses.replace(split, test=with_salt[:3]))
    assert compared[0] == expected[0]
    assert compared[0].molecules == 3


def test_rows_are_written_and_read_back(errors, tmp_path):
    write_errors(errors, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["target"] for row in rows] == list(TARGETS)
    for row, error in zip(rows[:2], errors[:2], strict=True):
        names = ("mae_geot", "rmse_geot", "mae_linear", "mae_mean")
        numbers = [float(row[name]) for name in names]
        assert numbers == [error.geot, error.rmse, error.linear, error.mean]
        assert (row["unit"], int(row["molecules"])) == (error.unit, error.molecules)


def test_table_shows_small_and_large_errors():
    errors = [
        TargetError("tiny", "eV", 7, 0.00012345, 1.0, 0.001, 0.002),
        TargetError("huge", "", 9, 123456.7, 1.0, 0.5, math.nan),
    ]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(errors_table(errors, 1234))
    text = console.export_text()
    for part in ("on 9 molecules", "1,234 molecules", "0.0001234", "1.235e+05", "nan"):
        assert part in text, part
