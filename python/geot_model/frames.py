"""Molecules with coordinates from SDF, XYZ, extended XYZ, ASE databases and npz."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import re
import sqlite3
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem

from .conformers import Structure, chemistry_problem, refuse_dummies, structure_of
from .records import (
    Contents,
    Record,
    ase_module,
    clean_name,
    decoded,
    read_text,
    structure_of_atoms,
)

_NUM_ELEMENTS = 118
_EXTENDED = re.compile(r"(^|\s)(Properties|Lattice|pbc)\s*=", re.IGNORECASE)
_PAIR = re.compile(r'([\w.-]+)="?([^\s"]+)')
_ANGSTROM = {"", "ang", "angstrom", "å", "a"}
# Arrays of MD17, of rMD17, and what others call the same.
_NUMBERS = ("z", "nuclear_charges", "numbers", "atomic_numbers")
_POSITIONS = ("R", "coords", "positions")


def read_sdf(path: Path) -> Contents:
    """Records of an SDF."""
    records: list[list[str]] = [[]]
    for line in _sdf_text(path).split("\n"):
        if line.startswith("$$$$"):
            records.append([])
        else:
            records[-1].append(line)
    if not "".join(records[-1]).strip():
        records.pop()
    return Contents.of(_sdf_record(path, row, lines) for row, lines in enumerate(records, start=1))


def _sdf_text(path: Path) -> str:
    if path.suffix.lower() != ".gz":
        return read_text(path)
    try:
        with gzip.open(path) as file:
            return decoded(file.read(), path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: cannot be unpacked: {error}") from None


def _sdf_record(path: Path, row: int, lines: list[str]) -> Record | str:
    place = f"{path}: record {row}"
    stem = path.name.split(".sdf")[0]
    try:
        mol = _parsed_mol_block("\n".join(lines))
        flat = mol.GetNumAtoms() > 1 and not mol.GetConformer().Is3D()
        return Record(
            row,
            place,
            clean_name(lines[0]) or f"{stem}-{row}",
            None if flat else structure_of(Chem.AddHs(mol, addCoords=True)),
            str(Chem.MolToSmiles(Chem.RemoveHs(mol))),
            _sdf_properties(lines),
        )
    except (ValueError, RuntimeError) as problem:
        return f"{place}: {str(problem).strip()}"


def _sdf_properties(lines: list[str]) -> dict[str, str]:
    """`> <name>`, lines of the value, a blank line."""
    properties: dict[str, str] = {}
    values: list[str] | None = None
    name = ""
    for line in lines:
        match = re.match(r">.*?<(.+)>", line) if values is None else None
        if match is not None:
            name, values = match[1].strip(), []
        elif values is not None and line.strip():
            values.append(line)
        elif values is not None:
            properties[name], values = "\n".join(values), None
    if values is not None:
        properties[name] = "\n".join(values)
    return properties


def _parsed_mol_block(block: str) -> Chem.Mol:
    """One record of an SDF."""
    mol = Chem.MolFromMolBlock(block, removeHs=False)
    if mol is None:
        why = chemistry_problem(Chem.MolFromMolBlock(block, sanitize=False, removeHs=False))
        raise ValueError(f"cannot parse the mol block{why}")
    if mol.GetNumAtoms() == 0:
        raise ValueError("has no atoms")
    refuse_dummies(mol)
    return mol


class _BadLine(ValueError):
    """A line of an XYZ file that is not what it should be."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def read_xyz(path: Path) -> Contents:
    """Frames of an XYZ file, extended or not."""
    return Contents.of(_xyz_entries(path, read_text(path).rstrip().split("\n")))


def _xyz_entries(path: Path, lines: list[str]) -> Iterator[Record | str]:
    """Frames and problems, in order; after a problem, on to the next count."""
    start, row = 0, 0
    while start < len(lines):
        if not lines[start].strip():
            start += 1
            continue
        row += 1
        try:
            count = _xyz_count(lines, start)
            yield _xyz_record(path, row, lines, start, count)
            start += count + 2
        except _BadLine as problem:
            yield f"{path}:{problem.line + 1}: {problem}"
            start = max(problem.line, start + 1)
            while start < len(lines) and not lines[start].strip().isdecimal():
                start += 1


def _xyz_record(path: Path, row: int, lines: list[str], start: int, count: int) -> Record:
    place = f"{path}:{start + 1}"
    comment = lines[start + 1] if start + 1 < len(lines) else ""
    if path.suffix.lower() == ".extxyz" or _EXTENDED.search(comment):
        structure, values = _extended_frame(lines, start, count)
        title, smiles = clean_name(values.get("name")), clean_name(values.get("smiles")) or None
        return Record(row, place, title or f"{path.stem}-{row}", structure, smiles, values)
    structure = _xyz_frame(lines, start, count)
    title = comment.split("\t")[0].strip()
    name = title if title and "=" not in title else f"{path.stem}-{row}"
    return Record(row, place, name, structure, values=dict(_PAIR.findall(comment)))


def _xyz_count(lines: list[str], start: int) -> int:
    """Number of atoms of the frame that begins at `start`."""
    count = lines[start].strip()
    if not count.isdecimal() or int(count) == 0:
        raise _BadLine(start, f"expected the number of atoms, got '{count}'")
    return int(count)


def _xyz_frame(lines: list[str], start: int, count: int) -> Structure:
    """Elements and positions (Å) of a frame."""
    numbers: list[int] = []
    positions: list[list[float]] = []
    for here in range(start + 2, start + 2 + count):
        if here >= len(lines):
            raise _BadLine(start, f"expected {count} atoms, the file ends after {len(numbers)}")
        number, position = _xyz_atom(lines, here)
        numbers.append(number)
        positions.append(position)
    return Structure(np.array(numbers, np.int64), np.array(positions, np.float32))


def _xyz_atom(lines: list[str], here: int) -> tuple[int, list[float]]:
    """Atomic number and position (Å) on one line of a frame."""
    symbol, *columns = lines[here].split() or [""]
    number = _atomic_numbers().get(symbol.capitalize())
    try:
        # QM9's own files write exponents as `1.2*^-6`.
        position = [float(column.replace("*^", "e")) for column in columns[:3]]
    except ValueError:
        position = []
    if number is None or len(position) != 3 or not np.isfinite(position).all():
        raise _BadLine(here, f"expected 'element x y z', got '{lines[here].strip()}'")
    return number, position


@functools.cache
def _atomic_numbers() -> dict[str, int]:
    """Atomic number of each element by its symbol, and by itself as XYZ files may write it."""
    table = Chem.GetPeriodicTable()
    elements = range(1, _NUM_ELEMENTS + 1)
    symbols = {table.GetElementSymbol(number): number for number in elements}
    return symbols | {str(number): number for number in elements}


def _extended_frame(lines: list[str], start: int, count: int) -> tuple[Structure, dict[str, Any]]:
    """A frame of extended XYZ and what its comment says: read by itself, so that it fails so."""
    frame = lines[start : start + count + 2]
    if len(frame) < count + 2:
        raise _BadLine(
            start, f"expected {count} atoms, the file ends after {max(len(frame) - 2, 0)}"
        )
    extxyz = ase_module("ase.io.extxyz")
    try:
        (atoms,) = extxyz.read_xyz(io.StringIO("\n".join(frame) + "\n"), index=slice(None))
        structure = structure_of_atoms(atoms)
    # ASE raises whatever the line that is not what it expects happens to cause.
    except Exception as problem:
        reason = str(problem).strip().split("\n")[0]
        if isinstance(problem, KeyError) or not reason:
            reason = f"{type(problem).__name__} {reason}"
        raise _BadLine(start, f"cannot read the frame: {reason}") from None
    return structure, _results(atoms.calc) | dict(atoms.info)


def _results(calculator: Any) -> dict[str, Any]:
    return dict(calculator.results) if calculator is not None else {}


def read_database(path: Path) -> Contents:
    """Rows of an ASE database."""
    connect = ase_module("ase.db").connect
    try:
        _check_database(path)
        with connect(path, type="db", use_lock_file=False) as database:
            metadata = dict(database.metadata)
            length = str(metadata.get("_distance_unit", ""))
            if length.lower() not in _ANGSTROM:
                raise ValueError(f"{path}: expected positions in Å, got {length}")
            entries = [_database_record(path, row) for row in database.select()]
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path}: expected an ASE database: {error}") from None
    # As SchNetPack writes them. An energy of ASE is in eV otherwise.
    units = metadata.get("_property_unit_dict")
    return Contents.of(entries, {"energy": "eV"} | (units if isinstance(units, dict) else {}))


def _check_database(path: Path) -> None:
    """Raise DatabaseError if it is no database of ASE, which would make one of it."""
    address = f"{path.absolute().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(address, uri=True)) as connection:
        connection.execute("select count(*) from systems")


def _database_record(path: Path, row: Any) -> Record | str:
    place = f"{path}: row {row.id}"
    try:
        atoms = row.toatoms()
        structure = structure_of_atoms(atoms)
        values = dict(row.data) | dict(row.key_value_pairs) | _results(atoms.calc)
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        return f"{place}: {problem}"
    text = {key.lower(): str(value) for key, value in row.key_value_pairs.items()}
    name = clean_name(text.get("name")) or f"{path.stem}-{row.id}"
    return Record(row.id, place, name, structure, clean_name(text.get("smiles")) or None, values)


def read_frames(path: Path) -> Contents:
    """Frames of one molecule, from an npz as of MD17."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: _array(file, name) for name in file.files}
    except (zipfile.BadZipFile, EOFError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: expected an npz: {error}") from None
    numbers = _of(arrays, _NUMBERS, path)
    positions = _of(arrays, _POSITIONS, path)
    frames, atoms = positions.shape[:2] if positions.ndim == 3 else (0, 0)
    if positions.shape != (frames, atoms, 3) or numbers.shape not in ((atoms,), (frames, atoms)):
        raise ValueError(
            f"{path}: expected atomic numbers [n] and positions [frames, n, 3], "
            f"got {list(numbers.shape)} and {list(positions.shape)}"
        )
    length = str(arrays.get("r_unit", ""))
    if length.lower() not in _ANGSTROM:
        raise ValueError(f"{path}: expected positions in Å, got {length}")
    energy = str(arrays.get("e_unit", ""))
    units = {"E": energy} if energy else {}
    values = {name: array for name, array in arrays.items() if _is_scalar(array, frames)}
    numbers = np.broadcast_to(numbers, (frames, atoms))
    return Contents(
        [_frame(path, row, numbers, positions, values) for row in range(frames)],
        list(values),
        units,
    )


def _frame(
    path: Path,
    row: int,
    numbers: NDArray[np.generic],
    positions: NDArray[np.generic],
    values: Mapping[str, NDArray[np.generic]],
) -> Record | str:
    """One frame; atoms of number 0 are padding."""
    place = f"{path}: frame {row + 1}"
    real = numbers[row] != 0
    z = numbers[row][real].astype(np.int64)
    structure = Structure(z, positions[row][real].astype(np.float32))
    if not len(z) or z.min() < 1 or z.max() > _NUM_ELEMENTS:
        return f"{place}: expected atomic numbers from 1 to {_NUM_ELEMENTS}"
    if not np.isfinite(structure.positions).all():
        return f"{place}: has coordinates that are not finite"
    here = {name: array[row] for name, array in values.items()}
    return Record(row + 1, place, f"{path.stem}-{row + 1}", structure, values=here)


def _array(file: Any, name: str) -> NDArray[np.generic]:
    """An array, empty where it holds Python objects, which are not unpickled."""
    try:
        array: NDArray[np.generic] = file[name]
    except ValueError:
        return np.zeros(0)
    return array


def _is_scalar(array: NDArray[np.generic], frames: int) -> bool:
    """Whether an array has one number for each frame."""
    return array.shape in ((frames,), (frames, 1)) and array.dtype.kind in "fiu"


def _of(
    arrays: Mapping[str, NDArray[np.generic]], names: tuple[str, ...], path: Path
) -> NDArray[np.generic]:
    for name in names:
        if name in arrays:
            return arrays[name]
    there = ", ".join(arrays) or "none"
    raise ValueError(f"{path}: expected an array {' or '.join(names)}, got {there}")
