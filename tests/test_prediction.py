"""Predictions: the right numbers in the right places, and what is refused."""

import csv
import dataclasses
import math

import numpy as np
import pytest
import torch

from geot_model import prediction
from geot_model.checkpoint import Card, build_model
from geot_model.molecules import Molecule, Molecules, pad_batch
from geot_model.prediction import predict, why_not, write_csv
from geot_model.qm9 import load_qm9
from geot_model.targets import TargetScaler

ELEMENTS = (1, 6, 7, 8, 9)
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
def sample():
    return load_qm9()[:150]


@pytest.fixture
def model(sample):
    """A model that nobody has trained."""
    names, readouts = ("U0", "mu", "y"), ("sum", "dipole", "pooled")
    molecules = dataclasses.replace(sample, targets=sample.targets | {"y": sample.targets["r2"]})
    scaler = TargetScaler.fit(molecules, names, readouts, {"U0": "fitted"})
    card = Card(CONFIG, scaler, ELEMENTS, 29, (), {})
    torch.manual_seed(0)
    model = build_model(card).eval()
    model.card = card
    return model


def molecule(numbers, name="odd", positions=None):
    places = np.arange(3 * len(numbers)).reshape(-1, 3) if positions is None else positions
    return Molecule(np.array(numbers, np.int64), np.array(places, np.float32), name)


@pytest.mark.parametrize("batch_size", [None, 1, 7, 1000])
def test_predictions_are_those_of_one_molecule_at_a_time(batch_size, model, sample):
    molecules = sample[:40]
    got = predict(model, molecules, batch_size)
    assert got.names == tuple(molecules.names)
    assert got.targets == ("U0", "mu", "y")
    assert got.units == ("eV", "Debye", "")
    assert got.problems == []
    scaler = model.card.scaler
    for row in range(len(molecules)):
        one = molecules[row]
        with torch.no_grad():
            out = model(*pad_batch(one)).double().numpy()[0]
        mean = np.array(scaler.mean) * [np.diff(one.ptr)[0], 0, 1]
        expected = out * scaler.std + mean
        expected[0] += sum(scaler.references["U0"][z] for z in one.numbers.tolist())
        error = np.abs(got.values[row] - expected) / scaler.std
        assert error.max() < 1e-5, row


def test_list_of_molecules_is_predicted_as_packed_ones(model, sample):
    packed = predict(model, sample[:9])
    listed = predict(model, [sample.molecule(row) for row in range(9)])
    assert listed.names == packed.names
    np.testing.assert_array_equal(listed.values, packed.values)
    assert model.predict(sample[:9]).values.tolist() == packed.values.tolist()


def test_nothing_is_predicted_of_nothing(model, sample):
    for nothing in (sample[:0], []):
        got = predict(model, nothing)
        assert got.values.shape == (0, 3)
        assert got.problems == []


ODD = {
    1: molecule([6, 35, 17], "salt"),
    3: molecule([], "nothing"),
    4: molecule([6, 1], "lost", [[0, 0, 0], [0, np.nan, 0]]),
    7: molecule([6, 0], "dummy"),
    8: molecule([6, 119], "new"),
}


def with_odd_ones(sample):
    """Nine molecules, of which some cannot be predicted."""
    return [ODD.get(row, sample.molecule(row)) for row in range(9)]


@pytest.mark.parametrize("packed", [True, False])
def test_refused_molecules_do_not_stop_the_others(packed, model, sample):
    molecules = with_odd_ones(sample)
    got = predict(model, Molecules.join(molecules) if packed else molecules)
    assert got.problems == [
        "salt: Cl, Br is not among the model's elements: H, C, N, O, F",
        "nothing: no atoms",
        "lost: a position is not finite",
        "dummy: * is not among the model's elements: H, C, N, O, F",
        "new: 119 is not among the model's elements: H, C, N, O, F",
    ]
    assert got.problems == [why_not(model.card, molecules[row]) for row in ODD]
    assert sorted(got.reasons) == list(ODD)
    usual = [row for row in range(9) if row not in ODD]
    assert np.isnan(got.values[list(ODD)]).all()
    np.testing.assert_allclose(got.values[usual], predict(model, sample[usual]).values, rtol=1e-6)


def test_atomic_number_beyond_a_byte_is_not_taken_for_another(model):
    got = predict(model, [molecule([256 + 6, 1])])
    assert got.problems == ["odd: 262 is not among the model's elements: H, C, N, O, F"]
    assert np.isnan(got.values).all()


def test_only_refused_molecules_are_refused(model):
    got = predict(model, [ODD[1], ODD[3]])
    assert got.values.shape == (2, 3)
    assert np.isnan(got.values).all()


def test_element_without_reference_spoils_one_target_alone(model, sample):
    scaler = model.card.scaler
    references = {"U0": {z: e for z, e in scaler.references["U0"].items() if z != 8}}
    scaler = dataclasses.replace(scaler, references=references)
    model.card = dataclasses.replace(model.card, scaler=scaler)
    got = predict(model, [molecule([6, 8], "CO"), molecule([6, 1], "CH")])
    assert np.isnan(got.values).tolist() == [[True, False, False], [False] * 3]
    assert got.problems == ["CO: no training molecule with O had a value of U0"]


def test_result_that_is_not_finite_is_told(model):
    with torch.no_grad():
        model.embedding.weight[9] = torch.inf
    got = predict(model, [ODD[3], molecule([6, 1], "CH"), molecule([1, 9], "HF")])
    assert np.isnan(got.values[2]).all()
    assert np.isfinite(got.values[1]).all()
    assert got.reasons[2] == "HF: the network's result is not finite; look at its positions"
    assert sorted(got.reasons) == [0, 2]
    model.output_offset.fill_(torch.inf)
    assert np.isnan(predict(model, [molecule([6, 1])]).values).all()


def test_large_molecules_come_in_small_batches():
    sizes = np.array([10] * 70 + [100] * 30 + [3000] * 3)
    numbers = np.ones(sizes.sum(), np.int64)
    molecules = Molecules.join(
        [molecule(part) for part in np.split(numbers, np.cumsum(sizes)[:-1])]
    )
    batches = list(prediction._batches(molecules, 64, 2**18))
    assert sorted(np.concatenate(batches)) == list(range(103))
    for rows in batches:
        largest = sizes[rows].max()
        assert len(rows) == 1 or len(rows) * largest**2 <= 2**18
    assert [len(rows) for rows in batches][:1] == [64]
    assert len(batches) < 12


def test_new_model_has_nothing_to_predict(model, sample):
    with pytest.raises(ValueError, match="model: expected a trained one, with a card"):
        predict(build_model(model.card), sample)


def test_predicting_leaves_no_trace(model, sample):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    predict(model, sample[:5])
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    batch = pad_batch(sample[:5])
    model(*batch).sum().backward()
    assert model.embedding.weight.grad.isfinite().all()


def read_back(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_has_units_smiles_rows_and_problems(model, sample, tmp_path):
    molecules = Molecules.join(
        [
            dataclasses.replace(one, smiles="C" if row else None, name=f"Größe, {row}")
            for row, one in enumerate(with_odd_ones(sample))
        ]
    )
    got = predict(model, molecules)
    write_csv(got, molecules, tmp_path / "out.csv", rows=np.arange(9) * 2 + 5)
    rows = read_back(tmp_path / "out.csv")
    header = ["row", "name", "smiles", "U0 [eV]", "mu [Debye]", "y", "problem"]
    assert list(rows[0]) == header
    assert [row["row"] for row in rows] == [str(2 * row + 5) for row in range(9)]
    assert [row["name"] for row in rows] == list(got.names)
    assert [row["smiles"] for row in rows] == ["", *["C"] * 8]
    for row, line in enumerate(rows):
        values = [line[name] for name in header[3:6]]
        if row in ODD:
            assert values == ["", "", ""]
        else:
            assert all(map(math.isfinite, map(float, values)))
            assert line["problem"] == ""
    assert rows[3]["problem"] == "no atoms"
    assert rows[4]["problem"] == "a position is not finite"


def test_csv_has_the_digits_of_the_network_and_no_more(model, sample, tmp_path):
    got = predict(model, sample)
    write_csv(got, sample, tmp_path / "out.csv")
    rows = read_back(tmp_path / "out.csv")
    assert list(rows[0]) == ["name", "smiles", "U0 [eV]", "mu [Debye]", "y", "problem"]
    for column, (name, std) in enumerate(
        zip(list(rows[0])[2:5], model.card.scaler.std, strict=True)
    ):
        texts = [row[name] for row in rows]
        error = np.abs(np.array(texts, np.float64) - got.values[:, column]).max()
        assert 0 < error < 1e-6 * std
        decimals = max(len(text.partition(".")[2]) for text in texts)
        assert 10**-decimals > 1e-7 * std


def test_csv_of_large_and_small_spreads_is_rounded_alike(tmp_path, sample):
    values = np.array([[123456789012.3, -1.23456789e-7, -0.0]])
    made = prediction.Prediction(
        ("m",), ("big", "small", "zero"), ("", "", ""), values, (-4, 12, 6), {}
    )
    write_csv(made, sample[:1], tmp_path / "out.csv")
    row = read_back(tmp_path / "out.csv")[0]
    assert (row["big"], row["small"]) == ("123456790000.0", "-1.23457e-07")


def test_csv_of_other_molecules_is_refused(model, sample, tmp_path):
    with pytest.raises(ValueError, match="molecules: expected 5, as predicted, got 4"):
        write_csv(predict(model, sample[:5]), sample[:4], tmp_path / "out.csv")
