"""QM9: the shipped sample, the full set, published references, subsets and padding."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from geot_model.molecules import Molecules, pad_batch
from geot_model.qm9 import PUBLISHED_REFERENCES, TARGETS, load_qm9

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "python" / "geot_model" / "qm9_sample.npz"

needs_qm9pack = pytest.mark.skipif(
    importlib.util.find_spec("qm9pack") is None, reason="qm9pack is not installed"
)


@pytest.fixture(scope="module")
def sample() -> Molecules:
    return load_qm9()


@pytest.fixture(scope="module")
def full() -> Molecules:
    return load_qm9(full=True)


@pytest.fixture(scope="module")
def script():
    """The script as a module: `scripts` is no package."""
    spec = importlib.util.spec_from_file_location("script", ROOT / "scripts/make_qm9_sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gdb_index(molecules: Molecules) -> np.ndarray:
    return np.array([int(name.removeprefix("gdb_")) for name in molecules.names])


def assert_same(left: Molecules, right: Molecules) -> None:
    for name in ("numbers", "positions", "ptr", "names", "smiles"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), strict=True)
    assert list(left.targets) == list(right.targets)
    for name, values in left.targets.items():
        np.testing.assert_array_equal(values, right.targets[name], strict=True)


def small_molecules() -> Molecules:
    """Three molecules of 2, 0 and 3 atoms with values that are all different."""
    return Molecules(
        numbers=np.array([1, 9, 8, 1, 6], np.uint8),
        positions=np.arange(1, 16, dtype=np.float32).reshape(5, 3),
        ptr=np.array([0, 2, 2, 5]),
        targets={"mu": np.array([0.5, 1.5, 2.5])},
        names=np.array(["a", "b", "c"]),
    )


def test_sample_file_is_at_most_one_megabyte():
    assert os.path.getsize(SAMPLE) <= 1_000_000


def test_sample_file_loads_without_pickle_and_states_names_units_and_source():
    with np.load(SAMPLE, allow_pickle=False) as file:
        assert dict(zip(file["target_names"], file["target_units"], strict=True)) == TARGETS
        assert "doi:10.1038/sdata.2014.22" in str(file["source"])
        assert all(file[name].dtype != object for name in file.files)


def test_sample_has_3000_molecules_of_the_five_elements(sample):
    assert len(sample) == 3000
    assert len(set(sample.names)) == 3000
    assert sample.elements == (1, 6, 7, 8, 9)
    assert np.diff(sample.ptr).min() >= 3 and sample.max_atoms <= 29


def test_sample_has_the_twelve_targets_in_double_precision(sample):
    usual = ["mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "U0", "U", "H", "G", "Cv"]
    assert list(TARGETS) == list(sample.targets) == usual
    for values in sample.targets.values():
        assert values.shape == (3000,) and values.dtype == np.float64
        assert np.isfinite(values).all()


def test_sample_is_spread_evenly_over_qm9(sample):
    index = gdb_index(sample)
    assert (np.diff(index) > 0).all()
    counts, _ = np.histogram(index, bins=10, range=(1, 133885))
    # 300 expected in each tenth, allowed five standard deviations of 16.4.
    assert (abs(counts - 300) < 82).all()


def test_gap_is_lumo_minus_homo_to_rounding(sample):
    error = sample.targets["gap"] - (sample.targets["lumo"] - sample.targets["homo"])
    # Each of the three is rounded to 1e-4 Hartree.
    assert abs(error).max() <= 1.5e-4 * 27.2114 + 1e-9


def test_enthalpy_is_energy_plus_kt(sample):
    difference = sample.targets["H"] - sample.targets["U"]
    kt = 8.617333e-5 * 298.15  # eV
    np.testing.assert_allclose(difference, kt, atol=1.5e-6 * 27.2114)


def test_energies_are_in_order(sample):
    targets = sample.targets
    assert (targets["U0"] < targets["U"]).all() and (targets["U"] < targets["H"]).all()
    assert (targets["G"] < targets["U0"]).all()


def test_energy_fits_the_atoms_of_its_molecule(sample):
    """Binding energies of organic molecules are 3.8 to 5.3 eV for each atom."""
    atoms = np.array([PUBLISHED_REFERENCES["U0"][number] for number in sample.numbers.tolist()])
    free = np.add.reduceat(atoms, sample.ptr[:-1])
    binding = (free - sample.targets["U0"]) / np.diff(sample.ptr)
    assert binding.min() > 3.8 and binding.max() < 5.3


def test_published_references_are_those_of_free_atoms_in_our_units():
    """QM9's own, times Hartree: -0.500273, -37.846772, ... for U0."""
    expected = {1: -13.6131, 6: -1029.8631, 7: -1485.3025, 8: -2042.6112, 9: -2713.4848}
    assert PUBLISHED_REFERENCES["U0"] == pytest.approx(expected, abs=1e-4)
    assert set(PUBLISHED_REFERENCES) == {"zpve", "U0", "U", "H", "G", "Cv"}
    kt = 8.617333e-5 * 298.15  # eV
    for element in expected:
        energy = {name: PUBLISHED_REFERENCES[name][element] for name in ("U0", "U", "H", "G")}
        # A free atom has no inner motion: 3/2 kT of translation, and kT of pressure times volume.
        assert energy["U"] - energy["U0"] == pytest.approx(1.5 * kt, abs=5e-5)
        assert energy["H"] - energy["U"] == pytest.approx(kt, abs=5e-5)
        assert -0.9 < energy["G"] - energy["H"] < -0.3  # -T S
        assert PUBLISHED_REFERENCES["Cv"][element] == 2.981  # 3/2 R
        assert PUBLISHED_REFERENCES["zpve"][element] == 0


def test_electronic_extent_fits_the_positions(sample):
    """<R^2> is that of the electrons put on the nuclei, Σ Z r^2, and a little more."""
    for molecule in sample[::50]:
        charges = molecule.numbers.astype(float)
        centred = molecule.positions - charges @ molecule.positions / charges.sum()
        on_nuclei = charges @ (centred**2).sum(axis=1)
        assert 1.0 < molecule.targets["r2"][0] / on_nuclei < 1.3


def test_polarizability_and_heat_capacity_are_of_molecular_size(sample):
    for_each_atom = sample.targets["alpha"] / np.diff(sample.ptr)
    assert for_each_atom.min() > 0.4 and for_each_atom.max() < 1.3  # Å^3
    assert sample.targets["Cv"].min() > 5.96 and sample.targets["Cv"].max() < 50  # 3 R and more


def test_nearest_neighbours_are_a_bond_length_away(sample):
    for molecule in sample[::10]:
        steps = molecule.positions[:, None] - molecule.positions[None]
        distances = np.linalg.norm(steps, axis=-1)
        np.fill_diagonal(distances, np.inf)
        nearest = distances.min(axis=1)
        hydrogen = molecule.numbers == 1
        assert nearest.min() > 0.94 and nearest.max() < 1.6
        assert nearest[hydrogen].max(initial=0.95) < 1.15  # X-H


def test_subset_keeps_molecules_together():
    molecules = small_molecules()
    subset = molecules[[2, 0]]
    assert subset.names.tolist() == ["c", "a"]
    assert subset.ptr.tolist() == [0, 3, 5]
    assert subset.numbers.tolist() == [8, 1, 6, 1, 9]
    assert subset.positions[:, 0].tolist() == [7, 10, 13, 1, 4]
    assert subset.targets["mu"].tolist() == [2.5, 0.5]


@pytest.mark.parametrize(
    ("key", "names"),
    [
        (2, "c"),
        (-1, "c"),
        (np.int64(1), "b"),
        (slice(1, None), "bc"),
        (slice(None, None, -1), "cba"),
        (np.array([0, 0, 2]), "aac"),
        (np.array([True, False, True]), "ac"),
        ([], ""),
    ],
)
def test_subset_takes_any_index_of_numpy(key, names):
    subset = small_molecules()[key]
    assert "".join(subset.names) == names
    assert len(subset) == len(names)


def test_subset_out_of_range_raises_and_ends_a_loop():
    with pytest.raises(IndexError):
        small_molecules()[3]
    assert [len(molecule.numbers) for molecule in small_molecules()] == [2, 0, 3]


def test_subset_of_the_sample_agrees_with_slicing_by_hand(sample):
    chosen = np.random.default_rng(0).integers(len(sample), size=65)
    subset = sample[chosen]
    for new, old in enumerate(chosen):
        left = slice(subset.ptr[new], subset.ptr[new + 1])
        right = slice(sample.ptr[old], sample.ptr[old + 1])
        np.testing.assert_array_equal(subset.numbers[left], sample.numbers[right])
        np.testing.assert_array_equal(subset.positions[left], sample.positions[right])
    assert_same(sample[:], sample)


def test_contradicting_shapes_raise():
    molecules = small_molecules()
    with pytest.raises(ValueError, match=r"positions: expected \[5, 3\], got \[4, 3\]"):
        Molecules(
            molecules.numbers,
            molecules.positions[:4],
            molecules.ptr,
            molecules.targets,
            molecules.names,
        )
    with pytest.raises(ValueError, match=r"targets\['mu'\]: expected \[3\], got \[2\]"):
        Molecules(
            molecules.numbers,
            molecules.positions,
            molecules.ptr,
            {"mu": np.zeros(2)},
            molecules.names,
        )


def test_padding_marks_real_atoms_and_fills_with_zeros():
    numbers, positions, mask = pad_batch(small_molecules())
    assert (numbers.dtype, positions.dtype, mask.dtype) == (
        torch.int64,
        torch.float32,
        torch.bool,
    )
    assert mask.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert numbers.tolist() == [[1, 9, 0], [0, 0, 0], [8, 1, 6]]
    assert positions[..., 2].tolist() == [[3, 6, 0], [0, 0, 0], [9, 12, 15]]


def test_padding_of_the_sample_loses_nothing(sample):
    batch = sample[100:131]
    numbers, positions, mask = pad_batch(batch, pad_to=33)
    assert positions.shape == (31, 33, 3)
    assert mask.sum(1).tolist() == np.diff(batch.ptr).tolist()
    np.testing.assert_array_equal(numbers[mask].numpy(), batch.numbers)
    np.testing.assert_array_equal(positions[mask].numpy(), batch.positions)
    assert not numbers[~mask].any() and not positions[~mask].any()


def test_padding_too_small_for_the_largest_molecule_raises():
    with pytest.raises(ValueError, match="pad_to: expected at least 3, got 2"):
        pad_batch(small_molecules(), pad_to=2)


def test_padding_of_no_molecules_gives_empty_tensors():
    numbers, positions, mask = pad_batch(small_molecules()[:0])
    assert (numbers.shape, positions.shape, mask.shape) == ((0, 0), (0, 0, 3), (0, 0))


def test_full_set_without_qm9pack_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install qm9pack"):
        load_qm9(full=True)


@needs_qm9pack
def test_full_set_is_qm9_without_the_uncharacterized_molecules(full):
    index = gdb_index(full)
    assert len(full) == 133885 - 3054
    assert (index[0], index[-1]) == (1, 133885) and (np.diff(index) > 0).all()
    # The first and the last of the published list of uncharacterized molecules.
    listed = [58, 61, 80, 185, 186, 245, 267, 280, 286, 752, 133860, 133864, 133865, 133866]
    assert not np.isin(listed, index).any()
    assert (full.max_atoms, full.elements) == (29, (1, 6, 7, 8, 9))


@needs_qm9pack
def test_full_set_has_methane_and_water_in_our_units(full):
    """Published values: Hartree x 27.21139, Bohr^2 x 0.280029, Bohr^3 x 0.148185."""
    methane, water = full[0], full[2]
    assert full.smiles[:3].tolist() == ["C", "N", "O"]
    assert methane.numbers.tolist() == [6, 1, 1, 1, 1]
    assert water.numbers.tolist() == [8, 1, 1]
    expected = {
        "mu": (0.0, 1.8511),
        "alpha": (1.957519, 0.935045),
        "homo": (-10.549854, -7.967494),
        "lumo": (3.186453, 1.869422),
        "gap": (13.736308, 9.836916),
        "r2": (9.902957, 5.320600),
        "zpve": (1.217682, 0.581643),
        "U0": (-1101.487794, -2079.077856),
        "U": (-1101.409754, -2079.000715),
        "H": (-1101.384039, -2078.975000),
        "G": (-1102.022980, -2079.558069),
        "Cv": (6.469, 6.002),
    }
    for name, values in expected.items():
        came = (methane.targets[name][0], water.targets[name][0])
        np.testing.assert_allclose(came, values, rtol=1e-6, atol=1e-5, err_msg=name)
    bonds = np.linalg.norm(methane.positions[1:] - methane.positions[0], axis=1)
    np.testing.assert_allclose(bonds, 1.0919, atol=1e-3)


@needs_qm9pack
def test_sample_agrees_with_the_full_set(sample, full):
    rows = np.searchsorted(gdb_index(full), gdb_index(sample))
    assert_same(sample, full[rows])


@needs_qm9pack
def test_script_makes_the_shipped_file_again(script, full):
    arrays = script.draw_sample(full)
    with np.load(SAMPLE, allow_pickle=False) as file:
        assert sorted(file.files) == sorted(arrays)
        for name, values in arrays.items():
            np.testing.assert_array_equal(file[name], values, strict=True)
