"""Reading molecules from files, and the bonds that coordinates imply."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem

from geot_model.molecule import Molecule, perceive_bonds, read_molecules

WATER = "O 0 0 0\nH 0.757 0.586 0\nH -0.757 0.586 0\n"


def write(folder: Path, name: str, text: str) -> Path:
    """A file with this text."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def canonical(smiles: str) -> str:
    """Canonical SMILES without stereo."""
    return str(Chem.MolToSmiles(Chem.MolFromSmiles(smiles), isomericSmiles=False))


def heavy_smiles(mol: Chem.Mol) -> str:
    """Canonical SMILES of a molecule without its hydrogens."""
    return canonical(Chem.MolToSmiles(Chem.RemoveHs(mol)))


def test_smiles_get_hydrogens_names_and_a_3d_structure(tmp_path: Path) -> None:
    path = write(tmp_path, "mols.smi", "# a comment\nC methane\n\nCC(=O)O acetic acid\nCO\n")
    molecules, problems = read_molecules(path)
    assert problems == []
    assert [m.name for m in molecules] == ["methane", "acetic acid", "mols-5"]
    assert [m.smiles for m in molecules] == ["C", "CC(=O)O", "CO"]
    methane = molecules[0]
    assert methane.numbers.tolist() == [6, 1, 1, 1, 1]
    assert methane.numbers.dtype == np.int64 and methane.positions.dtype == np.float32
    bonds = np.linalg.norm(methane.positions[1:] - methane.positions[0], axis=1)
    np.testing.assert_allclose(bonds, 1.09, atol=0.02)


def test_reading_twice_gives_the_same_coordinates(tmp_path: Path) -> None:
    path = write(tmp_path, "mols.txt", "CC(C)Cc1ccc(cc1)C(C)C(=O)O ibuprofen\n")
    first, second = (read_molecules(path)[0][0] for _ in range(2))
    np.testing.assert_array_equal(first.positions, second.positions)


def test_bad_smiles_are_reported_with_their_line_and_the_rest_is_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "mols.smi", "C\n# comment\nC1CC\nC(C)(C)(C)(C)C\n*C\nO water\n")
    molecules, problems = read_molecules(path)
    assert [m.name for m in molecules] == ["mols-1", "water"]
    assert problems[0] == f"{path}:3: cannot parse SMILES 'C1CC'"
    assert problems[1].startswith(f"{path}:4: cannot parse SMILES 'C(C)(C)(C)(C)C': Explicit")
    assert problems[2] == f"{path}:5: has a dummy atom, which is no element"
    assert len(problems) == 3
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("smiles", ["O.O", "[Na+].[Cl-]", "CC(=O)[O-].[NH4+]", "[He].[He].[He]"])
def test_fragments_of_a_smiles_do_not_lie_in_each_other(tmp_path: Path, smiles: str) -> None:
    molecules, problems = read_molecules(write(tmp_path, "mols.smi", smiles))
    assert problems == []
    fragments = Chem.GetMolFrags(Chem.AddHs(Chem.MolFromSmiles(smiles)))
    positions = molecules[0].positions
    for k, here in enumerate(fragments):
        for there in fragments[:k]:
            between = positions[list(here)][:, None] - positions[list(there)]
            assert np.linalg.norm(between, axis=-1).min() > 1.4


def test_an_element_without_force_field_still_gets_coordinates(tmp_path: Path) -> None:
    molecules, problems = read_molecules(write(tmp_path, "mols.smi", "[Pt](Cl)(Cl)(N)N\n[He]\n"))
    assert problems == []
    assert [len(m.numbers) for m in molecules] == [9, 1]


def test_byte_order_mark_and_windows_line_ends_are_no_part_of_a_molecule(tmp_path: Path) -> None:
    path = tmp_path / "mols.smi"
    path.write_bytes(b"\xef\xbb\xbfC methane\r\nCO\r\n")
    molecules, problems = read_molecules(path)
    assert problems == []
    assert [m.name for m in molecules] == ["methane", "mols-2"]


def sdf_record(smiles: str, name: str, *, three_d: bool = True, hydrogens: bool = True) -> str:
    """One record of an SDF."""
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    if three_d:
        Chem.rdDistGeom.EmbedMolecule(mol, randomSeed=7)
    else:
        Chem.rdDepictor.Compute2DCoords(mol)
    mol.SetProp("_Name", name)
    return Chem.MolToMolBlock(mol if hydrogens else Chem.RemoveHs(mol)) + "$$$$\n"


def test_sdf_records_are_read_and_bad_ones_reported_by_number(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flat = sdf_record("CCO", "flat", three_d=False)
    text = sdf_record("CCO", "ethanol") + "no record\n$$$$\n" + flat + sdf_record("O", "")
    path = write(tmp_path, "mols.sdf", text)
    molecules, problems = read_molecules(path)
    assert [(m.name, m.smiles, len(m.numbers)) for m in molecules] == [
        ("ethanol", "CCO", 9),
        ("mols-4", "O", 3),
    ]
    assert problems[0] == f"{path}: record 2: cannot parse the mol block"
    assert problems[1].startswith(f"{path}: record 3: has no 3-D coordinates")
    assert len(problems) == 2
    assert capfd.readouterr().err == ""


def test_sdf_record_without_hydrogens_gets_them(tmp_path: Path) -> None:
    path = write(tmp_path, "mols.sdf", sdf_record("CCO", "ethanol", hydrogens=False))
    (molecule,), problems = read_molecules(path)
    assert problems == []
    assert sorted(molecule.numbers.tolist()) == [1] * 6 + [6, 6, 8]
    near = np.linalg.norm(molecule.positions[:, None] - molecule.positions, axis=-1)
    assert near[~np.eye(9, dtype=bool)].min() > 0.8


def test_xyz_frames_are_read_with_symbols_numbers_and_extra_columns(tmp_path: Path) -> None:
    second = "2\nProperties=species:S:1:pos:R:3\nCL 0 0 0 -0.1\n1 1.2*^-6 0 1.28 0.1\n"
    path = write(tmp_path, "mols.xyz", f"3\nwater\n{WATER}\n{second}")
    (water, chloride), problems = read_molecules(path)
    assert problems == []
    assert water.name == "water" and water.numbers.tolist() == [8, 1, 1]
    assert water.smiles is None
    assert chloride.name == "mols-2" and chloride.numbers.tolist() == [17, 1]
    np.testing.assert_allclose(chloride.positions[1], [1.2e-6, 0, 1.28], rtol=1e-6)


@pytest.mark.parametrize(
    ("bad", "line", "reason"),
    [
        ("2\nx\nC 0 0 0\nXx 0 0 1\n", 9, "expected 'element x y z', got 'Xx 0 0 1'"),
        ("2\nx\nC 0 0\nO 0 0 1\n", 8, "expected 'element x y z', got 'C 0 0'"),
        ("2\nx\nC 0 0 0\nO 0 nan 1\n", 9, "expected 'element x y z', got 'O 0 nan 1'"),
        ("3\nx\nC 0 0 0\nO 0 0 1\n", 10, "expected 'element x y z', got '3'"),
        ("0\nnothing\n", 6, "expected the number of atoms, got '0'"),
        ("two\nx\nC 0 0 0\n", 6, "expected the number of atoms, got 'two'"),
    ],
)
def test_bad_xyz_frame_is_reported_with_its_line_and_the_rest_is_read(
    tmp_path: Path, bad: str, line: int, reason: str
) -> None:
    path = write(tmp_path, "mols.xyz", f"3\nfirst\n{WATER}{bad}3\nlast\n{WATER}")
    molecules, problems = read_molecules(path)
    assert [m.name for m in molecules] == ["first", "last"]
    assert problems == [f"{path}:{line}: {reason}"]


def test_xyz_file_that_ends_early_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path, "mols.xyz", "4\nx\nC 0 0 0\n")
    assert read_molecules(path) == ([], [f"{path}:1: expected 4 atoms, the file ends after 1"])


@pytest.mark.parametrize("name", ["empty.smi", "empty.sdf", "empty.xyz"])
def test_empty_file_has_no_molecules_and_no_problems(tmp_path: Path, name: str) -> None:
    assert read_molecules(write(tmp_path, name, "\n\n")) == ([], [])


def test_wrong_suffix_and_missing_file_say_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected SMILES .*\.sdf.*\.xyz.*'\.pdb'"):
        read_molecules(tmp_path / "mols.pdb")
    with pytest.raises(FileNotFoundError, match=r"no such file; expected SMILES"):
        read_molecules(tmp_path / "mols.smi")


def test_molecule_refuses_shapes_and_dtypes_that_do_not_fit() -> None:
    numbers = np.array([6, 8])
    with pytest.raises(ValueError, match=r"positions: expected float32 \[n=2, 3\], got float32"):
        Molecule(numbers, np.zeros((3, 3), np.float32), "CO")
    with pytest.raises(ValueError, match=r"positions: .*, got float64 \[2, 3\]"):
        Molecule(numbers, np.zeros((2, 3)), "CO")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"numbers: expected int64 \[n\], got uint8"):
        Molecule(numbers.astype(np.uint8), np.zeros((2, 3), np.float32), "")


CAFFEINE = "Cn1c(=O)c2c(ncn2C)n(C)c1=O"


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
def test_bonds_from_coordinates_are_those_of_the_smiles(tmp_path: Path, smiles: str) -> None:
    (molecule,), _ = read_molecules(write(tmp_path, "mols.smi", smiles))
    mol = perceive_bonds(molecule.numbers, molecule.positions)
    assert mol is not None
    assert [atom.GetAtomicNum() for atom in mol.GetAtoms()] == molecule.numbers.tolist()
    assert heavy_smiles(mol) == canonical(smiles)


def test_bonds_that_are_long_for_their_radii_are_found() -> None:
    for number, length in ((1, 0.74), (9, 1.41)):
        mol = perceive_bonds([number, number], np.array([[0, 0, 0], [0, 0, length]]))
        assert mol is not None and mol.GetNumBonds() == 1


@pytest.mark.parametrize("smiles", ["C[N+](C)(C)C", "CC(=O)[O-]", CAFFEINE])
def test_a_known_smiles_gives_charges_in_any_order_of_atoms(tmp_path: Path, smiles: str) -> None:
    (molecule,), _ = read_molecules(write(tmp_path, "mols.smi", smiles))
    order = np.random.default_rng(0).permutation(len(molecule.numbers))
    numbers, positions = molecule.numbers[order], molecule.positions[order]
    mol = perceive_bonds(numbers, positions, smiles=smiles)
    assert mol is not None
    assert [atom.GetAtomicNum() for atom in mol.GetAtoms()] == numbers.tolist()
    assert heavy_smiles(mol) == canonical(smiles)
    np.testing.assert_allclose(mol.GetConformer().GetPositions(), positions, atol=1e-6)


def test_a_smiles_of_another_molecule_is_not_believed(tmp_path: Path) -> None:
    (molecule,), _ = read_molecules(write(tmp_path, "mols.smi", "CCO"))
    for other in ("COC", "CC", "not a SMILES"):
        mol = perceive_bonds(molecule.numbers, molecule.positions, smiles=other)
        assert mol is not None and heavy_smiles(mol) == "CCO"


def test_bonds_without_orders_are_single_where_no_neutral_molecule_fits(tmp_path: Path) -> None:
    (molecule,), _ = read_molecules(write(tmp_path, "mols.smi", CAFFEINE))
    mol = perceive_bonds(molecule.numbers[:14], molecule.positions[:14])  # without hydrogens
    assert mol is not None
    assert mol.GetNumBonds() == 15
    assert {bond.GetBondType() for bond in mol.GetBonds()} == {Chem.BondType.SINGLE}


def test_bond_search_ends_on_molecules_where_an_unbounded_one_does_not(tmp_path: Path) -> None:
    sulfate = "C(OS(=O)(=O)[O-])"
    smiles = f"[N-]=[N+]=NCC1O{sulfate}{sulfate}{sulfate}C1OS(=O)(=O)[O-]"
    (molecule,), problems = read_molecules(write(tmp_path, "mols.smi", smiles))
    assert problems == []
    start = time.perf_counter()
    mol = perceive_bonds(molecule.numbers, molecule.positions)
    assert mol is not None and mol.GetNumBonds() == len(molecule.numbers)  # one ring
    assert time.perf_counter() - start < 20


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
