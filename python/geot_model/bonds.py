"""The bonds that coordinates imply."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
from rdkit import Chem, rdBase
from rdkit.Chem import AllChem, rdDetermineBonds
from rdkit.Geometry import Point3D

_NUM_ELEMENTS = 118
# Covalent radii are multiplied by these. RDKit's own rule bonds atoms across small rings, which
# leaves 6 % of our 3,000 molecules of QM9 without bond orders; 1.15 leaves none.
_BOND_REACHES = (1.15, 1.3)
# The search for bond orders is exponential in the number of atoms with several valences: on some
# molecules of 40 atoms it does not end (RDKit issue 9227). QM9's need fewer than 30 tries.
_BOND_ORDER_TRIES = 10_000


def perceive_bonds(
    numbers: npt.ArrayLike, positions: npt.ArrayLike, *, smiles: str | None = None
) -> Chem.Mol | None:
    """Bonds of a molecule from its coordinates, whatever they are, in bounded time.

    Atoms closer than 1.15 times the sum of their covalent radii are bonded; where no neutral
    molecule comes of that (H2, stretched bonds), those closer than 1.3 times. Bond orders and
    charges are those of `smiles` where it describes the same graph (in any order of atoms), else
    they are searched for with total charge 0, else every bond is single.

    Args:
        numbers: [n] integers, atomic numbers.
        positions: [n, 3], Å.
        smiles: the molecule's SMILES, if known.

    Returns:
        A molecule with atoms in the order given, hydrogens explicit, and a 3-D conformer; None
        where there is nothing to build one from: no atoms, an unknown element, a position that
        is not finite.
    """
    z = np.asarray(numbers)
    xyz = np.asarray(positions, dtype=np.float64)
    known = bool(((z >= 1) & (z <= _NUM_ELEMENTS)).all())
    if z.size == 0 or not known or not np.isfinite(xyz).all():
        return None
    with rdBase.BlockLogs():
        graphs = [_connected(z, xyz, reach) for reach in _BOND_REACHES]
        answers = itertools.chain(
            (_orders_from_smiles(graph, smiles) for graph in graphs),
            (_searched_orders(graph) for graph in graphs),
        )
        return next((mol for mol in answers if mol is not None), graphs[-1])


def _bare_atoms(z: npt.NDArray[np.int64], xyz: npt.NDArray[np.float64]) -> Chem.RWMol:
    """Atoms with a conformer and no bonds."""
    mol = Chem.RWMol()
    conformer = Chem.Conformer(len(z))
    for i, number in enumerate(z):
        atom = Chem.Atom(int(number))
        atom.SetNoImplicit(True)
        mol.AddAtom(atom)
        conformer.SetAtomPosition(i, Point3D(*map(float, xyz[i])))
    mol.AddConformer(conformer)
    return mol


def _connected(z: npt.NDArray[np.int64], xyz: npt.NDArray[np.float64], reach: float) -> Chem.Mol:
    """Which atoms are bonded, every bond single; no bonds where RDKit fails."""
    mol = _bare_atoms(z, xyz)
    try:
        rdDetermineBonds.DetermineConnectivity(mol, useVdw=True, covFactor=reach)
    except (ValueError, RuntimeError):
        mol = _bare_atoms(z, xyz)
    mol.UpdatePropertyCache(strict=False)
    return mol.GetMol()


def _orders_from_smiles(graph: Chem.Mol, smiles: str | None) -> Chem.Mol | None:
    """Bond orders and charges of `smiles` on the graph; None where the two do not match."""
    template = Chem.MolFromSmiles(smiles) if smiles else None
    if template is None:
        return None
    template = Chem.AddHs(template)
    if template.GetNumAtoms() != graph.GetNumAtoms():
        return None
    assign: Any = AllChem.AssignBondOrdersFromTemplate  # has no types
    try:
        mol: Chem.Mol = assign(template, graph)
    except (ValueError, RuntimeError):
        return None
    return mol


def _searched_orders(graph: Chem.Mol) -> Chem.Mol | None:
    """Bond orders by a bounded search for a neutral molecule; None where none is found."""
    mol = Chem.Mol(graph)
    try:
        rdDetermineBonds.DetermineBondOrders(mol, charge=0, maxIterations=_BOND_ORDER_TRIES)
    except (ValueError, RuntimeError):
        return None
    return mol
