"""Energies of molecules as sums over pairs of atoms, to ask attention maps whether they tell them.

    coulomb         k q_i q_j / d                       all pairs; a charge for each element
    lennard_jones   D ((s/d)^12 - 2 (s/d)^6)            pairs three or more bonds apart
    bonds           D ((1 - exp(-a (d - r)))^2 - 1)     bonded pairs

Energies eV, distances Å. Charges are made up; Lennard-Jones parameters are those of UFF (Rappé et
al., JACS 114, 10024 (1992)), without its atom types; bond lengths are sums of covalent radii
(Cordero et al., Dalton Trans. 2008, 2832), and their strengths made up. Atoms closer than 1.25
times that sum are bonded.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import shortest_path

from geot_model.molecules import Molecules

Floats = NDArray[np.float64]

COULOMB = 14.399645  # eV Å
KCAL = 0.0433641  # eV, per mol
REACH = 1.25  # of the sum of covalent radii
STIFFNESS = 2.0  # 1/Å
SEPARATION = 3  # bonds

CHARGE = {1: 0.15, 6: -0.05, 7: -0.4, 8: -0.5, 9: -0.25}
UFF_LENGTH = {1: 2.886, 6: 3.851, 7: 3.660, 8: 3.500, 9: 3.364}
UFF_ENERGY = {1: 0.044, 6: 0.105, 7: 0.069, 8: 0.060, 9: 0.050}
RADIUS = {1: 0.31, 6: 0.76, 7: 0.71, 8: 0.66, 9: 0.57}
STRENGTH = {1: 4.5, 6: 3.6, 7: 3.0, 8: 3.2, 9: 2.8}


def distances(positions: NDArray[np.float32]) -> Floats:
    """Å, `[n, n]`, infinity on the diagonal."""
    places = positions.astype(np.float64)
    apart = np.linalg.norm(places[:, None] - places, axis=-1)
    np.fill_diagonal(apart, np.inf)
    return apart


def coulomb(numbers: NDArray[np.uint8], dist: Floats) -> Floats:
    """Pair energies `[n, n]`, eV."""
    charge = _of(CHARGE, numbers)
    return COULOMB * np.outer(charge, charge) / dist


def lennard_jones(numbers: NDArray[np.uint8], dist: Floats) -> Floats:
    """Pair energies `[n, n]`, eV."""
    length, energy = _of(UFF_LENGTH, numbers), _of(UFF_ENERGY, numbers)
    ratio = np.sqrt(np.outer(length, length)) / dist
    far = shortest_path(bonded(numbers, dist), unweighted=True) >= SEPARATION
    values = KCAL * np.sqrt(np.outer(energy, energy)) * (ratio**12 - 2 * ratio**6)
    return np.where(far, values, 0.0)


def bonds(numbers: NDArray[np.uint8], dist: Floats) -> Floats:
    """Pair energies `[n, n]`, eV."""
    radius, strength = _of(RADIUS, numbers), _of(STRENGTH, numbers)
    stretch = np.where(np.isfinite(dist), dist, 0.0) - np.add.outer(radius, radius)
    values = np.sqrt(np.outer(strength, strength)) * ((1 - np.exp(-STIFFNESS * stretch)) ** 2 - 1)
    return np.where(bonded(numbers, dist), values, 0.0)


def bonded(numbers: NDArray[np.uint8], dist: Floats) -> NDArray[np.bool_]:
    """Which pairs are bonded, `[n, n]`."""
    radius = _of(RADIUS, numbers)
    near: NDArray[np.bool_] = dist < REACH * np.add.outer(radius, radius)
    return near


def _of(values: dict[int, float], numbers: NDArray[np.uint8]) -> Floats:
    return np.array([values[number] for number in numbers.tolist()])


ENERGIES: dict[str, Callable[[NDArray[np.uint8], Floats], Floats]] = {
    "coulomb": coulomb,
    "lennard_jones": lennard_jones,
    "bonds": bonds,
}


def pairs(name: str, molecules: Molecules, index: int) -> Floats:
    """Energies of the pairs of one molecule, `[n, n]`, symmetric, 0 on the diagonal; eV."""
    one = molecules.molecule(index)
    numbers = one.numbers.astype(np.uint8)
    return ENERGIES[name](numbers, distances(one.positions))


def totals(name: str, molecules: Molecules) -> Floats:
    """Energies of molecules, `[M]`, eV."""
    return np.array([pairs(name, molecules, m).sum() / 2 for m in range(len(molecules))])
