"""What a model says of molecules: predictions, and on which pairs of atoms they rest, in pictures.

For each molecule `run` writes

    NAME.npz             all weights, the chosen method's strengths and their aggregate
    NAME-map.png         the aggregate as a heat map
    NAME-pairs.png       the structure with its strongest pairs

and, for all of them, `explanation.html` with the molecules in 3-D, and `predictions.csv`. What the
methods mean is said in `geot_model.relevance`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rdkit import Chem

from . import page, relevance
from .bonds import perceive_bonds
from .draw import atom_labels, draw_heatmap, draw_pairs
from .model import GeoT
from .molecules import Molecule, Molecules, pad_batch
from .prediction import Prediction, predict, write_csv
from .targets import TargetScaler

if TYPE_CHECKING:
    from .readers import Data

PAGE = "explanation.html"
PREDICTIONS = "predictions.csv"

DEFAULT_METHOD = relevance.VALUE

FORMULAS = {
    relevance.WEIGHT: "mean over layers and heads of |P_ij| / Σ_k |P_ik|",
    relevance.VALUE: "sum over layers and heads of |P_ij| ‖W_O v_j‖",
    relevance.GRADIENT: "sum over layers and heads of P_ij ∂y/∂P_ij",
}
"""Method to the formula of the aggregate A_ij: `relevance.aggregate` of `relevance.relevance`."""

MEANINGS = {
    relevance.WEIGHT: (
        "The share that atom j has in what the attention of atom i takes, on average over layers "
        "and heads. It does not tell what is taken, nor what becomes of it."
    ),
    relevance.VALUE: (
        "How long the vectors are that attention adds to atom i from atom j. It does not tell "
        "what the rest of the network makes of them."
    ),
    relevance.GRADIENT: (
        "What the prediction owes to what atom i takes from atom j, in its own unit: by so much, "
        "to first order, it would fall if that were left out in the layers and heads shown. "
        "Positive values raise the prediction, negative ones lower it."
    ),
}

_AT_ONCE = 16  # molecules whose maps are in memory
_LONGEST_NAME = 60  # of a file
_UNPRINTED = 4  # of the decimals that the network gives, on pages and pictures


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a model says of a molecule.

    Attributes:
        molecule: The molecule, of n atoms.
        weights: `P [L, H, n, n]`, with which the attention multiplies the values.
        maps: `[L, H, n, n]` each, row i: the atom that takes: of all methods in the order of
            `relevance.METHODS`, of the last one for each target, in the unit of the target.
    """

    molecule: Molecule
    weights: NDArray[np.float32]
    maps: tuple[NDArray[np.float32], ...]


def explain(model: GeoT, molecules: Molecules) -> Iterator[Explanation]:
    """Compute the maps of molecules by all methods.

    Args:
        model: With a `card`.
        molecules: That the model can be asked about.
    """
    scaler = _scaler(model)
    device = model.output_offset.device
    for first in range(0, len(molecules), _AT_ONCE):
        some = molecules[first : first + _AT_ONCE]
        with torch.no_grad():
            padded = (x.to(device) for x in pad_batch(some))
            weights = model.attention_maps(*padded).cpu().numpy()  # [L, B, H, N, N]
        found = [
            relevance.relevance(model, some, method)
            for method in relevance.METHODS
            if method != relevance.GRADIENT
        ]
        for target, std in enumerate(scaler.std):
            maps = relevance.relevance(model, some, relevance.GRADIENT, target)
            found.append([one * std for one in maps])
        for row in range(len(some)):
            molecule = some.molecule(row)
            n = len(molecule.numbers)
            yield Explanation(
                molecule,
                weights[:, row, :, :n, :n].astype(np.float32),
                tuple(maps[row].float().numpy() for maps in found),
            )


def run(
    model: GeoT,
    data: Data,
    folder: str | Path,
    *,
    num_pairs: int = 5,
    method: str = DEFAULT_METHOD,
    target: str | None = None,
    complain: Callable[[str], None] | None = None,
) -> list[Path]:
    """Explain molecules: write the files that this module's docstring lists.

    Args:
        model: With a `card`, as `GeoT.load` gives it.
        data: The molecules; where they have values of the model's targets, these are shown too.
        folder: Where the files go; it exists.
        num_pairs: How many pairs of atoms are marked in a structure, and on the page at first.
        method: One of `relevance.METHODS`, of the pictures and the .npz files; the page has all.
        target: Whose gradients these are; None: the first one.
        complain: Is called with a line for each molecule that the model cannot be asked about.

    Returns:
        The files: the page first; none where no molecule could be explained.

    Raises:
        ValueError: The method or the target is not known, or `num_pairs` is negative.
        OSError: A file cannot be written.
    """
    scaler, folder = _scaler(model), Path(folder)
    if method not in relevance.METHODS:
        raise ValueError(f"method: expected one of {', '.join(relevance.METHODS)}, got {method!r}")
    if target is not None and target not in scaler.names:
        raise ValueError(f"target: expected one of {', '.join(scaler.names)}, got {target!r}")
    if num_pairs < 0:
        raise ValueError(f"num_pairs: expected at least 0, got {num_pairs}")
    prediction = predict(model, data.molecules)
    if complain is not None:
        for problem in prediction.problems:
            complain(problem)
    usable = np.flatnonzero(np.isfinite(prediction.values).any(axis=1))
    if not len(usable):
        return []
    chosen = Choice(method, target or scaler.names[0], num_pairs)
    rows = _rows(prediction, data.molecules, usable)
    problems = [*data.problems, *prediction.problems]
    files = _write_all(model, data.molecules[usable], rows, folder, chosen, problems)
    write_csv(prediction, data.molecules, folder / PREDICTIONS, data.rows)
    return [files[0], folder / PREDICTIONS, *files[1:]]


@dataclass(frozen=True)
class Choice:
    """What pictures show.

    Attributes:
        method: One of `relevance.METHODS`.
        target: Whose gradients.
        num_pairs: How many pairs.
    """

    method: str
    target: str
    num_pairs: int

    def map_of(self, one: Explanation, scaler: TargetScaler) -> NDArray[np.float32]:
        """The map `[L, H, n, n]`."""
        place = relevance.METHODS.index(self.method)
        if self.method == relevance.GRADIENT:
            place += scaler.names.index(self.target)
        return one.maps[place]

    def formula(self, scaler: TargetScaler) -> str:
        """What the aggregate is."""
        text = f"A_ij = {FORMULAS[self.method]}"
        if self.method != relevance.GRADIENT:
            return text
        unit = scaler.units[scaler.names.index(self.target)]
        return f"{text}, y: {self.target}{f' [{unit}]' if unit else ''}"


def _scaler(model: GeoT) -> TargetScaler:
    if model.card is None:
        raise ValueError("model: expected a trained one, with a card, got a new one")
    return model.card.scaler


def _methods(scaler: TargetScaler) -> list[page.Method]:
    """The methods as the page has them."""
    targets = tuple(zip(scaler.names, scaler.units, strict=True))
    return [
        page.Method(
            name,
            FORMULAS[name],
            MEANINGS[name],
            mean=name == relevance.WEIGHT,
            signed=name == relevance.GRADIENT,
            targets=targets if name == relevance.GRADIENT else (),
        )
        for name in relevance.METHODS
    ]


def _write_all(
    model: GeoT,
    molecules: Molecules,
    rows: Sequence[Sequence[page.Row]],
    folder: Path,
    chosen: Choice,
    problems: Sequence[str],
) -> list[Path]:
    """Write pages, pictures and arrays of molecules that the model can be asked about."""
    scaler = _scaler(model)
    methods = _methods(scaler)
    first: Any = model.layers[0]
    layers, heads = len(model.layers), int(first.attention.num_heads)
    sizes = np.diff(molecules.ptr).tolist()
    parts = page.divide(sizes, layers, heads, methods)
    pages = [folder / PAGE]
    pages += [pages[0].with_stem(f"{pages[0].stem}-{k}") for k in range(2, len(parts) + 1)]
    spans = [sorted({part.rows[0], part.rows[-1]}) for part in parts]
    texts = [" to ".join(str(molecules.names[row]) for row in span) for span in spans]
    links = [(text, file.name) for text, file in zip(texts, pages, strict=True)]
    stems = file_stems(molecules.names.tolist())
    files = list(pages)
    for part, file in zip(parts, pages, strict=True):
        encoded = []
        some = molecules[part.rows.start : part.rows.stop]
        for row, one in zip(part.rows, explain(model, some), strict=True):
            graph = _graph(one.molecule)
            entry = page.Entry(
                one.molecule.name,
                formula(one.molecule.numbers),
                atom_labels(one.molecule.numbers),
                graph,
                rows[row],
                one.maps,
            )
            encoded.append(page.encode(entry, methods, part.whole))
            title = caption(entry)
            files += _write_files(one, graph, title, folder / stems[row], chosen, scaler)
        page.write_page(
            encoded,
            methods,
            file,
            heads=heads,
            title="What GeoT's predictions rest on",
            method=chosen.method,
            target=scaler.names.index(chosen.target),
            num_pairs=chosen.num_pairs,
            problems=problems,
            links=links if len(links) > 1 else (),
        )
    return files


def _graph(molecule: Molecule) -> Chem.Mol:
    graph = perceive_bonds(molecule.numbers, molecule.positions, smiles=molecule.smiles)
    assert graph is not None, "the model was asked about it"
    return graph


def _rows(
    prediction: Prediction, molecules: Molecules, usable: NDArray[np.int64]
) -> list[list[page.Row]]:
    """Predictions of the usable molecules as text, and known values of the same unit."""
    out: list[list[page.Row]] = []
    for row in usable.tolist():
        texts = []
        for column, (name, unit) in enumerate(
            zip(prediction.targets, prediction.units, strict=True)
        ):
            places = max(0, prediction.decimals[column] - _UNPRINTED)
            known = None
            if name in molecules.targets and molecules.units.get(name, "") in ("", unit):
                known = _text(molecules.targets[name][row], places)
            value = _text(prediction.values[row, column], places) or "not known"
            texts.append(page.Row(name, value, known, unit))
        out.append(texts)
    return out


def _text(value: float, places: int) -> str | None:
    return f"{value:.{places}f}" if np.isfinite(value) else None


def _write_files(
    one: Explanation,
    graph: Chem.Mol,
    title: str,
    stem: Path,
    chosen: Choice,
    scaler: TargetScaler,
) -> list[Path]:
    """Write the arrays and the two pictures of a molecule."""
    molecule = one.molecule
    labels = atom_labels(molecule.numbers)
    maps = chosen.map_of(one, scaler)
    aggregate = relevance.aggregate(torch.from_numpy(maps), chosen.method).double().numpy()
    files = [stem.with_name(stem.name + end) for end in (".npz", "-map.png", "-pairs.png")]
    np.savez_compressed(
        files[0],
        numbers=molecule.numbers,
        positions=molecule.positions,
        labels=np.array(labels),
        weights=one.weights,
        method=np.array(chosen.method),
        formula=np.array(chosen.formula(scaler)),
        relevance=maps,
        aggregate=aggregate,
    )
    apart = np.abs(aggregate[~np.eye(len(labels), dtype=np.bool_)])
    draw_heatmap(
        aggregate,
        labels,
        files[1],
        title=title,
        colorbar_label=chosen.formula(scaler),
        signed=chosen.method == relevance.GRADIENT,
        limit=float(apart.max(initial=0.0)) or None,
    )
    draw_pairs(
        graph,
        aggregate,
        files[2],
        num_pairs=chosen.num_pairs,
        title=f"{title}. {chosen.formula(scaler)}",
    )
    return files


def formula(numbers: NDArray[np.int64]) -> str:
    """Sum formula of atoms in Hill's order, such as C7H8O."""
    table = Chem.GetPeriodicTable()
    counts = Counter(table.GetElementSymbol(int(number)) for number in numbers)
    first = [symbol for symbol in ("C", "H") if "C" in counts and symbol in counts]
    rest = sorted(symbol for symbol in counts if symbol not in first)
    return "".join(f"{s}{counts[s] if counts[s] > 1 else ''}" for s in [*first, *rest])


def caption(entry: page.Entry) -> str:
    """Name a molecule and its predictions with units, and known values."""
    parts = []
    for row in entry.predictions:
        known = "" if row.known is None else f" (known: {row.known})"
        text = f"{row.target} {row.value} {row.unit}".rstrip() + known
        parts.append(text.replace(" ", "\N{NO-BREAK SPACE}"))  # titles are wrapped
    return f"{entry.name}, {entry.formula}: predicted {', '.join(parts)}"


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
