"""What a model says of a molecule: predictions, and the attention between its atoms in pictures.

GeoT's attention weights P have no softmax: they come with any sign and scale. Neither means much
by itself: P -> c P with values v -> v / c, for any number c of a head, is the same network. What
stays the same is the share of each weight in its row, and that is what is averaged here:

    W_ij = mean over layers l and heads h of  |P_ij^lh| / Σ_k |P_ik^lh|

So 0 <= W_ij <= 1, and each row sums to 1.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rdkit import Chem
from torch import Tensor

from .checkpoint import Checkpoint
from .draw import atom_labels, draw_heatmap, draw_pairs
from .model import GeoT
from .molecules import Molecule
from .qm9 import load_qm9

FORMULA = "W_ij = mean over layers and heads of |P_ij|/Σ_k|P_ik|"
PREDICTIONS = "predictions.csv"

_LONGEST_NAME = 60  # of a file


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a model says of a molecule.

    Attributes:
        molecule: The molecule.
        predictions: Target to value, in the units of the checkpoint's targets.
        truth: Target to value where it is known.
        attention: `W [n, n]`, row i: the query atom; see this module's formula.
    """

    molecule: Molecule
    predictions: dict[str, float]
    truth: dict[str, float]
    attention: NDArray[np.float64]


def aggregate_attention(maps: Tensor) -> Tensor:
    """Average attention over layers and heads: each weight's share in its row, signs left out.

        W_ij = mean over l, h of  |P_ij^lh| / Σ_k |P_ik^lh|

    A row of zeros, as of a padded atom, counts as zeros.

    Args:
        maps: `P [L, H, n, n]`, row i: the query atom.

    Returns:
        `W [n, n]`, differentiable.
    """
    strength = maps.abs()
    total = strength.sum(-1, keepdim=True)
    return torch.where(total > 0, strength / total, 0).mean((0, 1))


def formula(numbers: NDArray[np.int64]) -> str:
    """Sum formula of atoms in Hill's order, such as C7H8O."""
    table = Chem.GetPeriodicTable()
    counts = Counter(table.GetElementSymbol(int(number)) for number in numbers)
    first = [symbol for symbol in ("C", "H") if "C" in counts and symbol in counts]
    rest = sorted(symbol for symbol in counts if symbol not in first)
    return "".join(f"{s}{counts[s] if counts[s] > 1 else ''}" for s in [*first, *rest])


def why_not(checkpoint: Checkpoint, molecule: Molecule) -> str | None:
    """Say why a model cannot be asked about a molecule; None where it can."""
    table = Chem.GetPeriodicTable()
    unknown = sorted(set(molecule.numbers.tolist()) - set(checkpoint.elements))
    if unknown:
        names = ", ".join(table.GetElementSymbol(number) for number in unknown)
        known = ", ".join(table.GetElementSymbol(number) for number in checkpoint.elements)
        return f"{molecule.name}: {names} is not among the model's elements: {known}"
    if len(molecule.numbers) == 0:
        return f"{molecule.name}: no atoms"
    if not np.isfinite(molecule.positions).all():
        return f"{molecule.name}: a position is not finite"
    return None


def explain_molecule(
    checkpoint: Checkpoint,
    molecule: Molecule,
    *,
    truth: dict[str, float] | None = None,
    model: GeoT | None = None,
) -> Explanation:
    """Predict a molecule's properties and collect the attention between its atoms.

    Args:
        checkpoint: The trained model.
        molecule: The molecule.
        truth: Known values, to go into the result.
        model: `checkpoint.model()`, so that it is not made again for each molecule.

    Raises:
        ValueError: The model does not know an element, or the molecule has no atoms or a position
            that is not finite.
    """
    problem = why_not(checkpoint, molecule)
    if problem is not None:
        raise ValueError(problem)
    model = checkpoint.model() if model is None else model
    device = next(model.parameters()).device
    numbers = torch.from_numpy(molecule.numbers)[None].to(device)
    positions = torch.from_numpy(molecule.positions)[None].to(device)
    mask = torch.ones_like(numbers, dtype=torch.bool)
    values = checkpoint.predict(model, numbers, positions, mask)[0].tolist()
    with torch.no_grad():
        maps = model.attention_maps(numbers, positions, mask)[:, 0]  # [L, H, n, n]
    return Explanation(
        molecule,
        dict(zip(checkpoint.targets, values, strict=True)),
        truth or {},
        aggregate_attention(maps.cpu().double()).numpy(),
    )


def held_out(checkpoint: Checkpoint, count: int) -> list[tuple[Molecule, dict[str, float]]]:
    """Choose molecules of the shipped sample that the model never saw, and what QM9 says of them.

    Args:
        checkpoint: The trained model.
        count: How many at most.

    Returns:
        The first ones in the order of the split, which is random.
    """
    sample = load_qm9()
    places = {str(name): place for place, name in enumerate(sample.names)}
    chosen = [places[name] for name in checkpoint.held_out if name in places][:count]
    out = []
    for place, one in ((place, sample[place]) for place in chosen):
        name = str(sample.names[place])
        molecule = Molecule(one.numbers.astype(np.int64), one.positions, name)
        out.append((molecule, {t: float(one.targets[t][0]) for t in checkpoint.targets}))
    return out


def write_pictures(
    checkpoint: Checkpoint,
    explanation: Explanation,
    folder: str | Path,
    *,
    stem: str | None = None,
    num_pairs: int = 5,
) -> tuple[Path, Path]:
    """Draw the attention between a molecule's atoms: a heat map, and the structure.

    Args:
        checkpoint: The trained model.
        explanation: What it said.
        folder: Where the two PNG files go; it exists.
        stem: What their names begin with; None for the molecule's name.
        num_pairs: How many pairs of atoms are marked in the structure.

    Returns:
        The files: `STEM-attention.png` and `STEM-pairs.png`.
    """
    molecule = explanation.molecule
    stem = file_stems([molecule.name])[0] if stem is None else stem
    heat_map, pairs = (Path(folder) / f"{stem}-{what}.png" for what in ("attention", "pairs"))
    title = caption(checkpoint, explanation)
    draw_heatmap(
        explanation.attention,
        atom_labels(molecule.numbers),
        heat_map,
        title=title,
        colorbar_label=FORMULA,
        signed=False,
    )
    weights = explanation.attention
    draw_pairs(molecule, weights, pairs, num_pairs=num_pairs, title=f"{title}. {FORMULA}")
    return heat_map, pairs


def caption(checkpoint: Checkpoint, explanation: Explanation) -> str:
    """Name a molecule and its predictions with units, and the truth where it is known."""
    parts = []
    for target, unit in checkpoint.targets.items():
        known = explanation.truth.get(target)
        truth = "" if known is None else f" (QM9: {known:.2f})"
        value = f"{target} {explanation.predictions[target]:.2f} {unit}{truth}"
        parts.append(value.replace(" ", "\N{NO-BREAK SPACE}"))  # titles are wrapped
    molecule = explanation.molecule
    return f"{molecule.name}, {formula(molecule.numbers)}: predicted {', '.join(parts)}"


def file_stems(names: Sequence[str]) -> list[str]:
    """Turn names of molecules into different names of files (also where case is ignored)."""
    stems: list[str] = []
    taken: set[str] = set()
    for name in names:
        stem = re.sub(r"[^\w.+-]+", "_", name).strip("._")[:_LONGEST_NAME] or "molecule"
        unique, count = stem, 1
        while unique.lower() in taken:
            count += 1
            unique = f"{stem}-{count}"
        taken.add(unique.lower())
        stems.append(unique)
    return stems


def write_predictions(
    checkpoint: Checkpoint, explanations: Sequence[Explanation], path: str | Path
) -> None:
    """Write predictions, and the truth where it is known, as CSV with units in its header."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        units = [f"{target} [{unit}]" for target, unit in checkpoint.targets.items()]
        writer.writerow(["name", "formula", *units, *(f"QM9 {unit}" for unit in units)])
        for one in explanations:
            values = [f"{one.predictions[target]:.4f}" for target in checkpoint.targets]
            truths = [one.truth.get(target) for target in checkpoint.targets]
            known = ["" if value is None else f"{value:.4f}" for value in truths]
            writer.writerow([one.molecule.name, formula(one.molecule.numbers), *values, *known])
