"""Pair energies of the simulation: known values, known pairs."""

import numpy as np
import pytest

from bench import pair_energies as energies
from geot_model.molecules import Molecule, Molecules

WATER = np.array([[0, 0, 0], [0.9572, 0, 0], [-0.24, 0.9266, 0]], np.float32)


def butane():
    """C4 in a row, 1.54 Å apart, without hydrogens."""
    places = np.array([[1.3 * n, 0.8 * (n % 2), 0] for n in range(4)], np.float32)
    return np.array([6, 6, 6, 6], np.uint8), places


def test_coulomb_is_that_of_point_charges():
    numbers = np.array([8, 1, 1], np.uint8)
    found = energies.coulomb(numbers, energies.distances(WATER))
    assert found[0, 1] == pytest.approx(-14.399645 * 0.5 * 0.15 / 0.9572, rel=1e-6)
    assert found[1, 2] == pytest.approx(14.399645 * 0.15**2 / 1.5139, rel=1e-3)


def test_bonds_are_what_is_near():
    numbers, places = butane()
    dist = energies.distances(places)
    expected = np.abs(np.subtract.outer(range(4), range(4))) == 1
    assert np.array_equal(energies.bonded(numbers, dist), expected)
    found = energies.bonds(numbers, dist)
    assert np.array_equal(found != 0, expected)
    at_rest = energies.bonds(numbers, np.where(expected, 1.52, 9.0))
    assert at_rest[0, 1] == pytest.approx(-3.6)


def test_lennard_jones_begins_three_bonds_away():
    numbers, places = butane()
    found = energies.lennard_jones(numbers, energies.distances(places))
    assert set(zip(*np.nonzero(found), strict=True)) == {(0, 3), (3, 0)}
    two = np.array([6, 6], np.uint8)
    dist = np.array([[np.inf, 3.851], [3.851, np.inf]])
    assert energies.lennard_jones(two, dist)[0, 1] == pytest.approx(-0.105 * 0.0433641)


@pytest.mark.parametrize("name", energies.ENERGIES)
def test_totals_are_sums_over_pairs(name):
    numbers, places = butane()
    both = Molecules.join(
        [
            Molecule(numbers.astype(np.int64), places, "a"),
            Molecule(np.array([8, 1, 1]), WATER, "b"),
        ]
    )
    found = energies.totals(name, both)
    for m in range(2):
        of_pairs = energies.pairs(name, both, m)
        assert np.array_equal(of_pairs, of_pairs.T) and not np.diag(of_pairs).any()
        assert found[m] == pytest.approx(np.triu(of_pairs).sum())
    assert found.any()
