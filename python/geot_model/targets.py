"""Targets as a network learns them: of about unit spread, without what is known beforehand.

    y = std · out + baseline + Σ_i reference[z_i]

The baseline is the mean of the training molecules; n times a mean per atom where the read-out is a
sum over the n atoms; 0 where it is the length of a dipole. So a sum stays one: with more atoms of
the same kind it grows as it should, also beyond the sizes seen in training. (SchNet does the same.
For QM9 it is also easier to learn: of zero-point energies 0.25 eV instead of 0.89 eV are left to
the network, of atomization energies at 0 K 3.1 eV instead of 10.2 eV.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import FiniteFloat
from torch import Tensor

from . import qm9
from .molecules import Molecules
from .readout import READOUTS

REFERENCES = ("none", "fitted", "published")

_FEWEST = 2  # known values of a target
_NOISE = 1e-9  # of the largest value: a spread below it is rounding
_LAST_ELEMENT = 118
_NUMBERS = 256  # that a uint8 can hold


@dataclass(frozen=True)
class TargetScaler:
    """Turns targets into what the network gives, and back; plain values, as JSON has them.

    Attributes:
        names: Of the targets, in the order of the network's outputs.
        units: Of the targets, and so of all numbers here; "" where it is not known.
        readouts: How the network makes each, one of `geot_model.readout.READOUTS`.
        mean: Of the training molecules, without references; per atom with the read-out "sum", 0
            with "dipole".
        std: What is left after that, as root mean square; 1 where all values are the same.
        references: Target to what an atom of each element contributes, by atomic number; only of
            targets that have references and of elements in training molecules with such a target.

    Raises:
        ValueError: They contradict each other.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    readouts: tuple[str, ...]
    mean: tuple[FiniteFloat, ...]
    std: tuple[FiniteFloat, ...]
    references: dict[str, dict[int, FiniteFloat]]

    def __post_init__(self) -> None:
        """Check that all are of the same targets."""
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"names: expected different ones, got {list(self.names)}")
        for field in ("units", "readouts", "mean", "std"):
            expected, got = len(self.names), len(getattr(self, field))
            if got != expected:
                raise ValueError(f"{field}: expected {expected}, one for each target, got {got}")
        for readout in self.readouts:
            if readout not in READOUTS:
                raise ValueError(f"readouts: expected {', '.join(READOUTS)}, got {readout!r}")
        if min(self.std) <= 0:
            raise ValueError(f"std: expected numbers > 0, got {min(self.std)}")
        if unknown := [name for name in self.references if name not in self.names]:
            raise ValueError(f"references: expected names of targets, got {', '.join(unknown)}")
        for name, numbers in self.references.items():
            if wrong := [number for number in numbers if not 0 <= number < _NUMBERS]:
                raise ValueError(f"references: {name}: expected atomic numbers, got {wrong[0]}")

    @classmethod
    def fit(
        cls,
        train: Molecules,
        names: Sequence[str],
        readouts: Sequence[str],
        references: Mapping[str, str] | None = None,
    ) -> TargetScaler:
        """Measure the targets of the training molecules; a value that is not finite is not known.

        Args:
            train: The training molecules.
            names: Of the targets.
            readouts: Of each, as `GeoT` has them.
            references: Target to what is taken off first: "none", also where it is left out;
                "fitted": least squares on the numbers of atoms of each element (the shortest
                solution where it is not unique); "published": those of QM9,
                `geot_model.qm9.PUBLISHED_REFERENCES`.

        Raises:
            ValueError: A target or a reference is not there, or a target has fewer than two
                known values.
        """
        references = dict(references or {})
        if wrong := [name for name in references if name not in names]:
            raise ValueError(f"references: expected names of targets, got {', '.join(wrong)}")
        means, deviations, chosen = [], [], {}
        for name, readout in zip(names, readouts, strict=True):
            known = np.isfinite(_values(train, name))
            if known.sum() < _FEWEST:
                raise ValueError(
                    f"{name}: expected at least {_FEWEST} training molecules with a known value, "
                    f"got {known.sum()}"
                )
            molecules = train[known]
            kind = references.get(name, "none")
            if kind != "none":
                chosen[name] = _references(kind, molecules, name, readout)
            mean, std = _spread(molecules, name, readout, chosen.get(name))
            means.append(mean)
            deviations.append(std)
        units = tuple(train.units.get(name, "") for name in names)
        return cls(tuple(names), units, tuple(readouts), tuple(means), tuple(deviations), chosen)

    def scale(self, molecules: Molecules) -> Tensor:
        """Turn targets into what the network is to give.

        Args:
            molecules: M of them, with the targets.

        Returns:
            float32 `[M, targets]`, NaN where a value is not known, or the reference of an atom.

        Raises:
            ValueError: A target is not there.
        """
        values = np.stack([_values(molecules, name) for name in self.names], axis=1)
        scaled = (values - self._offsets(molecules)) / np.array(self.std)
        return torch.from_numpy(np.where(np.isfinite(values), scaled, np.nan).astype(np.float32))

    def unscale(self, outputs: Tensor, molecules: Molecules) -> NDArray[np.float64]:
        """Turn what the network gave into targets.

        Args:
            outputs: `[M, targets]`, on any device.
            molecules: The M molecules.

        Returns:
            float64 `[M, targets]`, NaN where the reference of an atom is not known.
        """
        out = outputs.detach().cpu().double().numpy() * np.array(self.std)
        values: NDArray[np.float64] = out + self._offsets(molecules)
        return values

    def without_reference(self, name: str, numbers: NDArray[np.integer]) -> list[int]:
        """Elements among some atoms that a target has no reference of, sorted."""
        if name not in self.references:
            return []
        return sorted(set(numbers.tolist()) - set(self.references[name]))

    def _offsets(self, molecules: Molecules) -> NDArray[np.float64]:
        """What does not come from the network: float64 [M, targets]."""
        columns = []
        for name, mean, readout in zip(self.names, self.mean, self.readouts, strict=True):
            column = mean * _weights(molecules, readout)
            if name in self.references:
                column = column + _sum_references(molecules, self.references[name])
            columns.append(column)
        return np.stack(columns, axis=1)


def element_counts(molecules: Molecules, elements: Sequence[int]) -> NDArray[np.float64]:
    """Count the atoms of each element: float64 `[M, elements]`."""
    is_element = molecules.numbers[:, None] == np.array(elements)  # [T, elements]
    sums = np.concatenate([np.zeros((1, len(elements))), np.cumsum(is_element, axis=0)])
    counts: NDArray[np.float64] = sums[molecules.ptr[1:]] - sums[molecules.ptr[:-1]]
    return counts


def element_symbols(numbers: Iterable[int]) -> str:
    """Name elements: "H, C" for 1, 6."""
    from rdkit import Chem

    table = Chem.GetPeriodicTable()
    return ", ".join(
        table.GetElementSymbol(number) if 0 <= number <= _LAST_ELEMENT else str(number)
        for number in numbers
    )


def _values(molecules: Molecules, name: str) -> NDArray[np.float64]:
    if name not in molecules.targets:
        there = ", ".join(molecules.targets) or "no targets at all"
        raise ValueError(f"{name}: no such target; there are: {there}")
    return molecules.targets[name]


def _weights(molecules: Molecules, readout: str) -> NDArray[np.float64]:
    """How many times a molecule has the mean: float64 [M]."""
    sizes = np.diff(molecules.ptr).astype(np.float64)
    return {"sum": sizes, "dipole": np.zeros_like(sizes)}.get(readout, np.ones_like(sizes))


def _spread(
    molecules: Molecules, name: str, readout: str, references: dict[int, float] | None
) -> tuple[float, float]:
    """Mean and standard deviation of a target that all molecules have."""
    values = molecules.targets[name]
    left = values - _sum_references(molecules, references) if references else values
    weights = _weights(molecules, readout)
    # Least squares of left = mean · weights: the mean, if they are 1.
    mean = float(left @ weights) / max(float(weights @ weights), 1.0)
    std = float(np.sqrt(np.square(left - mean * weights).mean()))
    return mean, std if std > _NOISE * np.abs(values).max() else 1.0


def _references(kind: str, molecules: Molecules, name: str, readout: str) -> dict[int, float]:
    """What an atom of each element contributes to a target that all molecules have."""
    elements = molecules.elements
    if kind not in REFERENCES:
        raise ValueError(f"references: {name}: expected {', '.join(REFERENCES)}, got {kind!r}")
    if readout == "dipole":
        raise ValueError(f"references: {name}: expected 'none' for a dipole, got {kind!r}")
    if kind == "fitted":
        counts = element_counts(molecules, elements)
        solution = np.linalg.lstsq(counts, molecules.targets[name], rcond=None)[0]
        return dict(zip(elements, solution.tolist(), strict=True))
    published = qm9.PUBLISHED_REFERENCES.get(name)
    if published is None:
        there = ", ".join(qm9.PUBLISHED_REFERENCES)
        raise ValueError(f"references: {name}: there are published ones of {there} alone")
    if missing := [element for element in elements if element not in published]:
        raise ValueError(
            f"references: {name}: there are no published ones of {element_symbols(missing)}"
        )
    unit, expected = molecules.units.get(name, ""), qm9.TARGETS[name]
    if unit not in ("", expected):
        raise ValueError(f"references: {name}: published ones are in {expected}, got {unit}")
    return {element: published[element] for element in elements}


def _sum_references(molecules: Molecules, references: dict[int, float]) -> NDArray[np.float64]:
    """Add up over the atoms, NaN where an element has none: float64 [M]."""
    table = np.full(_NUMBERS, np.nan)
    table[list(references)] = list(references.values())
    owner = np.repeat(np.arange(len(molecules)), np.diff(molecules.ptr))
    sums = np.bincount(owner, table[molecules.numbers], minlength=len(molecules))
    return sums.astype(np.float64)  # of no atoms, they are integers
