"""Predictions for many molecules, and what a model cannot be asked."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .batches import pack
from .checkpoint import Card
from .model import GeoT
from .molecules import Molecule, Molecules
from .targets import element_symbols

# Molecules in a batch, and pairs of atoms, which is what memory depends on: on a CPU, elsewhere.
_CPU = (64, 2**18)
_ELSEWHERE = (512, 2**20)

_DIGITS = 6  # of the spread of a target, that float32 gives


@dataclass(frozen=True, eq=False)
class Prediction:
    """Properties of M molecules, as a model predicts them.

    Attributes:
        names: Of the molecules, M.
        targets: Names of the properties.
        units: Of the properties; "" where it is not known.
        values: float64 `[M, targets]`, NaN where nothing can be said.
        decimals: How many of each property's values are worth printing; negative: tens, ...
        reasons: Molecule to why some of its values are NaN, a line that begins with its name.
    """

    names: tuple[str, ...]
    targets: tuple[str, ...]
    units: tuple[str, ...]
    values: NDArray[np.float64]
    decimals: tuple[int, ...]
    reasons: dict[int, str]

    @property
    def problems(self) -> list[str]:
        """The reasons, in the order of the molecules."""
        return [self.reasons[row] for row in sorted(self.reasons)]


def why_not(card: Card, molecule: Molecule) -> str | None:
    """Say why a model cannot be asked about a molecule; None where it can."""
    unknown = sorted(set(molecule.numbers.tolist()) - set(card.elements))
    if unknown:
        known = element_symbols(card.elements)
        return (
            f"{molecule.name}: {element_symbols(unknown)} is not among the model's elements: "
            f"{known}"
        )
    if len(molecule.numbers) == 0:
        return f"{molecule.name}: no atoms"
    if not np.isfinite(molecule.positions).all():
        return f"{molecule.name}: a position is not finite"
    return None


def predict(
    model: GeoT, molecules: Molecules | Sequence[Molecule], batch_size: int | None = None
) -> Prediction:
    """Predict properties of molecules, in the units of the training's targets.

    Args:
        model: With a `card`, as `load_model` gives it; it computes where it is.
        molecules: M of them.
        batch_size: Most molecules at a time; None: as many as are fast. Large ones come in
            smaller batches.

    Returns:
        Values in the order of the molecules; NaN, with a reason, for those that the model cannot
        be asked about, as `why_not` says.

    Raises:
        ValueError: The model is new: it has no `card`.
    """
    card = model.card
    if card is None:
        raise ValueError("model: expected a trained one, with a card, got a new one")
    scaler = card.scaler
    reasons = _refused(card, molecules)
    usable = np.setdiff1d(np.arange(len(molecules)), list(reasons))
    if isinstance(molecules, Molecules):
        names, accepted = molecules.names.tolist(), molecules[usable]
    else:
        names = [one.name for one in molecules]
        accepted = Molecules.join([molecules[row] for row in usable])
    values = np.full((len(molecules), len(scaler.names)), np.nan)
    outputs = _run(model, accepted, batch_size)
    values[usable] = scaler.unscale(outputs, accepted)
    for place in np.flatnonzero(~np.isfinite(values[usable]).all(axis=1)):
        reasons[int(usable[place])] = _why_nan(card, accepted.molecule(int(place)))
    values[~np.isfinite(values)] = np.nan
    return Prediction(
        tuple(names),
        scaler.names,
        scaler.units,
        values,
        tuple(_DIGITS - math.floor(math.log10(std)) for std in scaler.std),
        reasons,
    )


def _refused(card: Card, molecules: Molecules | Sequence[Molecule]) -> dict[int, str]:
    """Molecule to why the model cannot be asked about it."""
    if isinstance(molecules, Molecules):
        sizes = np.diff(molecules.ptr)
        owner = np.repeat(np.arange(len(molecules)), sizes)
        wrong = ~np.isin(molecules.numbers, card.elements)
        wrong |= ~np.isfinite(molecules.positions).all(axis=1)
        suspects = np.union1d(np.flatnonzero(sizes == 0), owner[wrong]).tolist()
        chosen = {row: molecules.molecule(row) for row in suspects}
    else:
        chosen = dict(enumerate(molecules))
    reasons = {row: why_not(card, molecule) for row, molecule in chosen.items()}
    return {row: reason for row, reason in reasons.items() if reason is not None}


def _run(model: GeoT, molecules: Molecules, batch_size: int | None) -> torch.Tensor:
    """What the network gives: float64 `[M, outputs]`, on the CPU."""
    device = model.output_offset.device
    size, pairs = _CPU if device.type == "cpu" else _ELSEWHERE
    count = len(model.readout.kinds)
    out = torch.empty(len(molecules), count, dtype=torch.float64)
    with torch.no_grad():
        for rows in _batches(molecules, batch_size or size, pairs):
            batch = pack(molecules, rows)
            numbers, positions, ptr = (x.to(device) for x in batch[:3])
            result = model(numbers, positions, ptr=ptr, max_atoms=batch.max_atoms)
            out[torch.from_numpy(rows)] = result.double().cpu()
    return out


def _batches(molecules: Molecules, size: int, pairs: int) -> Iterator[NDArray[np.int64]]:
    """Molecules of about one size: at most `size`, of at most so many pairs of atoms, or one."""
    sizes = np.diff(molecules.ptr)
    left = np.argsort(sizes, kind="stable")
    while len(left):
        cost = sizes[left[:size]] ** 2 * np.arange(1, len(left[:size]) + 1)
        count = max(int(np.searchsorted(cost, pairs, side="right")), 1)
        yield left[:count]
        left = left[count:]


def _why_nan(card: Card, molecule: Molecule) -> str:
    """Why some of the values of a molecule that the model was asked about are not numbers."""
    for name in card.scaler.names:
        if missing := card.scaler.without_reference(name, molecule.numbers):
            symbols = element_symbols(missing)
            return f"{molecule.name}: no training molecule with {symbols} had a value of {name}"
    return f"{molecule.name}: the network's result is not finite; look at its positions"


def write_csv(
    prediction: Prediction,
    molecules: Molecules,
    path: str | Path,
    rows: NDArray[np.int64] | None = None,
) -> None:
    """Write predictions as CSV: name, SMILES if any is known, "gap [eV]" and so on, problem.

    A value has as many digits as the network gives; one that is not known is left empty, and
    `problem` says why.

    Args:
        prediction: M molecules' properties.
        molecules: The M molecules.
        path: The file.
        rows: Where each molecule is in its file, `[M]`, to come first, as `row`; None: no such
            column.

    Raises:
        ValueError: There are not as many molecules as predictions.
        OSError: The file cannot be written.
    """
    count = len(prediction.names)
    if len(molecules) != count:
        raise ValueError(f"molecules: expected {count}, as predicted, got {len(molecules)}")
    units = zip(prediction.targets, prediction.units, strict=True)
    columns = {"name": prediction.names}
    if rows is not None:
        columns = {"row": tuple(map(str, rows.tolist())), **columns}
    if molecules.smiles is not None:
        columns["smiles"] = tuple(molecules.smiles.tolist())
    header = [*columns, *(f"{name} [{unit}]" if unit else name for name, unit in units)]
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*header, "problem"])
        for row, known in enumerate(zip(*columns.values(), strict=True)):
            values = zip(prediction.values[row].tolist(), prediction.decimals, strict=True)
            numbers = ["" if math.isnan(x) else repr(round(x, places)) for x, places in values]
            reason = prediction.reasons.get(row, "")
            writer.writerow([*known, *numbers, reason.removeprefix(f"{prediction.names[row]}: ")])
