"""Molecules and their properties from files.

A molecule that cannot be read is reported with its place in the file and the others are still
read. RDKit's own messages on stderr are silenced: their content is in the reports.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rdkit import rdBase

from .conformers import default_cache, make_conformers
from .frames import read_database, read_frames, read_sdf, read_xyz
from .molecules import Molecule, Molecules
from .qm9 import TARGETS, load_qm9
from .records import Contents, Record, clean_name, find_column, read_text, target_values

QM9 = ("qm9", "qm9-sample")
"""Names that `read` takes for QM9, whole and the sample, and not for files."""

_ACCEPTED = (
    "SMILES (.smi, .txt, .csv, .tsv), SDF (.sdf, .sdf.gz), XYZ (.xyz, .extxyz), "
    "an ASE database (.db) or frames of one molecule (.npz)"
)
_TABLES = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True, eq=False)
class Data:
    """What a file has.

    Attributes:
        molecules: M molecules in the order of the file, with the targets asked for.
        problems: What could not be read, such as "mols.csv:3: cannot parse SMILES 'C1CC'".
        rows: Line, record or frame of each molecule, from 1, int64 [M].
    """

    molecules: Molecules
    problems: list[str]
    rows: NDArray[np.int64]


def read(
    path: str | Path,
    *,
    targets: Sequence[str] = (),
    smiles: str | None = None,
    name: str | None = None,
    jobs: int | None = None,
    cache: str | Path | Literal["default"] | None = "default",
) -> Data:
    """Read molecules and their properties.

    * `.csv`, `.tsv`: a table with a header and a column of SMILES. Blank lines are skipped. A
      `.csv` may be separated by semicolons. 3-D structures are made as `make_conformers` says.
    * `.smi`, `.txt`: one SMILES a line, then, after whitespace, a name if there is one. Blank
      lines and lines that begin with `#` are skipped.
    * `.sdf`, `.sdf.gz`: records and their properties. Hydrogens left out are added. Where all z
      are 0 and the header does not say 3D, a 3-D structure is made as of a SMILES.
    * `.xyz`, `.extxyz`: one frame or several; columns after the coordinates are ignored. A frame
      whose comment has `Properties=` or `Lattice=` is extended XYZ: its targets are `key=value`
      pairs of the comment.
    * `.db`: an ASE database; targets are results such as `energy` (eV), keys and data.
    * `.npz`: frames of one molecule as in MD17 (z, R, E) and rMD17 (nuclear_charges, coords,
      energies): positions in Å; energies in their unit, which in both is kcal/mol.
    * "qm9", "qm9-sample": QM9, whole (needs qm9pack) or the sample that ships with the package;
      without `targets`, with all twelve.

    Args:
        path: The file; its suffix says what it is.
        targets: Properties, by the name of their column, SDF property, key or array. A column
            "gap [eV]" or "gap (eV)" is found by "gap" and gives the unit. Names are compared
            exactly first, then in any case. What is missing or no number is NaN.
        smiles: Column of the SMILES in a table; None: "smiles", in any case.
        name: Column, SDF property or key of the names; None: "name" in a table or a database, a
            record's title in an SDF, the comment in XYZ. A molecule without gets the file's name
            and its row.
        jobs: Processes that make 3-D structures; None: as many as there are processors.
        cache: Folder in which 3-D structures are kept; None: they are not. By default
            `$XDG_CACHE_HOME/geot-kernels/conformers`.

    Raises:
        ValueError: It is no file of these, lacks a column asked for, or no record has a target.
        OSError: There is no such file, or it cannot be read.
        ModuleNotFoundError: A library that the file needs is not installed.
    """
    if path in QM9:
        return _qm9(path == "qm9", targets)
    path = Path(path)
    kind = ".sdf" if path.name.lower().endswith(".sdf.gz") else path.suffix.lower()
    if kind not in (*_READERS, *_TABLES):
        raise ValueError(f"{path}: expected {_ACCEPTED}, got suffix '{path.suffix}'")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; expected {_ACCEPTED}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {_ACCEPTED}")
    if smiles is not None and kind not in _TABLES:
        raise ValueError(f"{path}: smiles: only .csv and .tsv have columns of SMILES")
    with rdBase.BlockLogs():
        contents = _table(path, smiles) if kind in _TABLES else _READERS[kind](path)
    if cache == "default":
        cache = default_cache()
    return _collected(path, _renamed(path, contents, name), targets, jobs, cache)


def _qm9(full: bool, targets: Sequence[str]) -> Data:
    molecules = load_qm9(full)
    columns = {target: find_column(target, TARGETS, "QM9: target")[0] for target in targets}
    if targets:
        molecules = replace(
            molecules,
            targets={target: molecules.targets[column] for target, column in columns.items()},
            units={target: TARGETS[column] for target, column in columns.items()},
        )
    return Data(molecules, [], np.arange(1, len(molecules) + 1))


def _renamed(path: Path, contents: Contents, name: str | None) -> Contents:
    """The same with the names that a column has."""
    if name is None:
        return contents
    column, _ = find_column(name, contents.columns, f"{path}: name")
    entries: list[Record | str] = []
    for entry in contents.entries:
        if isinstance(entry, Record):
            entry = replace(entry, name=clean_name(entry.values.get(column)) or entry.name)
        entries.append(entry)
    return replace(contents, entries=entries)


def _collected(
    path: Path,
    contents: Contents,
    targets: Sequence[str],
    jobs: int | None,
    cache: str | Path | None,
) -> Data:
    """Lay out the molecules, with 3-D structures made for those without."""
    values, units, strange = target_values(path, contents, targets)
    records = [entry for entry in contents.entries if isinstance(entry, Record)]
    wanted = [one.smiles for one in records if one.structure is None and one.smiles is not None]
    made, cache_problems = make_conformers(wanted, jobs=jobs, cache=cache)
    structures = dict(zip(wanted, made, strict=True))
    molecules: list[Molecule] = []
    problems: list[str] = []
    kept: list[int] = []
    number = -1
    for entry in contents.entries:
        if isinstance(entry, str):
            problems.append(entry)
            continue
        number += 1
        structure = entry.structure or structures[entry.smiles or ""]
        if isinstance(structure, str):
            problems.append(f"{entry.place}: {structure}")
            continue
        kept.append(number)
        molecules.append(
            Molecule(structure.numbers, structure.positions, entry.name, entry.smiles)
        )
    joined = Molecules.join(
        molecules, {target: column[kept] for target, column in values.items()}, units
    )
    rows = np.array([records[i].row for i in kept], np.int64)
    return Data(joined, [*problems, *strange, *cache_problems], rows)


def _smiles_lines(path: Path) -> Contents:
    """One SMILES a line."""
    entries: list[Record | str] = []
    for row, line in enumerate(read_text(path).split("\n"), start=1):
        smiles, *name = line.split(maxsplit=1) or [""]
        if smiles and not smiles.startswith("#"):
            title = clean_name(*name) or f"{path.stem}-{row}"
            entries.append(Record(row, f"{path}:{row}", title, smiles=smiles))
    return Contents(entries, [])


def _table(path: Path, smiles: str | None) -> Contents:
    """A table with a column of SMILES."""
    text = read_text(path)
    rows = _csv_rows(text, _separator(path, text))
    _, header = next(rows, (0, []))
    if isinstance(header, str) or not header:
        raise ValueError(f"{path}: expected a header and a column of SMILES, got no table")
    columns = [column.strip() for column in header]
    twice = [column for column in columns if column and columns.count(column) > 1]
    if twice:
        raise ValueError(f"{path}: two columns are called '{twice[0]}'")
    smiles_column, _ = find_column(smiles or "smiles", columns, f"{path}: column of SMILES")
    name_column = next((column for column in columns if column.lower() == "name"), None)
    entries: list[Record | str] = []
    for row, fields in rows:
        place = f"{path}:{row}"
        if isinstance(fields, str):
            entries.append(f"{place}: {fields}")
        elif len(fields) != len(columns):
            entries.append(f"{place}: expected {len(columns)} fields, got {len(fields)}")
        else:
            values = dict(zip(columns, fields, strict=True))
            text = values[smiles_column].strip()
            title = clean_name(values.get(name_column or "")) or f"{path.stem}-{row}"
            entries.append(
                Record(row, place, title, smiles=text, values=values)
                if text
                else f"{place}: has no SMILES"
            )
    return Contents(entries, columns)


def _separator(path: Path, text: str) -> str:
    """What separates columns: by the suffix, but some programs write semicolons into CSV."""
    usual = _TABLES[path.suffix.lower()]
    header = text.lstrip().split("\n", 1)[0]
    others = [other for other in (";", "\t") if other in header]
    return usual if usual in header or not others else others[0]


def _csv_rows(text: str, separator: str) -> Iterator[tuple[int, list[str] | str]]:
    """First line and fields of each row that is not blank; a text where it cannot be parsed."""
    # Strictly, as a quote that is not closed would make one field of the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    while True:
        row = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines = f"lines {row} to {reader.line_num}" if reader.line_num > row else "the row"
            yield row, f"cannot parse {lines}: {error} (is a quote not closed?)"
            continue
        if any(text.strip() for text in fields):
            yield row, fields


_READERS: dict[str, Callable[[Path], Contents]] = {
    ".smi": _smiles_lines,
    ".txt": _smiles_lines,
    ".sdf": read_sdf,
    ".xyz": read_xyz,
    ".extxyz": read_xyz,
    ".db": read_database,
    ".npz": read_frames,
}
