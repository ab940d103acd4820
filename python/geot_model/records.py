"""What files of molecules have in common: text, records, and targets found by name."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .conformers import Structure

_UNKNOWN = {"", "nan", "na", "n/a", "none", "null"}
_LISTED = 20  # names shown where one is not found


@dataclass(frozen=True, eq=False)
class Record:
    """One molecule of a file.

    Attributes:
        row: Its line, record or frame, from 1.
        place: The same for people, such as "molecules.csv:3".
        name: What it is called there.
        structure: Its atoms, where the file has them.
        smiles: Where known.
        values: What the file says of it, by the file's own names.
    """

    row: int
    place: str
    name: str
    structure: Structure | None = None
    smiles: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Contents:
    """What a file has.

    Attributes:
        entries: Its records, and what is wrong with those that cannot be read, in order.
        columns: Names of what it says of molecules.
        units: Column to unit, where the file gives units otherwise than in a column's name.
    """

    entries: list[Record | str]
    columns: list[str]
    units: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, entries: Iterable[Record | str], units: Mapping[str, str] | None = None
    ) -> Contents:
        """Contents whose columns are all that the records have values of."""
        entries = list(entries)
        values = (entry.values for entry in entries if isinstance(entry, Record))
        columns = dict.fromkeys(column for record in values for column in record)
        return cls(entries, list(columns), units or {})


def read_text(path: Path) -> str:
    """The text of a file, as `decoded` says."""
    return decoded(path.read_bytes(), path)


def decoded(content: bytes, path: Path) -> str:
    """Text in UTF-8, in UTF-16 with a mark, or else in Windows' Latin-1 (cp1252).

    Raises:
        ValueError: It is no text.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = content.decode("utf-16", errors="replace")
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("cp1252", errors="replace")
    if "\0" in text:
        raise ValueError(f"{path}: expected text, got a binary file")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def clean_name(value: Any = None) -> str:
    """A name without white space around it and without line ends; "" for none."""
    return " ".join(str(value).split()) if value is not None else ""


def find_column(wanted: str, columns: Iterable[str], what: str) -> tuple[str, str | None]:
    """The column of a name, and its unit if the column is headed "name [unit]" or "name (unit)".

    Exactly as it is written, with and without unit, and only then in any case.

    Args:
        wanted: The name.
        columns: Names that there are.
        what: What is asked for and where, for messages.

    Raises:
        ValueError: There is none, or more than one.
    """
    columns = list(dict.fromkeys(columns))
    split = {column: _name_and_unit(column) for column in columns}
    low = wanted.strip().lower()
    for fits in (
        [column for column in columns if column == wanted],
        [column for column in columns if split[column][0] == wanted.strip()],
        [
            column
            for column in columns
            if low in (column.strip().lower(), split[column][0].lower())
        ],
    ):
        if len(fits) > 1:
            raise ValueError(f"{what} '{wanted}' may be any of {_listing(fits)}")
        if fits:
            return fits[0], None if fits[0] == wanted else split[fits[0]][1]
    raise ValueError(f"{what} '{wanted}' is not there; there are {_listing(columns)}")


def target_values(
    path: Path, contents: Contents, targets: Sequence[str]
) -> tuple[dict[str, NDArray[np.float64]], dict[str, str], list[str]]:
    """Targets of all records, float64 [M], NaN where unknown; their units; what is no number.

    Raises:
        ValueError: No record has a target.
    """
    records = [entry for entry in contents.entries if isinstance(entry, Record)]
    values: dict[str, NDArray[np.float64]] = {}
    units: dict[str, str] = {}
    problems = []
    for target in targets:
        column, unit = find_column(target, contents.columns, f"{path}: target")
        if unit := contents.units.get(column, unit):
            units[target] = unit
        found = [record.values.get(column) for record in records]
        values[target] = np.array([_number(value) for value in found], np.float64)
        strange = [i for i, value in enumerate(found) if _is_strange(value)]
        if strange:
            shown = str(found[strange[0]]).strip()[:60]
            are = "1 such value is" if len(strange) == 1 else f"{len(strange)} such values are"
            problems.append(
                f"{records[strange[0]].place}: {target}: expected a number, got '{shown}' "
                f"({are} left unknown)"
            )
    return values, units, problems


def _number(value: Any) -> float:
    """The value as a number, NaN if it is none or not finite."""
    if isinstance(value, str):
        value = value.strip().replace("_", " ")  # Python takes 1_000 for a number
    elif value is not None and np.size(value) == 1:
        value = np.asarray(value).reshape(-1)[0]  # 0-d, or [1] as some databases keep it
    try:
        result = float(value)
    except (TypeError, ValueError):
        return float("nan")
    return result if np.isfinite(result) else float("nan")


def _is_strange(value: Any) -> bool:
    """Whether a value is there and says something else than a number or that it is unknown."""
    if value is None or not np.isnan(_number(value)):
        return False
    return str(value).strip().strip("[]").lower() not in _UNKNOWN


def ase_module(name: str) -> Any:
    """A module of ASE; imported only where a file needs it.

    Raises:
        ModuleNotFoundError: ASE is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "ase":
            raise
        raise ModuleNotFoundError(
            "extended XYZ and ASE databases are read with ase, which is not installed: "
            "pip install 'geot-kernels[model]'",
            name="ase",
        ) from None


def structure_of_atoms(atoms: Any) -> Structure:
    """Elements and coordinates of `ase.Atoms`.

    Raises:
        ValueError: It is periodic, has no atoms, an unknown element, or a position that is not
            finite.
    """
    if atoms.pbc.any():
        raise ValueError("is periodic, and only molecules can be read")
    numbers = np.asarray(atoms.numbers, np.int64)
    positions = np.asarray(atoms.positions, np.float32)
    if not len(numbers):
        raise ValueError("has no atoms")
    if numbers.min() < 1 or numbers.max() > 118:
        raise ValueError("has a dummy atom, which is no element")
    if not np.isfinite(positions).all():
        raise ValueError("has coordinates that are not finite")
    return Structure(numbers, positions)


def _name_and_unit(column: str) -> tuple[str, str | None]:
    match = re.fullmatch(r"\s*(.*?\S)\s*(?:\[(.+)\]|\((.+)\))\s*", column)
    if match is None:
        return column.strip(), None
    return match[1], (match[2] or match[3]).strip() or None


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_LISTED]) or "none"
    return shown + (", ..." if len(names) > _LISTED else "")
