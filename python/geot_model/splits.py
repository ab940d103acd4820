"""Which molecules train, which choose the best epoch, and which measure."""

from __future__ import annotations

import contextlib
import csv
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase
from rdkit.Chem.Scaffolds import MurckoScaffold

from .bonds import perceive_bonds
from .molecules import Molecule, Molecules

FRACTIONS = (0.85, 0.05, 0.10)
"""Shares of training, validation and test, unless others are asked for."""

_PUBLISHED = (110_000, 10_000)
_PUBLISHED_SEED = 42
_PARTS = ("train", "validation", "test")
_SPELLINGS = {
    "train": ("train", "train_idx"),
    "validation": ("validation", "valid", "val", "val_idx"),
    "test": ("test", "test_idx"),
}
_PART_OF = {word: part for part, words in _SPELLINGS.items() for word in words}

Rows = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Rows of the molecules for training, validation and test."""


@dataclass(frozen=True, eq=False)
class Split:
    """The molecules of a run.

    Attributes:
        train: For the weights, and all that is fitted or averaged.
        validation: For the choice of the best epoch.
        test: For the table of errors and nothing else.
    """

    train: Molecules
    validation: Molecules
    test: Molecules


def split(
    molecules: Molecules,
    *,
    kind: Literal["random", "scaffold", "file", "published"] = "random",
    fractions: tuple[float, float, float] = FRACTIONS,
    seed: int = 0,
    file: str | Path | None = None,
) -> Split:
    """Split molecules into training, validation and test; the same for the same arguments.

    * "random": by a random permutation.
    * "scaffold": molecules with the same Bemis-Murcko scaffold (Bemis and Murcko, J. Med. Chem.
      39, 2887 (1996), doi:10.1021/jm9602928; rings, what links them, and atoms double bonded to
      either) stay together, all those without rings too. The scaffolds with the most molecules
      train, so that validation and test are of rare ones. Parts may be a little smaller or larger
      than asked for.
    * "file": a CSV with the columns `name` and `split` ("train", "validation", "valid" or "val",
      "test"; empty: in no part), or an npz with arrays `train`, `validation` (`valid`, `val`) and
      `test` of the molecules' numbers, from 0, in the order in which they were read. SchNetPack's
      `train_idx`, `val_idx` and `test_idx` are understood too.
    * "published": that of all of QM9: the first 110,000, the next 10,000 and the rest of
      `numpy.random.RandomState(42).permutation`.

    Args:
        molecules: What to split.
        kind: How, as above.
        fractions: Shares of train, validation and test, which sum to 1; random and scaffold.
        seed: Of the permutation; of the order of scaffolds with as many molecules.
        file: Of the kind "file".

    Raises:
        ValueError: The kind is unknown, fractions are no partition, scaffolds are too few, the
            file contradicts itself or the molecules, or there are too few for the published split.
        OSError: The file cannot be read.
    """
    count = len(molecules)
    if kind == "random":
        parts = random_split(count, fractions, seed)
    elif kind == "scaffold":
        parts = _scaffold_split(molecules, fractions, seed)
    elif kind == "file":
        if file is None:
            raise ValueError(
                "file: expected a CSV or npz for a split of the kind 'file', got none"
            )
        parts = _file_split(molecules, Path(file))
    elif kind == "published":
        parts = _published_split(count)
    else:
        raise ValueError(f"kind: expected random, scaffold, file or published, got '{kind}'")
    return Split(*(molecules[rows] for rows in parts))


def random_split(
    n: int, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1), seed: int = 0
) -> Rows:
    """Split `range(n)` at random into train, validation and test, the same for the same seed.

    Args:
        n: Number of molecules.
        fractions: Shares of train, validation and test; they sum to 1.
        seed: Seed of the permutation.

    Returns:
        Three int64 arrays without a common index, which together hold each of 0..n-1 once.

    Raises:
        ValueError: A negative fraction, or a sum other than 1.
    """
    _check_fractions(fractions)
    # numpy froze the stream of RandomState; that of default_rng may change with a release.
    order = np.random.RandomState(seed).permutation(n).astype(np.int64)
    first, second = round(n * fractions[0]), round(n * (fractions[0] + fractions[1]))
    return order[:first], order[first:second], order[second:]


def _scaffold_split(
    molecules: Molecules, fractions: tuple[float, float, float], seed: int
) -> Rows:
    _check_fractions(fractions)
    count = len(molecules)
    groups: dict[str, list[int]] = {}
    with rdBase.BlockLogs():
        for row in range(count):
            groups.setdefault(scaffold(molecules.molecule(row)), []).append(row)
    names = np.array(list(groups), dtype=object)
    shuffled = names[np.random.RandomState(seed).permutation(len(names))].tolist()
    parts: list[list[int]] = [[], [], []]
    room = [count * fraction for fraction in fractions]
    for name in sorted(shuffled, key=lambda name: -len(groups[name])):
        parts[_part_for(len(groups[name]), [len(part) for part in parts], room)] += groups[name]
    for name, part_rows, fraction in zip(_PARTS, parts, fractions, strict=True):
        if count and fraction > 0 and not part_rows:
            largest = max(map(len, groups.values()))
            raise ValueError(
                f"scaffold split: no scaffold is left for {name}: the {count} molecules have "
                f"{len(groups)} scaffolds, and one of them {largest} of the molecules"
            )
    train, validation, test = (np.sort(np.array(rows, np.int64)) for rows in parts)
    return train, validation, test


def _part_for(size: int, filled: Sequence[int], room: Sequence[float]) -> int:
    """Part for the next scaffold: training, if it fits; else the emptiest where it fits."""
    fitting = [i for i in range(3) if filled[i] + size <= room[i] + 0.5]
    if 0 in fitting:
        return 0
    if fitting:
        return min(fitting, key=lambda i: filled[i] / room[i])
    return max(range(3), key=lambda i: room[i] - filled[i])


def scaffold(molecule: Molecule) -> str:
    """SMILES of a molecule's Bemis-Murcko scaffold, "" if it has no rings.

    It is made of the molecule's SMILES, where that is not known or not valid of the bonds that its
    coordinates imply. A molecule with impossible valences is a scaffold of its own.
    """
    mol = Chem.MolFromSmiles(molecule.smiles) if molecule.smiles else None
    if mol is None:
        mol = perceive_bonds(molecule.numbers, molecule.positions)
    if mol is None:
        return ""
    Chem.FastFindRings(mol)
    with contextlib.suppress(ValueError):  # a valence that RDKit does not know
        mol = MurckoScaffold.GetScaffoldForMol(mol)
    return str(Chem.MolToSmiles(mol, isomericSmiles=False))


def _published_split(count: int) -> Rows:
    train, validation = _PUBLISHED
    if count <= train + validation:
        raise ValueError(
            f"published split: expected all of QM9, at least {train + validation + 1:,} "
            f"molecules, got {count:,}"
        )
    order = np.random.RandomState(_PUBLISHED_SEED).permutation(count).astype(np.int64)
    return order[:train], order[train : train + validation], order[train + validation :]


def _file_split(molecules: Molecules, path: Path) -> Rows:
    if path.suffix.lower() == ".npz":
        parts = _index_arrays(path, len(molecules))
    elif path.suffix.lower() == ".csv":
        part_of = _named_parts(path)
        strange = [name for name in molecules.names.tolist() if name not in part_of]
        if strange:
            raise ValueError(
                f"{path}: {len(strange)} of {len(molecules)} molecules are not listed, "
                f"the first is '{strange[0]}'"
            )
        named = np.array([part_of[name] for name in molecules.names.tolist()], np.str_)
        parts = {part: np.flatnonzero(named == part) for part in _PARTS}
    else:
        raise ValueError(f"{path}: expected a split as .csv or .npz, got suffix '{path.suffix}'")
    for part, rows in parts.items():
        if not len(rows):
            raise ValueError(f"{path}: no molecule is for {part}")
    return parts["train"], parts["validation"], parts["test"]


def _named_parts(path: Path) -> Mapping[str, str]:
    """Part of each name in a CSV, "" for none."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = {(column or "").strip().lower(): column for column in reader.fieldnames or ()}
        if not {"name", "split"} <= set(columns):
            got = ", ".join(reader.fieldnames or ()) or "none"
            raise ValueError(f"{path}: expected the columns name and split, got {got}")
        parts: dict[str, str] = {}
        for row in reader:
            name = (row[columns["name"]] or "").strip()
            word = (row[columns["split"]] or "").strip()
            part = _PART_OF.get(word.lower(), "")
            if word and not part:
                raise ValueError(
                    f"{path}:{reader.line_num}: expected train, validation or test, got '{word}'"
                )
            if parts.setdefault(name, part) != part:
                raise ValueError(f"{path}:{reader.line_num}: '{name}' is in two parts")
    return parts


def _index_arrays(path: Path, count: int) -> dict[str, NDArray[np.int64]]:
    """Arrays of an npz, by part; checked."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {_PART_OF[name]: file[name] for name in file.files if name in _PART_OF}
    except (zipfile.BadZipFile, EOFError, TypeError, ValueError) as error:  # TypeError: an npy
        raise ValueError(f"{path}: not an npz of arrays: {error}") from None
    missing = [part for part in _PARTS if part not in found]
    if missing:
        raise ValueError(f"{path}: expected arrays {', '.join(_PARTS)}; {missing[0]} is missing")
    for part, rows in found.items():
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise ValueError(f"{path}: {part}: expected integers [n], got {_shape(rows)}")
        if len(rows) and not 0 <= rows.min() <= rows.max() < count:
            raise ValueError(
                f"{path}: {part}: expected numbers from 0 to {count - 1}, "
                f"got {rows.min()} to {rows.max()}"
            )
    rows, times = np.unique(np.concatenate(list(found.values())), return_counts=True)
    if (times > 1).any():
        raise ValueError(f"{path}: molecule {rows[times > 1][0]} is listed twice")
    return {part: found[part].astype(np.int64) for part in _PARTS}


def _shape(array: NDArray[np.generic]) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _check_fractions(fractions: tuple[float, ...]) -> None:
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions: expected three from 0 to 1 with sum 1, got {fractions}")
