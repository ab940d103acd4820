"""Targets of unit spread: what is taken off, what comes back, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch

from geot_model import qm9
from geot_model.molecules import Molecule, Molecules
from geot_model.targets import TargetScaler, element_counts


def made(targets, formulas, units=None):
    """Molecules of formulas (lists of atomic numbers), all atoms in one place."""
    one = [
        Molecule(np.array(numbers, np.int64), np.zeros((len(numbers), 3), np.float32), f"m{row}")
        for row, numbers in enumerate(formulas)
    ]
    values = {name: np.array(value, np.float64) for name, value in targets.items()}
    return Molecules.join(one, values, units)


FORMULAS = ([1, 1], [6, 1, 1, 1, 1], [8, 1, 1], [6, 8], [6, 8, 8])


@pytest.fixture(scope="module")
def sample():
    return qm9.load_qm9()


def fit_one(molecules, readout="mean", reference="none", name="y"):
    return TargetScaler.fit(molecules, [name], [readout], {name: reference})


@pytest.mark.parametrize("readout", ["pooled", "mean"])
def test_mean_and_spread_are_those_of_the_known_values(readout):
    molecules = made({"y": [1, 2, np.nan, np.inf, 6]}, FORMULAS, {"y": "eV"})
    scaler = fit_one(molecules, readout)
    assert scaler.mean == pytest.approx((3,))
    assert scaler.std == pytest.approx((np.std([1, 2, 6]),))
    assert scaler.units == ("eV",)
    scaled = scaler.scale(molecules)
    assert scaled.dtype == torch.float32
    np.testing.assert_allclose(
        scaled[:, 0], np.array([-2, -1, np.nan, np.nan, 3]) / scaler.std[0], rtol=1e-6
    )


def test_sum_has_a_mean_per_atom_so_that_twice_the_molecule_has_twice_the_value():
    molecules = made({"y": [5, 9, 7, 4, 6.5]}, FORMULAS)
    scaler = fit_one(molecules, "sum")
    n = np.array([len(one) for one in FORMULAS])
    assert scaler.mean == pytest.approx((molecules.targets["y"] @ n / (n @ n),))
    residual = molecules.targets["y"] - scaler.mean[0] * n
    assert scaler.std == pytest.approx((np.sqrt(np.mean(residual**2)),))
    twice = made({}, [one * 2 for one in FORMULAS])
    outputs = torch.randn(5, 1, dtype=torch.float64)
    np.testing.assert_allclose(
        scaler.unscale(2 * outputs, twice), 2 * scaler.unscale(outputs, molecules)
    )


def test_dipole_is_only_divided():
    scaler = fit_one(made({"y": [0, 1, 2, 3, 4]}, FORMULAS), "dipole")
    assert scaler.mean == (0,)
    assert scaler.std == pytest.approx((np.sqrt(6),))


def test_fitted_references_explain_what_is_additive():
    molecules = made({"y": [-2, -42, -77, -113, -188]}, FORMULAS)  # H -1, C -38, O -75
    scaler = fit_one(molecules, reference="fitted")
    assert scaler.references["y"] == pytest.approx({1: -1, 6: -38, 8: -75})
    # Nothing but rounding is left to learn.
    assert scaler.std == (1,)
    assert scaler.scale(molecules).abs().max() < 1e-9


def test_fitted_references_are_the_shortest_where_counts_are_collinear():
    molecules = made({"y": [2, 4, 6]}, [[1, 8], [1, 1, 8, 8], [1, 1, 1, 8, 8, 8]])
    scaler = fit_one(molecules, "sum", "fitted")
    assert scaler.references["y"] == pytest.approx({1: 1, 8: 1})


def test_published_references_leave_atomization_energies(sample):
    scaler = fit_one(sample, "mean", "published", "U0")
    assert scaler.mean[0] == pytest.approx(-76.2, abs=0.2)
    assert scaler.std[0] == pytest.approx(10.2, abs=0.2)
    assert scaler.references["U0"] == qm9.PUBLISHED_REFERENCES["U0"]


def test_little_is_left_of_extensive_targets_of_qm9(sample):
    scaler = TargetScaler.fit(
        sample, ["U0", "zpve"], ["sum", "sum"], {"U0": "published", "zpve": "none"}
    )
    assert scaler.std[0] < 4
    assert scaler.std[1] < 0.3


@pytest.mark.parametrize("readout", ["pooled", "sum", "mean", "dipole"])
@pytest.mark.parametrize("reference", ["none", "fitted", "published"])
def test_unscale_undoes_scale(readout, reference, sample):
    if readout == "dipole":
        reference = "none"
    train, test = sample[:500], sample[500:600]
    scaler = fit_one(train, readout, reference, "U0")
    scaled = scaler.scale(test)
    assert scaled.abs().max() < 20
    back = scaler.unscale(scaled, test)
    assert back.dtype == np.float64
    error = np.abs(back[:, 0] - test.targets["U0"]).max()
    assert error < 2e-6 * scaler.std[0]  # of numbers up to 20 in float32


def test_several_targets_keep_their_columns(sample):
    names = ("mu", "U0", "gap")
    scaler = TargetScaler.fit(sample, names, ("dipole", "sum", "mean"), {"U0": "fitted"})
    back = scaler.unscale(scaler.scale(sample), sample)
    for column, name in enumerate(names):
        np.testing.assert_allclose(back[:, column], sample.targets[name], atol=1e-5)
    assert scaler.units == ("Debye", "eV", "eV")
    assert list(scaler.references) == ["U0"]


def test_element_without_reference_is_not_a_number_in_that_target_alone():
    # No molecule with oxygen has a known y.
    targets = {"y": [1, 2, np.nan, np.nan, np.nan], "w": [1, 2, 3, 4, 5]}
    molecules = made(targets, FORMULAS)
    scaler = TargetScaler.fit(molecules, ["y", "w"], ["sum", "sum"], {"y": "fitted"})
    assert scaler.references.keys() == {"y"}
    assert scaler.references["y"].keys() == {1, 6}
    others = made({"y": [3, 4], "w": [1, 2]}, [[8, 1], [6, 1]])
    expected = [[True, False], [False, False]]
    assert scaler.scale(others).isnan().tolist() == expected
    assert np.isnan(scaler.unscale(torch.zeros(2, 2), others)).tolist() == expected
    assert scaler.without_reference("y", others.numbers) == [8]
    assert scaler.without_reference("w", others.numbers) == []


def test_outputs_of_any_precision_are_unscaled(sample):
    scaler = fit_one(sample, "sum", "fitted", "U0")
    outputs = torch.randn(5, 1).bfloat16().requires_grad_()
    expected = scaler.unscale(outputs.detach().double(), sample[:5])
    assert scaler.unscale(outputs, sample[:5]).tolist() == expected.tolist()


def test_published_references_are_those_of_elements_in_training():
    molecules = made({"U0": [-2, -1038]}, [[1, 1], [6, 1]])
    references = fit_one(molecules, "sum", "published", "U0").references["U0"]
    assert references == {z: qm9.PUBLISHED_REFERENCES["U0"][z] for z in (1, 6)}


@pytest.mark.parametrize("readout", ["mean", "sum", "dipole"])
def test_constant_target_has_unit_spread(readout):
    value = 0.0 if readout == "dipole" else 7.3
    molecules = made({"y": [value] * 3}, [[1, 8], [8, 1], [6, 1]])
    scaler = fit_one(molecules, readout)
    assert scaler.std == (1,)
    assert scaler.scale(molecules).abs().max() < 1e-6


def test_molecules_without_any_atoms_or_none_at_all_are_scaled():
    scaler = fit_one(made({"y": [1, 2, 4, 5, 9]}, FORMULAS), "sum", "fitted")
    assert scaler.scale(made({"y": []}, [])).shape == (0, 1)
    assert scaler.unscale(torch.ones(1, 1), made({}, [[]])) == pytest.approx(scaler.std[0])


@pytest.mark.parametrize(
    ("names", "readouts", "references", "message"),
    [
        (["z"], ["sum"], {}, "z: no such target; there are: y, U0"),
        (["y"], ["sum"], {"z": "none"}, "references: expected names of targets, got z"),
        (["y"], ["sum"], {"y": "guessed"}, "references: y: expected none, fitted, published"),
        (["y"], ["sum"], {"y": "published"}, r"references: y: there are published ones of .*U0"),
        (["U0"], ["sum"], {"U0": "published"}, "references: U0: there are no published ones of B"),
        (["y"], ["dipole"], {"y": "fitted"}, "references: y: expected 'none' for a dipole"),
        (["y"], ["max"], {}, "readouts: expected pooled, sum, mean, dipole, got 'max'"),
        (["y", "y"], ["sum", "sum"], {}, "names: expected different ones"),
        ([], [], {}, "names: expected different ones"),
    ],
)
def test_what_cannot_be_fitted_is_named(names, readouts, references, message):
    molecules = made({"y": [1, 2], "U0": [3, 4]}, [[1, 35], [6, 1]])
    with pytest.raises(ValueError, match=message):
        TargetScaler.fit(molecules, names, readouts, references)


def test_published_references_in_another_unit_are_refused():
    molecules = made({"U0": [1, 2]}, [[1, 1], [6, 1]], {"U0": "kcal/mol"})
    with pytest.raises(ValueError, match="U0: published ones are in eV, got kcal/mol"):
        fit_one(molecules, "sum", "published", "U0")


def test_one_known_value_is_too_few():
    molecules = made({"y": [1, np.nan, np.nan, np.inf, np.nan]}, FORMULAS)
    with pytest.raises(ValueError, match=r"y: expected at least 2 training molecules .* got 1"):
        fit_one(molecules)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (1.0, 2.0)}, "mean: expected 1, one for each target, got 2"),
        ({"units": ()}, "units: expected 1"),
        ({"std": (0.0,)}, "std: expected numbers > 0"),
        ({"references": {"x": {1: 1.0}}}, "references: expected names of targets, got x"),
        ({"references": {"y": {300: 1.0}}}, "references: y: expected atomic numbers, got 300"),
    ],
)
def test_scaler_that_contradicts_itself_cannot_be_made(change, message):
    scaler = fit_one(made({"y": [1, 2, 4, 5, 9]}, FORMULAS), "sum", "fitted")
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(scaler, **change)


def test_atoms_are_counted():
    counts = element_counts(made({}, [[1, 8, 1], [], [6]]), (1, 6, 8, 9))
    assert counts.tolist() == [[2, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
