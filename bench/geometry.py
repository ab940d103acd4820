"""Where the atoms of a benchmark are: real molecules as dense tensors, or a jittered lattice.

    qm9         the 3,000 molecules of QM9 that ship with geot_model
    drug_like   128 drug-like molecules
    pcqm_like   256 molecules of the size of PCQM4Mv2
    aspirin     64 frames of molecular dynamics
    protein     one of 2,030 heavy atoms

All but the first lie in `bench/geometries`, where a README says where they are from.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROOT = Path(__file__).parents[1]
FILES = {
    "qm9": ROOT / "python" / "geot_model" / "qm9_sample.npz",
    **{
        name: ROOT / "bench" / "geometries" / f"{name}.npz"
        for name in ("drug_like", "pcqm_like", "aspirin", "protein")
    },
}
SEED = 2  # of the choice
DENSITY = 0.1  # atoms/Å³, hydrogens included
JITTER = 0.6  # Å, of each coordinate: no two atoms closer than 0.9 Å


class Geometry(NamedTuple):
    """B molecules, padded to N atoms.

    Attributes:
        atom_types: Elements as 0 to `num_types - 1`, by rising atomic number; 0 where there is no
            atom; int64 [B, N].
        positions: Å, 0 where there is no atom; float32 [B, N, 3].
        mask: True where there is an atom; bool [B, N].
        num_types: Number of elements in the whole file, of which these molecules may lack some.
    """

    atom_types: Tensor
    positions: Tensor
    mask: Tensor
    num_types: int


def load(
    name: str, molecules: int | None = None, max_atoms: int | None = None, heavy: bool = False
) -> Geometry:
    """Load molecules of a file, the same ones for the same arguments.

    Args:
        name: One of `FILES`.
        molecules: How many to choose at random. None twice before all have come once. None: all,
            in the order of the file.
        max_atoms: Pad to this size and choose among the molecules that are not larger. Of the
            protein, take the atoms nearest to its centre. None: no limit, and pad to the largest
            molecule chosen.
        heavy: Leave out hydrogens, before anything is counted.

    Raises:
        ValueError: An unknown name, less than one molecule or atom wanted, or no molecule that is
            small enough.
    """
    if name not in FILES:
        raise ValueError(f"name: expected one of {', '.join(FILES)}, got {name!r}")
    for argument, value in (("molecules", molecules), ("max_atoms", max_atoms)):
        if value is not None and value < 1:
            raise ValueError(f"{argument}: expected at least 1, got {value}")
    numbers, positions, ptr = _read(FILES[name])
    elements = np.unique(numbers)
    found = [np.arange(*ends) for ends in pairwise(ptr)]  # rows of each
    if heavy:
        found = [rows[numbers[rows] > 1] for rows in found]
    if max_atoms is not None:
        if name == "protein":
            found = [_ball(rows, positions, max_atoms) for rows in found]
        found = [rows for rows in found if len(rows) <= max_atoms]
        if not found:
            raise ValueError(f"max_atoms: no molecule of {name} has {max_atoms} atoms or less")
    if molecules is not None:
        # numpy froze the stream of RandomState; that of default_rng may change with a release.
        order = np.random.RandomState(SEED).permutation(len(found))
        found = [found[i] for i in np.resize(order, molecules)]
    sizes = np.array([len(rows) for rows in found])
    mask = np.arange(max_atoms or sizes.max()) < sizes[:, None]  # [B, N]
    rows = np.concatenate(found)
    types = np.zeros(mask.shape, np.int64)
    types[mask] = np.searchsorted(elements, numbers[rows])
    padded = np.zeros((*mask.shape, 3), np.float32)
    padded[mask] = positions[rows]
    tensors = (torch.from_numpy(x) for x in (types, padded, mask))
    return Geometry(*tensors, num_types=len(elements))


def lattice_molecules(batch: int, atoms: int) -> Tensor:
    """Positions `[B, N, 3]`, Å: the N points of a lattice nearest to a random point, jittered."""
    reach = math.ceil((atoms * 3 / (4 * math.pi)) ** (1 / 3)) + 2
    axis = torch.arange(-reach, reach + 1.0)
    grid = torch.cartesian_prod(axis, axis, axis)  # [M, 3]
    center = torch.rand(batch, 1, 3) - 0.5
    nearest = (grid - center).square().sum(-1).topk(atoms, largest=False).indices  # [B, N]
    shuffled = nearest[:, torch.randperm(atoms)]
    return grid[shuffled] * DENSITY ** (-1 / 3) + JITTER * (2 * torch.rand(batch, atoms, 3) - 1)


def _read(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int64]]:
    """Atomic numbers `[T]`, positions `[T, 3]` and first rows of molecules `[M+1]`."""
    with np.load(path, allow_pickle=False) as file:
        return file["numbers"], file["positions"], file["ptr"]


def _ball(
    rows: NDArray[np.int64], positions: NDArray[np.float32], atoms: int
) -> NDArray[np.int64]:
    """Those rows that are nearest to the centre of all, in their own order."""
    chosen = positions[rows]
    squares = np.square(chosen - chosen.mean(0, dtype=np.float64)).sum(-1)
    return rows[np.sort(np.argsort(squares, kind="stable")[:atoms])]
