"""Molecules in memory: one, or many one after the other in flat arrays, as a model takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Molecule:
    """One molecule: elements, coordinates and a name.

    Attributes:
        numbers: [n] int64, atomic numbers, hydrogens included.
        positions: [n, 3] float32, Å.
        name: what it is called in its file, else the file's name and its place in the file.
        smiles: where known. Its atoms may come in another order than `numbers`.

    Raises:
        ValueError: if a shape or dtype is not as above.
    """

    numbers: NDArray[np.int64]
    positions: NDArray[np.float32]
    name: str
    smiles: str | None = None

    def __post_init__(self) -> None:
        """Check shapes and dtypes."""
        if self.numbers.ndim != 1 or self.numbers.dtype != np.int64:
            got = f"{self.numbers.dtype} {list(self.numbers.shape)}"
            raise ValueError(f"numbers: expected int64 [n], got {got}")
        n = len(self.numbers)
        if self.positions.shape != (n, 3) or self.positions.dtype != np.float32:
            got = f"{self.positions.dtype} {list(self.positions.shape)}"
            raise ValueError(f"positions: expected float32 [n={n}, 3], got {got}")


@dataclass(frozen=True, eq=False)
class Molecules:
    """M molecules of T atoms in all, one after the other: molecule m is rows `ptr[m]:ptr[m+1]`.

    Attributes:
        numbers: Atomic numbers, uint8 [T].
        positions: Positions in Å, float32 [T, 3].
        ptr: First row of each molecule and, last, T; int64 [M+1].
        targets: Name to values, float64 [M] each, NaN where a value is not known. float32 would
            round a total energy by up to 1e-3 eV.
        names: One name for each molecule, such as "gdb_123", str [M].
        units: Target to unit, as far as known.
        smiles: One for each molecule, "" where it is not known, str [M]; None: none is known.

    Raises:
        ValueError: The shapes contradict each other.
    """

    numbers: NDArray[np.uint8]
    positions: NDArray[np.float32]
    ptr: NDArray[np.int64]
    targets: dict[str, NDArray[np.float64]]
    names: NDArray[np.str_]
    units: dict[str, str] = field(default_factory=dict)
    smiles: NDArray[np.str_] | None = None

    def __post_init__(self) -> None:
        """Check that all arrays are of the same molecules."""
        atoms, count = int(self.ptr[-1]), len(self)
        checks: list[tuple[str, NDArray[Any], list[int]]] = [
            ("numbers", self.numbers, [atoms]),
            ("positions", self.positions, [atoms, 3]),
            ("names", self.names, [count]),
            *((f"targets[{name!r}]", values, [count]) for name, values in self.targets.items()),
        ]
        if self.smiles is not None:
            checks.append(("smiles", self.smiles, [count]))
        for name, array, expected in checks:
            if list(array.shape) != expected:
                raise ValueError(f"{name}: expected {expected}, got {list(array.shape)}")

    def __len__(self) -> int:
        """Return the number of molecules."""
        return len(self.ptr) - 1

    def __getitem__(self, key: int | slice | Sequence[int] | NDArray[Any]) -> Molecules:
        """Return the molecules that `key` names: an int (one), a slice, indices or a mask [M]."""
        chosen = np.atleast_1d(np.arange(len(self))[key])
        sizes = np.diff(self.ptr)[chosen]
        ptr = pointers(sizes)
        rows = np.repeat(self.ptr[chosen] - ptr[:-1], sizes) + np.arange(ptr[-1])
        return Molecules(
            numbers=self.numbers[rows],
            positions=self.positions[rows],
            ptr=ptr,
            targets={name: values[chosen] for name, values in self.targets.items()},
            names=self.names[chosen],
            units=self.units,
            smiles=None if self.smiles is None else self.smiles[chosen],
        )

    @classmethod
    def join(
        cls,
        molecules: Sequence[Molecule],
        targets: Mapping[str, NDArray[np.float64]] | None = None,
        units: Mapping[str, str] | None = None,
    ) -> Molecules:
        """Lay molecules one after the other.

        Args:
            molecules: M of them.
            targets: Name to values, float64 [M] each.
            units: Target to unit.

        Raises:
            ValueError: The shapes contradict each other.
        """
        smiles = [one.smiles or "" for one in molecules]
        return cls(
            numbers=np.concatenate([np.zeros(0), *(one.numbers for one in molecules)]).astype(
                np.uint8
            ),
            positions=np.concatenate(
                [np.zeros((0, 3), np.float32), *(one.positions for one in molecules)]
            ),
            ptr=pointers(np.array([len(one.numbers) for one in molecules], np.int64)),
            targets=dict(targets or {}),
            names=np.array([one.name for one in molecules], np.str_),
            units=dict(units or {}),
            smiles=np.array(smiles) if any(smiles) else None,
        )

    def molecule(self, index: int) -> Molecule:
        """Return one molecule."""
        rows = slice(*self.ptr[index : index + 2])
        return Molecule(
            self.numbers[rows].astype(np.int64),
            self.positions[rows],
            str(self.names[index]),
            (None if self.smiles is None else str(self.smiles[index])) or None,
        )

    @property
    def max_atoms(self) -> int:
        """Number of atoms of the largest molecule, 0 where there is none."""
        return int(np.diff(self.ptr).max(initial=0))

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that occur, sorted."""
        return tuple(int(number) for number in np.unique(self.numbers))


def pad_batch(
    molecules: Molecules, pad_to: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lay out B = `len(molecules)` molecules as dense tensors of N atoms each, padded with zeros.

    Args:
        molecules: What to lay out.
        pad_to: N; None for the size of the largest molecule.

    Returns:
        Atomic numbers (int64 [B, N]), positions in Å (float32 [B, N, 3]) and mask (bool [B, N],
        True = real atom).

    Raises:
        ValueError: `pad_to` is smaller than the largest molecule.
    """
    width = molecules.max_atoms if pad_to is None else pad_to
    if width < molecules.max_atoms:
        raise ValueError(f"pad_to: expected at least {molecules.max_atoms}, got {width}")
    mask = np.arange(width) < np.diff(molecules.ptr)[:, None]  # [B, N]
    numbers = np.zeros(mask.shape, np.int64)
    positions = np.zeros((*mask.shape, 3), np.float32)
    numbers[mask] = molecules.numbers
    positions[mask] = molecules.positions
    return torch.from_numpy(numbers), torch.from_numpy(positions), torch.from_numpy(mask)


def pointers(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """First row of each molecule of some sizes and, last, the number of rows: int64 [M+1]."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
