"""Molecules and targets from files: every format, and what is wrong with each."""

from __future__ import annotations

import gzip
import importlib
from pathlib import Path
from typing import Any

import ase
import ase.db
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from rdkit import Chem
from rdkit.Chem import rdDepictor, rdDistGeom

from geot_model import readers
from geot_model.molecules import Molecule
from geot_model.qm9 import TARGETS, load_qm9
from geot_model.readers import Data

WATER = "O 0 0 0\nH 0.757 0.586 0\nH -0.757 0.586 0\n"
EXTENDED = "Properties=species:S:1:pos:R:3"


def write(folder: Path, name: str, content: str | bytes) -> Path:
    """A file with this content."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: str | Path, **options: Any) -> Data:
    """What a file has; nothing is left in the user's cache."""
    return readers.read(path, **({"jobs": 1, "cache": None} | options))


def names(data: Data) -> list[str]:
    return [str(name) for name in data.molecules.names]


def smiles(data: Data) -> list[str | None]:
    return [data.molecules.molecule(i).smiles for i in range(len(data.molecules))]


def sizes(data: Data) -> list[int]:
    return [int(size) for size in np.diff(data.molecules.ptr)]


# SMILES


def test_smiles_get_hydrogens_names_and_a_3d_structure(tmp_path: Path) -> None:
    data = read(write(tmp_path, "mols.smi", "# a comment\nC methane\n\nCC(=O)O acetic acid\nCO\n"))
    assert data.problems == []
    assert names(data) == ["methane", "acetic acid", "mols-5"]
    assert smiles(data) == ["C", "CC(=O)O", "CO"]
    assert data.rows.tolist() == [2, 4, 5]
    methane = data.molecules.molecule(0)
    assert methane.numbers.tolist() == [6, 1, 1, 1, 1]
    bonds = np.linalg.norm(methane.positions[1:] - methane.positions[0], axis=1)
    np.testing.assert_allclose(bonds, 1.09, atol=0.02)


def test_bad_smiles_are_reported_with_their_line_and_the_rest_is_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "mols.txt", "C\n# comment\nC1CC\nC(C)(C)(C)(C)C\n*C\nO water\n")
    data = read(path)
    assert names(data) == ["mols-1", "water"] and data.rows.tolist() == [1, 6]
    assert data.problems[0] == f"{path}:3: cannot parse SMILES 'C1CC'"
    assert data.problems[1].startswith(f"{path}:4: cannot parse SMILES 'C(C)(C)(C)(C)C': Explicit")
    assert data.problems[2:] == [f"{path}:5: has a dummy atom, which is no element"]
    assert capfd.readouterr().err == ""


def test_byte_order_mark_and_windows_line_ends_are_no_part_of_a_molecule(tmp_path: Path) -> None:
    data = read(write(tmp_path, "mols.smi", b"\xef\xbb\xbfC methane\r\nCO\r\n"))
    assert data.problems == []
    assert names(data) == ["methane", "mols-2"]


def test_structures_are_kept_in_the_users_cache_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    path = write(tmp_path, "mols.smi", "C\n")
    readers.read(path, cache=None)
    readers.read(path, cache=tmp_path / "own")
    assert (tmp_path / "own" / "conformers.sqlite").is_file()
    assert not (tmp_path / "home").exists()
    readers.read(path)
    assert (tmp_path / "home/geot-kernels/conformers/conformers.sqlite").is_file()


def test_a_cache_that_cannot_be_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path, "mols.smi", "C\n")
    data = read(path, cache=path)
    assert len(data.molecules) == 1
    assert len(data.problems) == 1 and "3-D structures are not kept" in data.problems[0]


# Tables


def test_table_gives_names_and_targets_with_units(tmp_path: Path) -> None:
    text = "Name,SMILES,gap [eV],mu (D),U0,Cv [cal/(mol K)]\na,C,1.5,-2e-3,-1,6\nb,CO,2,0,-3,7\n"
    data = read(write(tmp_path, "mols.csv", text), targets=["gap", "MU", "U0", "Cv"])
    assert data.problems == []
    assert names(data) == ["a", "b"] and data.rows.tolist() == [2, 3]
    assert {name: values.tolist() for name, values in data.molecules.targets.items()} == {
        "gap": [1.5, 2.0],
        "MU": [-2e-3, 0.0],
        "U0": [-1.0, -3.0],
        "Cv": [6.0, 7.0],
    }
    assert data.molecules.units == {"gap": "eV", "MU": "D", "Cv": "cal/(mol K)"}
    assert read(tmp_path / "mols.csv").molecules.targets == {}


def test_table_rows_that_are_wrong_are_reported_by_line(tmp_path: Path) -> None:
    text = (
        '\ufeffsmiles,gap,name\r\nC,1,"methane, pure"\r\n\r\nCC,2\r\nC1CC,3,\r\n,4,none\r\n'
        'CO,5,"two\r\nlines"\r\n,,\r\nO,6,\r\nC C,7,x\r\n'
    )
    path = write(tmp_path, "mols.csv", text)
    data = read(path, targets=["gap"])
    assert names(data) == ["methane, pure", "two lines", "mols-10"]
    assert data.rows.tolist() == [2, 7, 10]
    assert data.molecules.targets["gap"].tolist() == [1, 5, 6]
    assert data.problems == [
        f"{path}:4: expected 3 fields, got 2",
        f"{path}:5: cannot parse SMILES 'C1CC'",
        f"{path}:6: has no SMILES",
        f"{path}:11: cannot parse SMILES 'C C': white space after 'C'",
    ]


def test_a_quote_that_is_not_closed_hides_no_rows(tmp_path: Path) -> None:
    path = write(tmp_path, "mols.csv", 'smiles,name\nC,a\nC,"open\nC,"b\nCO,c\nCC,"end\nC,d\n')
    data = read(path)
    assert names(data) == ["a", "c"]
    assert [problem.split(":")[:2] for problem in data.problems] == [
        [f"{path}", "3"],
        [f"{path}", "6"],
    ]
    assert "cannot parse lines 3 to 4" in data.problems[0]
    assert all("is a quote not closed?" in problem for problem in data.problems)


def test_what_is_no_number_is_unknown_and_text_is_reported_once(tmp_path: Path) -> None:
    values = ["", " nan ", "NA", "n/a", "None", "null", "1.5", "inf", "1_0", "high", '"1,5"']
    path = write(tmp_path, "mols.csv", "smiles,gap\n" + "".join(f"C,{v}\n" for v in values))
    data = read(path, targets=["gap"])
    expected = [np.nan] * 6 + [1.5] + [np.nan] * 4
    np.testing.assert_array_equal(data.molecules.targets["gap"], expected)
    assert data.problems == [
        f"{path}:9: gap: expected a number, got 'inf' (4 such values are left unknown)"
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mols.csv", "smiles;name;gap\nC;a,b;1\nCO;c;2\n"),
        ("mols.csv", "smiles\tname\tgap\nC\ta,b\t1\nCO\tc\t2\n"),
        ("mols.tsv", "smiles\tname\tgap\nC\ta,b\t1\nCO\tc\t2\n"),
        ("MOLS.CSV", 'smiles,name,gap\nC,"a,b",1\nCO,c,2\n'),
    ],
)
def test_columns_may_be_separated_otherwise(tmp_path: Path, name: str, text: str) -> None:
    data = read(write(tmp_path, name, text), targets=["gap"])
    assert names(data) == ["a,b", "c"]
    assert data.molecules.targets["gap"].tolist() == [1, 2]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1"])
def test_text_of_windows_programs_is_understood(tmp_path: Path, encoding: str) -> None:
    content = "smiles,name,r2 [Å^2]\nC,méthane,3\n".encode(encoding)
    data = read(write(tmp_path, "mols.csv", content), targets=["r2"])
    assert names(data) == ["méthane"] and data.molecules.units == {"r2": "Å^2"}


def test_columns_of_smiles_and_names_may_be_given(tmp_path: Path) -> None:
    path = write(tmp_path, "mols.csv", "id,smiles,Canonical,name\n7,O,C,x\n,O,CO,y\n")
    data = read(path, smiles="canonical", name="ID")
    assert smiles(data) == ["C", "CO"]
    assert names(data) == ["7", "y"]


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("", {}, "expected a header and a column of SMILES, got no table"),
        ("a,b\nC,1\n", {}, "column of SMILES 'smiles' is not there; there are 'a', 'b'"),
        ("a,smiles\n1,C\n", {"smiles": "b"}, "column of SMILES 'b' is not there"),
        ("a,smiles\n1,C\n", {"name": "b"}, "name 'b' is not there"),
        ("a,smiles\n1,C\n", {"targets": ["gap"]}, "target 'gap' is not there; there are 'a', 'sm"),
        ("a,a,smiles\n1,1,C\n", {}, "two columns are called 'a'"),
        (
            "gap [eV],gap (kJ),smiles\n1,1,C\n",
            {"targets": ["gap"]},
            r"target 'gap' may be any of 'gap \[eV\]', 'gap \(kJ\)'",
        ),
        ("h,H,smiles\n1,1,C\n", {"targets": ["h [eV]"]}, r"'h \[eV\]' is not there"),
        ("smiles\n\0\n", {}, "expected text, got a binary file"),
    ],
)
def test_a_table_without_what_is_asked_for_is_refused(
    tmp_path: Path, text: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=r"mols.csv: .*" + reason):
        read(write(tmp_path, "mols.csv", text), **options)


def test_columns_are_found_as_they_are_written_before_any_case(tmp_path: Path) -> None:
    path = write(tmp_path, "mols.csv", "smiles,H,h,H [eV],U (eV),G [x],g [y]\nC,1,2,3,4,5,6\n")
    data = read(path, targets=["H", "h", "H [eV]", "u", "g"])
    assert [values.item() for values in data.molecules.targets.values()] == [1, 2, 3, 4, 6]
    assert data.molecules.units == {"u": "eV", "g": "y"}


# SDF


def sdf_record(
    smiles: str,
    name: str,
    *,
    three_d: bool = True,
    hydrogens: bool = True,
    properties: str = "",
) -> str:
    """One record of an SDF."""
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    if three_d:
        rdDistGeom.EmbedMolecule(mol, randomSeed=7)
    else:
        rdDepictor.Compute2DCoords(mol)
    mol.SetProp("_Name", name)
    block = Chem.MolToMolBlock(mol if hydrogens else Chem.RemoveHs(mol))
    return f"{block}{properties}$$$$\n"


def test_sdf_records_are_read_and_bad_ones_reported_by_number(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = sdf_record("CCO", "ethanol") + "no record\n$$$$\n" + sdf_record("O", "")
    path = write(tmp_path, "mols.sdf", text)
    data = read(path)
    assert (names(data), smiles(data), sizes(data)) == (
        ["ethanol", "mols-3"],
        ["CCO", "O"],
        [9, 3],
    )
    assert data.rows.tolist() == [1, 3]
    assert data.problems == [f"{path}: record 2: cannot parse the mol block"]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("hydrogens", [True, False])
def test_sdf_record_of_a_drawing_gets_the_structure_of_its_smiles(
    tmp_path: Path, hydrogens: bool
) -> None:
    alanine = "C[C@H](N)C(=O)O"  # L: the drawing says so by a wedge
    flat = sdf_record(alanine, "flat", three_d=False, hydrogens=hydrogens)
    data = read(write(tmp_path, "mols.sdf", flat + sdf_record("O", "water")))
    assert (names(data), smiles(data), data.problems) == (["flat", "water"], [alanine, "O"], [])
    by_smiles = read(write(tmp_path, "mols.smi", alanine)).molecules
    one = data.molecules.molecule(0)
    np.testing.assert_array_equal(one.positions, by_smiles.positions)
    np.testing.assert_array_equal(one.numbers, by_smiles.numbers)


def test_sdf_record_without_hydrogens_gets_them(tmp_path: Path) -> None:
    data = read(write(tmp_path, "mols.sdf", sdf_record("CCO", "ethanol", hydrogens=False)))
    assert data.problems == []
    molecule = data.molecules.molecule(0)
    assert sorted(molecule.numbers.tolist()) == [1] * 6 + [6, 6, 8]
    near = np.linalg.norm(molecule.positions[:, None] - molecule.positions, axis=-1)
    assert near[~np.eye(9, dtype=bool)].min() > 0.8


@pytest.mark.parametrize("packed", [False, True])
def test_sdf_properties_are_targets_and_names(tmp_path: Path, packed: bool) -> None:
    text = (
        sdf_record("C", "a", properties="> <gap [eV]>\n1.5\n\n>  <ID>  (1)\nfirst\nline\n\n")
        + sdf_record("O", "b", properties="> <gap [eV]>\nmuch\n\n").replace("\n", "\r\n")
        + sdf_record("N", "c", properties="> <note>\n> <ID>\nno name\n")
    )
    content = gzip.compress(text.encode()) if packed else text
    path = write(tmp_path, "mols.sdf.gz" if packed else "mols.sdf", content)
    data = read(path, targets=["gap"], name="id")
    assert names(data) == ["first line", "b", "c"]
    np.testing.assert_array_equal(data.molecules.targets["gap"], [1.5, np.nan, np.nan])
    assert data.molecules.units == {"gap": "eV"}
    assert data.problems == [
        f"{path}: record 2: gap: expected a number, got 'much' (1 such value is left unknown)"
    ]
    with pytest.raises(ValueError, match=r"target 'homo' is not there; there are 'gap \[eV\]'"):
        read(path, targets=["homo"])


@pytest.mark.parametrize(
    "content", [b"not packed", gzip.compress(b"x" * 1000, mtime=0)[:-9]], ids=["text", "cut"]
)
def test_a_damaged_packed_file_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"mols\.sdf\.gz: cannot be unpacked"):
        read(write(tmp_path, "mols.sdf.gz", content))


# XYZ


def test_xyz_frames_are_read_with_symbols_numbers_and_extra_columns(tmp_path: Path) -> None:
    second = '2\nenergy=-1.5 gap="2"\nCL 0 0 0 -0.1\n1 1.2*^-6 0 1.28 0.1\n'
    data = read(
        write(tmp_path, "mols.xyz", f"3\nwater\n{WATER}\n{second}"), targets=["energy", "gap"]
    )
    assert data.problems == []
    water, chloride = data.molecules.molecule(0), data.molecules.molecule(1)
    assert water.name == "water" and water.numbers.tolist() == [8, 1, 1]
    assert water.smiles is None
    assert chloride.name == "mols-2" and chloride.numbers.tolist() == [17, 1]
    np.testing.assert_allclose(chloride.positions[1], [1.2e-6, 0, 1.28], rtol=1e-6)
    np.testing.assert_array_equal(data.molecules.targets["energy"], [np.nan, -1.5])
    np.testing.assert_array_equal(data.molecules.targets["gap"], [np.nan, 2])


@pytest.mark.parametrize(
    ("bad", "line", "reason"),
    [
        ("2\nx\nC 0 0 0\nXx 0 0 1\n", 9, "expected 'element x y z', got 'Xx 0 0 1'"),
        ("2\nx\nC 0 0\nO 0 0 1\n", 8, "expected 'element x y z', got 'C 0 0'"),
        ("2\nx\nC 0 0 0\nO 0 nan 1\n", 9, "expected 'element x y z', got 'O 0 nan 1'"),
        ("3\nx\nC 0 0 0\nO 0 0 1\n", 10, "expected 'element x y z', got '3'"),
        ("0\nnothing\n", 6, "expected the number of atoms, got '0'"),
        ("two\nx\nC 0 0 0\n", 6, "expected the number of atoms, got 'two'"),
        (f"1\n{EXTENDED}\nC 0 0 x\n", 6, "cannot read the frame: could not convert"),
        (f"1\n{EXTENDED}\nQq 0 0 0\n", 6, "cannot read the frame: KeyError 'Qq'"),
        (f"1\n{EXTENDED}\nX 0 0 0\n", 6, "cannot read the frame: has a dummy atom"),
        (f"1\n{EXTENDED}\nC 0 0 inf\n", 6, "cannot read the frame: has coordinates that are not"),
        (
            f'1\n{EXTENDED} Lattice="9 0 0 0 9 0 0 0 9"\nC 0 0 0\n',
            6,
            "cannot read the frame: is periodic, and only molecules can be read",
        ),
    ],
)
def test_bad_xyz_frame_is_reported_with_its_line_and_the_rest_is_read(
    tmp_path: Path, bad: str, line: int, reason: str
) -> None:
    path = write(tmp_path, "mols.xyz", f"3\nfirst\n{WATER}{bad}3\nlast\n{WATER}")
    data = read(path)
    assert names(data) == ["first", "last"]
    (problem,) = data.problems
    assert problem.startswith(f"{path}:{line}: {reason}")


@pytest.mark.parametrize("comment", ["x", EXTENDED])
def test_xyz_file_that_ends_early_is_reported(tmp_path: Path, comment: str) -> None:
    path = write(tmp_path, "mols.xyz", f"4\n{comment}\nC 0 0 0\n")
    data = read(path)
    assert len(data.molecules) == 0
    assert data.problems == [f"{path}:1: expected 4 atoms, the file ends after 1"]


def test_extended_xyz_has_columns_in_any_order_and_targets(tmp_path: Path) -> None:
    text = (
        f'3\n{EXTENDED} energy=-5.5 "gap (eV)"=1.5 name="a b" smiles=O pbc="F F F"\n{WATER}'
        "2\nProperties=forces:R:3:pos:R:3:species:S:1 energy=-3\n9 9 9 0 0 0 H\n9 9 9 0 0 0.7 H\n"
        f"3\nenergy=low\n{WATER}"
    )
    path = write(tmp_path, "mols.extxyz", text)
    data = read(path, targets=["energy", "gap"])
    assert names(data) == ["a b", "mols-2", "mols-3"] and smiles(data) == ["O", None, None]
    assert data.rows.tolist() == [1, 2, 3] and sizes(data) == [3, 2, 3]
    hydrogen = data.molecules.molecule(1)
    np.testing.assert_allclose(hydrogen.positions, [[0, 0, 0], [0, 0, 0.7]], rtol=1e-6)
    np.testing.assert_array_equal(data.molecules.targets["energy"], [-5.5, -3, np.nan])
    np.testing.assert_array_equal(data.molecules.targets["gap"], [1.5, np.nan, np.nan])
    assert data.molecules.units == {"gap": "eV"}
    assert len(data.problems) == 1 and data.problems[0].startswith(f"{path}:10: energy: expected")


# ASE databases


def write_database(path: Path, metadata: dict[str, Any] | None = None) -> Path:
    """Four waters, the third of them periodic."""
    with ase.db.connect(path) as database:
        for i in range(4):
            atoms = ase.Atoms("OH2", [[0, 0, 0], [0, 0, 0.96], [0.93, 0, -0.24]], pbc=i == 2)
            atoms.calc = SinglePointCalculator(atoms, energy=-float(i), dipole=[0, 0, 1])
            known = {"name": f"w{i}", "smiles": "O"} if i else {}
            database.write(
                atoms, **known, gap=i / 2, data={"homo": np.array([i + 0.5]) if i else [0.5]}
            )
        if metadata is not None:
            database.metadata = metadata
    return path


def test_database_has_results_keys_and_data_as_targets(tmp_path: Path) -> None:
    path = write_database(tmp_path / "mols.db")
    data = read(path, targets=["energy", "gap", "homo"])
    assert data.problems == [f"{path}: row 3: is periodic, and only molecules can be read"]
    assert names(data) == ["mols-1", "w1", "w3"] and smiles(data) == [None, "O", "O"]
    assert data.rows.tolist() == [1, 2, 4]
    assert {name: values.tolist() for name, values in data.molecules.targets.items()} == {
        "energy": [0, -1, -3],
        "gap": [0, 0.5, 1.5],
        "homo": [0.5, 1.5, 3.5],
    }
    assert data.molecules.units == {"energy": "eV"}
    assert data.molecules.numbers.tolist() == [8, 1, 1] * 3
    with pytest.raises(ValueError, match=r"target 'mu' is not there; there are .*'dipole'"):
        read(path, targets=["mu"])


def test_database_may_say_its_units(tmp_path: Path) -> None:
    units = {"_property_unit_dict": {"gap": "Ha"}, "_distance_unit": "Ang"}
    path = write_database(tmp_path / "mols.db", units)
    assert read(path, targets=["gap"]).molecules.units == {"gap": "Ha"}
    bohr = write_database(tmp_path / "bohr.db", {"_distance_unit": "Bohr"})
    with pytest.raises(ValueError, match=r"bohr.db: expected positions in Å, got Bohr"):
        read(bohr)


@pytest.mark.parametrize("content", [b"", b"no database at all"])
def test_what_is_no_database_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, "mols.db", content)
    with pytest.raises(ValueError, match=r"mols\.db: expected an ASE database: "):
        read(path)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["mols.db", "mols.extxyz"])
def test_without_ase_the_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named '{name}'", name="ase")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'geot-kernels\[model\]'"):
        read(write(tmp_path, name, f"3\n{EXTENDED}\n{WATER}"))


# Frames in npz


@pytest.mark.parametrize(
    ("z", "positions", "energy"),
    [("z", "R", "E"), ("nuclear_charges", "coords", "energies")],
)
def test_frames_of_md17_share_their_elements(
    tmp_path: Path, z: str, positions: str, energy: str
) -> None:
    xyz = np.random.default_rng(0).normal(size=(5, 3, 3))
    xyz[1, 0, 0] = np.nan
    energies = np.arange(5.0)[:, None] if energy == "E" else np.arange(5.0)
    path = tmp_path / "md.npz"
    arrays = {z: np.array([8, 1, 1], np.uint8), positions: xyz, energy: energies, "F": xyz}
    np.savez(path, **arrays, theory=np.array({"an": "object"}, dtype=object))
    data = read(path, targets=[energy.upper()])
    assert data.problems == [f"{path}: frame 2: has coordinates that are not finite"]
    assert data.rows.tolist() == [1, 3, 4, 5] and names(data)[:2] == ["md-1", "md-3"]
    assert data.molecules.numbers.tolist() == [8, 1, 1] * 4
    expected = xyz[[0, 2, 3, 4]].reshape(-1, 3).astype(np.float32)
    np.testing.assert_array_equal(data.molecules.positions, expected)
    assert data.molecules.targets[energy.upper()].tolist() == [0, 2, 3, 4]
    assert data.molecules.units == {}
    with pytest.raises(ValueError, match=f"target 'F' is not there; there are '{energy}'$"):
        read(path, targets=["F"])


def test_frames_of_several_molecules_are_padded_and_units_given(tmp_path: Path) -> None:
    path = tmp_path / "md.npz"
    z = np.array([[8, 1, 1], [9, 1, 0], [0, 0, 0], [200, 1, 1]])
    np.savez(path, z=z, R=np.ones((4, 3, 3)), E=np.ones(4), e_unit="kcal/mol", r_unit="Ang")
    data = read(path, targets=["E"])
    assert sizes(data) == [3, 2] and data.molecules.numbers.tolist() == [8, 1, 1, 9, 1]
    assert data.molecules.units == {"E": "kcal/mol"}
    assert data.problems == [
        f"{path}: frame {row}: expected atomic numbers from 1 to 118" for row in (3, 4)
    ]


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"R": np.ones((2, 3, 3))}, "expected an array z or nuclear_charges or .*, got R"),
        ({"z": np.ones(3)}, "expected an array R or coords or positions, got z"),
        ({"z": np.ones(4), "R": np.ones((2, 3, 3))}, r"got \[4\] and \[2, 3, 3\]"),
        ({"z": np.ones(3), "R": np.ones((3, 3))}, r"got \[3\] and \[3, 3\]"),
        (
            {"z": np.ones(3), "R": np.ones((2, 3, 3)), "r_unit": np.array("Bohr")},
            "expected positions in Å, got Bohr",
        ),
    ],
)
def test_npz_of_something_else_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], reason: str
) -> None:
    np.savez(tmp_path / "md.npz", **arrays)
    with pytest.raises(ValueError, match=r"md\.npz: .*" + reason):
        read(tmp_path / "md.npz")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut"])
def test_a_damaged_npz_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"md\.npz: expected an npz"):
        read(write(tmp_path, "md.npz", content))


# QM9, and what holds of all


def test_qm9_is_known_by_name() -> None:
    sample = load_qm9()
    data = read("qm9-sample", targets=["gap", "u0"])
    np.testing.assert_array_equal(data.molecules.targets["gap"], sample.targets["gap"])
    np.testing.assert_array_equal(data.molecules.targets["u0"], sample.targets["U0"])
    assert list(data.molecules.targets) == ["gap", "u0"]
    assert data.molecules.units == {"gap": "eV", "u0": "eV"}
    assert data.rows.tolist() == list(range(1, 3001)) and data.problems == []
    assert list(read("qm9-sample").molecules.targets) == list(TARGETS)
    with pytest.raises(ValueError, match="QM9: target 'band' is not there; there are 'mu'"):
        read("qm9-sample", targets=["band"])


def test_all_of_qm9_is_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = load_qm9()
    monkeypatch.setattr(readers, "load_qm9", lambda full: sample[:7] if full else sample)
    assert len(read("qm9").molecules) == 7


@pytest.mark.parametrize("name", ["empty.smi", "empty.sdf", "empty.xyz", "empty.extxyz"])
def test_empty_file_has_no_molecules_and_no_problems(tmp_path: Path, name: str) -> None:
    data = read(write(tmp_path, name, "\n\n"))
    assert (len(data.molecules), data.problems, data.rows.tolist()) == (0, [], [])


@pytest.mark.parametrize("option", ["targets", "name", "smiles"])
def test_columns_of_a_file_without_columns_are_refused(tmp_path: Path, option: str) -> None:
    wanted = {option: ["gap"] if option == "targets" else "gap"}
    with pytest.raises(ValueError, match=f"mols.smi: {option.removesuffix('s')}"):
        read(write(tmp_path, "mols.smi", "C methane\n"), **wanted)


def test_wrong_suffix_folder_and_missing_file_say_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected SMILES .*\.sdf.*\.xyz.*'\.pdb'"):
        read(tmp_path / "mols.pdb")
    with pytest.raises(FileNotFoundError, match=r"no such file; expected SMILES"):
        read(tmp_path / "mols.smi")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(IsADirectoryError, match=r"is a folder; expected SMILES"):
        read(tmp_path / "folder.csv")


def test_molecule_refuses_shapes_and_dtypes_that_do_not_fit() -> None:
    numbers = np.array([6, 8])
    with pytest.raises(ValueError, match=r"positions: expected float32 \[n=2, 3\], got float32"):
        Molecule(numbers, np.zeros((3, 3), np.float32), "CO")
    with pytest.raises(ValueError, match=r"positions: .*, got float64 \[2, 3\]"):
        Molecule(numbers, np.zeros((2, 3)), "CO")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"numbers: expected int64 \[n\], got uint8"):
        Molecule(numbers.astype(np.uint8), np.zeros((2, 3), np.float32), "")
