"""Splits: random, by scaffold, from a file, and the published one of QM9."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from geot_model.molecules import Molecule, Molecules
from geot_model.qm9 import load_qm9
from geot_model.splits import Split, random_split, scaffold, split

BENZENES = ["Cc1ccccc1", "Clc1ccccc1", "Oc1ccccc1C", "CCc1ccccc1", "c1ccccc1", "Nc1ccccc1"]
CHAINS = ["C", "CCO", "CC(C)=O", "[Na+].[Cl-]"]
PYRIDINES = ["c1ccncc1", "Cc1ccncc1", "CCc1ccncc1"]
SINGLES = ["C1CC1", "C1CCC1", "c1ccc2ccccc2c1", "C1CCNCC1C", "O=C1CCCN1", "C1CCOC1", "c1cc[nH]c1"]
SMILES = [*BENZENES, *CHAINS, *PYRIDINES, *SINGLES]  # 20


def of_smiles(smiles: list[str]) -> Molecules:
    """Molecules of one atom each whose SMILES alone matter, named m0, m1, ..."""
    numbers, positions = np.array([6]), np.zeros((1, 3), np.float32)
    return Molecules.join(
        [Molecule(numbers, positions, f"m{i}", text) for i, text in enumerate(smiles)]
    )


def names(parts: Split) -> list[list[str]]:
    """Names of the molecules of each part."""
    return [part.names.tolist() for part in (parts.train, parts.validation, parts.test)]


@pytest.mark.parametrize("n", [0, 1, 2, 17, 130831])
@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.1), (0.0, 0.5, 0.5), (1.0, 0.0, 0.0)])
def test_split_is_disjoint_and_complete(n, fractions):
    parts = random_split(n, fractions, seed=3)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(n))
    for part, fraction in zip(parts, fractions, strict=True):
        assert abs(len(part) - n * fraction) <= 1


def test_split_has_the_published_sizes_when_asked():
    train, validation, test = random_split(
        130831, (110000 / 130831, 10000 / 130831, 10831 / 130831)
    )
    assert (len(train), len(validation), len(test)) == (110000, 10000, 10831)


def test_split_depends_on_nothing_but_the_seed():
    first, again, other = (random_split(10, seed=seed)[0].tolist() for seed in (1, 1, 2))
    assert first == again != other
    # Written down once: a split that changes with the release of numpy spoils every comparison.
    assert first == [2, 9, 6, 4, 0, 3, 1, 7]


@pytest.mark.parametrize("kind", ["random", "scaffold"])
@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.2), (1.2, -0.1, -0.1)])
def test_split_refuses_fractions_that_are_no_partition(kind, fractions):
    message = "fractions: expected three from 0 to 1 with sum 1"
    with pytest.raises(ValueError, match=message):
        random_split(10, fractions)
    with pytest.raises(ValueError, match=message):
        split(of_smiles(SMILES), kind=kind, fractions=fractions)


def test_random_split_of_molecules_is_that_of_their_rows():
    molecules = load_qm9()[:40]
    parts = split(molecules, fractions=(0.5, 0.25, 0.25), seed=5)
    for part, rows in zip(names(parts), random_split(40, (0.5, 0.25, 0.25), 5), strict=True):
        assert part == molecules.names[rows].tolist()


@pytest.mark.parametrize(
    ("smiles", "expected"),
    [
        ("CC(C)O", ""),
        ("[Na+].[Cl-]", ""),
        ("Cc1ccc(Cl)cc1", "c1ccccc1"),
        ("C[C@H](F)[C@@H]1CCNC1", "C1CCNC1"),
        ("O=C(Nc1ccccc1)C1CC1CCO", "O=C(Nc1ccccc1)C1CC1"),
        ("C1CC1/C=C/C1CC1", "C(=CC1CC1)C1CC1"),
    ],
)
def test_scaffold_is_rings_and_what_links_them(smiles, expected):
    assert scaffold(of_smiles([smiles]).molecule(0)) == expected


def test_scaffold_without_a_valid_smiles_is_that_of_the_bonds_in_the_coordinates():
    angles = np.arange(6) * np.pi / 3
    ring = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    positions = np.concatenate([1.39 * ring, 2.48 * ring]).astype(np.float32)
    for smiles in (None, "c1cc"):
        benzene = Molecule(np.repeat([6, 1], 6), positions, "benzene", smiles)
        assert scaffold(benzene) == "c1ccccc1"


def test_scaffold_of_atoms_that_are_no_molecule_is_an_answer():
    rng = np.random.default_rng(0)
    for spread in (0.0, 0.5, 2.0):
        numbers = rng.choice([1, 6, 7, 8, 17, 26], 20)
        positions = (spread * rng.normal(size=(20, 3))).astype(np.float32)
        assert isinstance(scaffold(Molecule(numbers, positions, "cloud")), str)
    assert scaffold(Molecule(np.array([6]), np.full((1, 3), np.nan, np.float32), "nan")) == ""


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_no_scaffold_is_in_two_parts_and_the_largest_train(seed):
    molecules = of_smiles(SMILES)
    parts = split(molecules, kind="scaffold", fractions=(0.6, 0.2, 0.2), seed=seed)
    assert sorted(name for part in names(parts) for name in part) == sorted(
        molecules.names.tolist()
    )
    groups = [
        {scaffold(part.molecule(i)) for i in range(len(part))}
        for part in (parts.train, parts.validation, parts.test)
    ]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert {"c1ccccc1", ""} <= groups[0]
    assert [len(part) for part in names(parts)] == [12, 4, 4]


def test_scaffold_split_is_the_same_for_a_seed_and_another_for_another():
    molecules = of_smiles(SMILES)
    first, again, other = (names(split(molecules, kind="scaffold", seed=s)) for s in (1, 1, 2))
    assert first == again != other


def test_a_scaffold_larger_than_its_share_still_trains():
    smiles = ["C"] * 9 + ["C1CC1", "C1CCC1"]
    parts = split(of_smiles(smiles), kind="scaffold", fractions=(0.6, 0.2, 0.2))
    assert [len(part) for part in names(parts)] == [9, 1, 1]
    with pytest.raises(ValueError, match=r"for test: the 10 .* 2 scaffolds, and one of them 9 of"):
        split(of_smiles(smiles[:10]), kind="scaffold", fractions=(0.6, 0.2, 0.2))


def write(folder: Path, text: str) -> Path:
    """A CSV with this text."""
    path = folder / "split.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_split_from_a_csv_takes_names_in_any_order_and_spelling(tmp_path: Path):
    path = write(
        tmp_path,
        "\ufeffSplit,x,Name\nval,1,m3\ntrain,2,m0\nTRAIN ,3, m2\n,4,m4\ntest,5,m1\ntest,6,other\n",
    )
    parts = split(of_smiles(SMILES[:5]), kind="file", file=path)
    assert names(parts) == [["m0", "m2"], ["m3"], ["m1"]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected the columns name and split, got none"),
        ("name,part\nm0,train\n", "expected the columns name and split, got name, part"),
        ("name,split\nm0,train\nm1,tset\n", ":3: expected train, validation or test, got 'tset'"),
        ("name,split\nm0,train\nm0,test\n", ":3: 'm0' is in two parts"),
        ("name,split\nm0,train\nm1\n", "1 of 3 molecules are not listed, the first is 'm2'"),
        ("name,split\nm0,train\nm1,val\nm2,\n", "no molecule is for test"),
    ],
)
def test_a_csv_that_is_no_split_is_refused(tmp_path: Path, text: str, reason: str):
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as error:
        split(of_smiles(SMILES[:3]), kind="file", file=path)
    assert str(error.value).startswith(str(path)) and str(error.value).endswith(reason)


@pytest.mark.parametrize("keys", [("train", "val", "test"), ("train_idx", "val_idx", "test_idx")])
def test_split_from_an_npz_takes_rows(tmp_path: Path, keys: tuple[str, ...]):
    path = tmp_path / "split.npz"
    np.savez(path, **dict(zip(keys, ([4, 0], [2], [1]), strict=True)))
    assert names(split(of_smiles(SMILES), kind="file", file=path)) == [
        ["m4", "m0"],
        ["m2"],
        ["m1"],
    ]


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"train": [0], "test": [1]}, "validation is missing"),
        ({"train": [0], "val": [1], "test": [0]}, "molecule 0 is listed twice"),
        (
            {"train": [0], "val": [1], "test": [3]},
            "test: expected numbers from 0 to 2, got 3 to 3",
        ),
        ({"train": [0], "val": [1], "test": [-1]}, "from 0 to 2, got -1 to -1"),
        (
            {"train": [0.0], "val": [1], "test": [2]},
            "train: expected integers [n], got float64 [1]",
        ),
        ({"train": [0], "val": [1], "test": np.zeros(0, int)}, "no molecule is for test"),
    ],
)
def test_an_npz_that_is_no_split_is_refused(tmp_path: Path, arrays: dict, reason: str):
    path = tmp_path / "split.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError) as error:
        split(of_smiles(SMILES[:3]), kind="file", file=path)
    assert str(error.value).startswith(str(path)) and str(error.value).endswith(reason)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no archive", b"text"])
def test_a_damaged_npz_is_refused(tmp_path: Path, damage: bytes):
    path = tmp_path / "split.npz"
    path.write_bytes(damage)
    with pytest.raises(ValueError, match=r"split\.npz: not an npz of arrays"):
        split(of_smiles(SMILES), kind="file", file=path)


def test_a_split_without_its_file_or_of_another_kind_is_refused(tmp_path: Path):
    molecules = of_smiles(SMILES)
    with pytest.raises(ValueError, match="file: expected a CSV or npz"):
        split(molecules, kind="file")
    with pytest.raises(
        ValueError, match=r"expected a split as \.csv or \.npz, got suffix '\.txt'"
    ):
        split(molecules, kind="file", file=tmp_path / "split.txt")
    with pytest.raises(FileNotFoundError):
        split(molecules, kind="file", file=tmp_path / "split.csv")
    with pytest.raises(ValueError, match=r"kind: expected random, scaffold, .*, got 'time'"):
        split(molecules, kind="time")


def test_published_split_is_that_of_qm9_at_seed_42():
    count = 130831
    atoms = Molecules(
        numbers=np.full(count, 6, np.uint8),
        positions=np.zeros((count, 3), np.float32),
        ptr=np.arange(count + 1),
        targets={"row": np.arange(float(count))},
        names=np.full(count, ""),
    )
    parts = split(atoms, kind="published", seed=7)
    rows = [
        part.targets["row"].astype(int) for part in (parts.train, parts.validation, parts.test)
    ]
    assert [len(part) for part in rows] == [110_000, 10_000, 10_831]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(count))
    assert rows[0][:3].tolist() == [112526, 100113, 55940]
    assert split(atoms[:120_001], kind="published").test.names.tolist() == [""]
    with pytest.raises(ValueError, match=r"at least 120,001 molecules, got 120,000"):
        split(atoms[:120_000], kind="published")
