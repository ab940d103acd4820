"""What `geot explain` writes."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from geot_model import explain, page, relevance
from geot_model.checkpoint import Card, build_model
from geot_model.molecules import Molecule, Molecules, pad_batch
from geot_model.readers import Data
from geot_model.targets import TargetScaler

LAYERS, HEADS = 2, 2
CONFIG = {
    **{"embed_dim": 8, "num_heads": HEADS, "num_layers": LAYERS, "num_knots": 64},
    **{"basis": {"num_basis": 16, "r_max": 6.0}, "filter_hidden": 8, "r_max": 8.0},
}
SCALER = TargetScaler(("gap", "mu"), ("eV", "D"), ("pooled", "dipole"), (6.0, 0.0), (2.0, 3.0), {})
WATER = Molecule(
    np.array([8, 1, 1]),
    np.array([[0, 0, 0], [0.757, 0.586, 0], [-0.757, 0.586, 0]], np.float32),
    "a/b: <water>",
    "O",
)
ION = Molecule(
    np.array([7, 1, 1, 1, 1]),
    np.array(
        [[0, 0, 0], *(0.6 * np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]))]
    ).astype(np.float32),
    "ammonium",
    "[NH4+]",
)
METHANE = Molecule(np.array([6, 1, 1, 1, 1]), 1.05 * ION.positions, "methane", "C")
SULFUR = Molecule(np.array([16, 1, 1]), 1.3 * WATER.positions, "sulfide", "S")
EMPTY = Molecule(np.zeros(0, np.int64), np.zeros((0, 3), np.float32), "nothing")


@pytest.fixture(scope="module")
def model():
    card = Card(CONFIG, SCALER, (1, 6, 7, 8), 5, (), {})
    torch.manual_seed(2)
    model = build_model(card).eval()
    model.card = card
    return model


@pytest.fixture
def without_pictures(monkeypatch):
    """Drawing takes most of the time."""
    for name in ("draw_heatmap", "draw_pairs"):
        monkeypatch.setattr(explain, name, lambda *arguments, **options: None)


def make_data(*molecules, known=None) -> Data:
    targets = {} if known is None else {"gap": np.array(known)}
    joined = Molecules.join(molecules, targets, {"gap": "eV"} if targets else {})
    return Data(joined, ["some.smi:9: cannot parse SMILES 'C1CC'"], np.arange(len(molecules)) + 1)


def content(path):
    """The data of a page."""
    text = path.read_text("utf-8")
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.S)[1])


def test_every_molecule_gets_its_files(model, tmp_path):
    files = explain.run(model, make_data(WATER, ION), tmp_path)
    assert [file.name for file in files] == [
        *("explanation.html", "predictions.csv"),
        *("a_b_water.npz", "a_b_water-map.png", "a_b_water-pairs.png"),
        *("ammonium.npz", "ammonium-map.png", "ammonium-pairs.png"),
    ]
    assert set(files) == set(tmp_path.iterdir())
    for file in files:
        if file.suffix == ".png":
            assert imread(file)[..., :3].std() > 0.02
    data = content(files[0])
    assert [one["name"] for one in data["molecules"]] == ["a/b: <water>", "ammonium"]
    assert [one["formula"] for one in data["molecules"]] == ["H2O", "H4N"]
    assert data["problems"] == ["some.smi:9: cannot parse SMILES 'C1CC'"]
    assert (data["layers"], data["heads"], data["pairs"], data["pages"]) == (2, 2, 5, [])
    assert data["methods"][data["method"]]["name"] == explain.DEFAULT_METHOD


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("method", relevance.METHODS)
def test_arrays_hold_weights_strengths_and_their_aggregate(model, tmp_path, method):
    explain.run(model, make_data(METHANE, WATER), tmp_path, method=method, target="mu")
    numbers, positions, mask = pad_batch(Molecules.join([WATER]))
    with torch.no_grad():
        weights = model.attention_maps(numbers, positions, mask)[:, 0]
    with np.load(tmp_path / "a_b_water.npz") as file:
        assert file["labels"].tolist() == ["O1", "H1", "H2"]
        np.testing.assert_array_equal(file["numbers"], WATER.numbers)
        np.testing.assert_array_equal(file["positions"], WATER.positions)
        np.testing.assert_allclose(file["weights"], weights, rtol=1e-4, atol=1e-6)
        assert str(file["method"]) == method
        formula, maps = str(file["formula"]), file["relevance"]
        found = file["aggregate"]
    (expected,) = relevance.relevance(model, Molecules.join([WATER]), method, "mu")
    if method == relevance.GRADIENT:
        expected = expected * SCALER.std[1]
    np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-6)
    total = relevance.aggregate(expected, method)
    np.testing.assert_allclose(found, total, rtol=1e-4, atol=1e-6)
    assert explain.FORMULAS[method] in formula
    assert formula.endswith("y: mu [D]") == (method == relevance.GRADIENT)


def test_formulas_are_what_is_computed(model):
    """Each formula, from the weights, the model's own values and numerical slopes."""
    one = next(explain.explain(model, Molecules.join([METHANE])))
    share, value, gap, mu = one.maps
    size = np.abs(one.weights)
    np.testing.assert_allclose(share, size / size.sum(axis=-1, keepdims=True), rtol=1e-4)
    norms = value / size  # the same for all atoms that take
    np.testing.assert_allclose(norms, norms[..., :1, :].repeat(5, axis=-2), rtol=1e-3)
    assert gap.shape == mu.shape == (LAYERS, HEADS, 5, 5)
    kept = torch.ones(2, 5, 5, dtype=torch.bool)
    assert torch.isfinite(relevance.deleted(model, METHANE, kept)).all()
    for method in relevance.METHODS:
        mean = "mean" in explain.FORMULAS[method]
        maps = torch.from_numpy(share)
        expected = maps.mean((0, 1)) if mean else maps.sum((0, 1))
        torch.testing.assert_close(relevance.aggregate(maps, method), expected)


@pytest.mark.usefixtures("without_pictures")
def test_page_and_predictions_agree_with_the_model(model, tmp_path):
    data = make_data(WATER, ION, known=[1.25, np.nan])
    files = explain.run(model, data, tmp_path)
    values = model.predict(data.molecules).values
    shown = [one["predictions"] for one in content(files[0])["molecules"]]
    assert [[row["target"] for row in rows] for rows in shown] == [["gap", "mu"]] * 2
    assert [[float(row["value"]) for row in rows] for rows in shown] == [
        pytest.approx(row, abs=0.006) for row in values.tolist()
    ]
    assert [float(shown[0][0]["known"]), shown[1][0]["known"]] == [1.25, None]
    assert shown[0][0]["unit"] == "eV"
    with files[1].open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [WATER.name, ION.name]


@pytest.mark.usefixtures("without_pictures")
def test_known_values_of_another_unit_are_not_shown(model, tmp_path):
    data = make_data(WATER, known=[1.25])
    other = replace(data.molecules, units={"gap": "Hartree"})
    files = explain.run(model, replace(data, molecules=other), tmp_path)
    assert content(files[0])["molecules"][0]["predictions"][0]["known"] is None


@pytest.mark.usefixtures("without_pictures")
def test_molecules_that_the_model_does_not_know_are_left_out_and_named(model, tmp_path):
    said = []
    data = make_data(SULFUR, WATER, EMPTY)
    files = explain.run(model, data, tmp_path, complain=said.append)
    assert len(said) == 2 and "S is not" in said[0] and "nothing" in said[1]
    found = content(files[0])
    assert [one["name"] for one in found["molecules"]] == [WATER.name]
    assert found["problems"] == [*data.problems, *said]
    assert len(files) == 5


def test_nothing_is_written_where_nothing_can_be_explained(model, tmp_path):
    assert explain.run(model, make_data(SULFUR), tmp_path) == []
    assert explain.run(model, make_data(), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_many_molecules_get_several_pages(model, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "_MOST_MOLECULES", 2)
    monkeypatch.setattr(explain, "_write_files", lambda *arguments: [])
    monkeypatch.setattr(explain, "_AT_ONCE", 2)
    files = explain.run(model, make_data(WATER, ION, METHANE, WATER, ION), tmp_path)
    pages = [file for file in files if file.suffix == ".html"]
    assert [file.name for file in pages] == [f"explanation{end}.html" for end in ("", "-2", "-3")]
    names = [[one["name"] for one in content(file)["molecules"]] for file in pages]
    assert names == [[WATER.name, "ammonium"], ["methane", WATER.name], ["ammonium"]]
    links = content(pages[1])["pages"]
    assert [link["file"] for link in links] == [file.name for file in pages]
    assert [link["here"] for link in links] == [False, True, False]
    assert links[0]["name"] == f"{WATER.name} to ammonium" and links[2]["name"] == "ammonium"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "raw"}, r"method: expected one of weight, .*, got 'raw'"),
        ({"target": "homo"}, r"target: expected one of gap, mu, got 'homo'"),
        ({"num_pairs": -1}, r"num_pairs: expected at least 0, got -1"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        explain.run(model, make_data(WATER), tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_new_model_is_refused(model, tmp_path):
    new = build_model(model.card)
    with pytest.raises(ValueError, match=r"model: expected a trained one"):
        explain.run(new, make_data(WATER), tmp_path)


def test_file_names_are_different_and_harmless():
    names = ["a", "A", "a", "../a", "", "...", "x" * 99, "naïve", "a-2"]
    stems = explain.file_stems(names)
    assert stems[:6] == ["a", "A-2", "a-3", "a-4", "molecule", "molecule-2"]
    assert len({stem.lower() for stem in stems}) == len(names)
    assert len(stems[6]) == 60 and stems[7] == "naïve" and stems[8] == "a-2-2"


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([6, 1, 1, 8, 6], "C2H2O"), ([8, 1, 1], "H2O"), ([17, 11], "ClNa"), ([6, 35, 7], "CBrN")],
)
def test_sum_formulas_are_in_hills_order(numbers, expected):
    assert explain.formula(np.array(numbers)) == expected
