"""The bonds that coordinates imply."""

from __future__ import annotations

import time

import numpy as np
import pytest
from rdkit import Chem

from geot_model.bonds import perceive_bonds
from geot_model.conformers import embed

CAFFEINE = "Cn1c(=O)c2c(ncn2C)n(C)c1=O"


def canonical(smiles: str) -> str:
    """Canonical SMILES without stereo."""
    return str(Chem.MolToSmiles(Chem.MolFromSmiles(smiles), isomericSmiles=False))


def heavy_smiles(mol: Chem.Mol) -> str:
    """Canonical SMILES of a molecule without its hydrogens."""
    return canonical(Chem.MolToSmiles(Chem.RemoveHs(mol)))


@pytest.mark.parametrize(
    "smiles",
    [
        "[H][H]",
        "C",
        "O=C=O",
        CAFFEINE,
        "O=[N+]([O-])c1ccccc1",
        "[NH3+]CC(=O)[O-]",
        "C1C2CC1C2",  # 1.9 Å across the ring
        "O.O",
    ],
)
def test_bonds_from_coordinates_are_those_of_the_smiles(smiles: str) -> None:
    molecule = embed(smiles)
    mol = perceive_bonds(molecule.numbers, molecule.positions)
    assert mol is not None
    assert [atom.GetAtomicNum() for atom in mol.GetAtoms()] == molecule.numbers.tolist()
    assert heavy_smiles(mol) == canonical(smiles)


def test_bonds_that_are_long_for_their_radii_are_found() -> None:
    for number, length in ((1, 0.74), (9, 1.41)):
        mol = perceive_bonds([number, number], np.array([[0, 0, 0], [0, 0, length]]))
        assert mol is not None and mol.GetNumBonds() == 1


@pytest.mark.parametrize("smiles", ["C[N+](C)(C)C", "CC(=O)[O-]", CAFFEINE])
def test_a_known_smiles_gives_charges_in_any_order_of_atoms(smiles: str) -> None:
    molecule = embed(smiles)
    order = np.random.default_rng(0).permutation(len(molecule.numbers))
    numbers, positions = molecule.numbers[order], molecule.positions[order]
    mol = perceive_bonds(numbers, positions, smiles=smiles)
    assert mol is not None
    assert [atom.GetAtomicNum() for atom in mol.GetAtoms()] == numbers.tolist()
    assert heavy_smiles(mol) == canonical(smiles)
    np.testing.assert_allclose(mol.GetConformer().GetPositions(), positions, atol=1e-6)


def test_a_smiles_of_another_molecule_is_not_believed() -> None:
    molecule = embed("CCO")
    for other in ("COC", "CC", "not a SMILES"):
        mol = perceive_bonds(molecule.numbers, molecule.positions, smiles=other)
        assert mol is not None and heavy_smiles(mol) == "CCO"


def test_bonds_without_orders_are_single_where_no_neutral_molecule_fits() -> None:
    molecule = embed(CAFFEINE)
    mol = perceive_bonds(molecule.numbers[:14], molecule.positions[:14])  # without hydrogens
    assert mol is not None
    assert mol.GetNumBonds() == 15
    assert {bond.GetBondType() for bond in mol.GetBonds()} == {Chem.BondType.SINGLE}


def test_bond_search_ends_on_molecules_where_an_unbounded_one_does_not() -> None:
    sulfate = "C(OS(=O)(=O)[O-])"
    smiles = f"[N-]=[N+]=NCC1O{sulfate}{sulfate}{sulfate}C1OS(=O)(=O)[O-]"
    molecule = embed(smiles)
    start = time.process_time()
    mol = perceive_bonds(molecule.numbers, molecule.positions)
    assert mol is not None and mol.GetNumBonds() == len(molecule.numbers)  # one ring
    assert time.process_time() - start < 20


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 30.0])
@pytest.mark.parametrize("n", [1, 2, 3, 100])
def test_any_cloud_of_atoms_gets_an_answer(n: int, spread: float) -> None:
    rng = np.random.default_rng(n)
    numbers = rng.choice([1, 6, 7, 8, 15, 16, 26, 118], n)
    mol = perceive_bonds(numbers, spread * n ** (1 / 3) * rng.normal(size=(n, 3)))
    assert mol is not None and mol.GetNumAtoms() == n


def test_nothing_to_build_from_gives_none() -> None:
    assert perceive_bonds([], np.zeros((0, 3))) is None
    assert perceive_bonds([0, 1], np.eye(2, 3)) is None
    assert perceive_bonds([6, 119], np.eye(2, 3)) is None
    assert perceive_bonds([6, 1], np.full((2, 3), np.nan)) is None
