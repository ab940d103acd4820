"""Pictures of attention: a heat map between labelled atoms, and a structure with its top pairs.

Colours are safe for colour-blind readers: diverging maps run from blue to red through white, and
the sign of a pair also shows in its line (solid for +, dashed for -). Figures are made by
matplotlib's objects, so drawing changes no global state.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from rdkit import Chem, rdBase
from rdkit.Chem import rdDepictor
from rdkit.Chem.Draw import rdMolDraw2D
from rdkit.Geometry import Point2D, Point3D

from .bonds import perceive_bonds
from .molecules import Molecule

Pair = tuple[int, int, float]
_Points = npt.NDArray[np.float64]

_DPI = 150
_POSITIVE, _NEGATIVE = "#c0392b", "#2166ac"
_STRONGEST = np.array([245, 176, 65]) / 255  # disc of the atom with the largest sum; none: white
_RING = "#444444"  # around atoms in a pair
_MAX_LABELS = 120  # ticks on one axis of a heat map; beyond, only every second, third, ... atom
_SCALE_PX = 62.0  # pixels for 1 Å of a structure: a bond is 1.5 Å
_ATOM_PX = 19.0  # radius of the disc with an atom's name
_APART = 0.9  # Å in the drawing between atoms, so that their discs do not touch
_SPREAD_STEPS = 100
_MARGIN_PX = 40
_MAX_SIDE_PX = 4000
_PANEL_PX = 400  # width of the list of pairs
_ROW_PX = 34
_CLEAR_PX = 34.0  # a band that keeps this far from other atoms and ranks need not bend more
_FORMULA = r"strength of {i, j} = |A$_{ij}$ + A$_{ji}$| / 2"
_SIGN = "\n(here with the sign of the sum)"
_DISCS = "\nAn atom is the darker, the larger the\nsum of its strengths with all others."


def atom_labels(numbers: npt.ArrayLike) -> list[str]:
    """Element and running number of each atom: C1, C2, O1, H1.

    Args:
        numbers: [n] atomic numbers.
    """
    table = Chem.GetPeriodicTable()
    seen: Counter[str] = Counter()
    labels = []
    for number in np.asarray(numbers).tolist():
        symbol = table.GetElementSymbol(number)
        seen[symbol] += 1
        labels.append(f"{symbol}{seen[symbol]}")
    return labels


def strongest_pairs(weights: npt.ArrayLike, num_pairs: int) -> list[Pair]:
    """The pairs of atoms {i, j}, i != j, with the largest strength |W_ij + W_ji| / 2.

    Args:
        weights: [n, n], row i: the query atom; signed or not.
        num_pairs: how many at most. Pairs of strength 0 are left out.

    Returns:
        (i, j, (W_ij + W_ji) / 2) with i < j, the strongest first; pairs of one strength by i, j.

    Raises:
        ValueError: if weights are not square and finite, or num_pairs is negative.
    """
    w = _checked_weights(weights)
    if num_pairs < 0:
        raise ValueError(f"num_pairs: expected at least 0, got {num_pairs}")
    rows, columns = np.triu_indices(len(w), k=1)
    values = (w[rows, columns] + w[columns, rows]) / 2
    order = np.argsort(-np.abs(values), kind="stable")[:num_pairs]
    return [(int(rows[p]), int(columns[p]), float(values[p])) for p in order if values[p] != 0]


def _checked_weights(weights: npt.ArrayLike) -> _Points:
    """Weights as float64 [n, n]."""
    w = np.asarray(weights, dtype=np.float64)
    if w.ndim != 2 or w.shape[0] != w.shape[1] or w.size == 0:
        raise ValueError(f"weights: expected [n, n] with n >= 1, got {list(w.shape)}")
    if not np.isfinite(w).all():
        raise ValueError("weights: expected finite values, got NaN or infinity")
    return w


def draw_heatmap(
    weights: npt.ArrayLike,
    labels: Sequence[str],
    path: str | Path,
    *,
    title: str = "",
    colorbar_label: str = "attention weight",
    signed: bool | None = None,
    limit: float | None = None,
) -> None:
    """Write a PNG of attention between atoms; the figure grows with their number.

    Signed weights (GeoT's have no softmax) get a diverging map centred at 0, others a sequential
    one from 0. To compare maps, give all of them the same `signed` and `limit`.

    Args:
        weights: [n, n], row i: the query atom, column j: the key atom.
        labels: n names of atoms, as from `atom_labels`.
        path: file to write.
        title: above the map; long ones are wrapped.
        colorbar_label: what the colours mean, with its unit if it has one.
        signed: which of the two maps; default: whether a weight is negative.
        limit: the absolute value at which the colours end; default: the largest.

    Raises:
        ValueError: if weights are not square and finite, labels are not n, or limit is not > 0.
    """
    w = _checked_weights(weights)
    n = len(w)
    if len(labels) != n:
        raise ValueError(f"labels: expected n={n}, got {len(labels)}")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit: expected a number > 0, got {limit}")
    largest = float(np.abs(w).max())
    top = limit or largest or 1.0
    signed = bool((w < 0).any()) if signed is None else signed
    side = _map_side(n)
    figure = Figure(figsize=(side + 2.0, side + 1.2), dpi=_DPI, layout="compressed")
    axes = figure.add_subplot()
    image = axes.imshow(
        w,
        cmap="RdBu_r" if signed else "cividis",
        vmin=-top if signed else 0.0,
        vmax=top,
        interpolation="nearest",
    )
    _label_axes(axes, labels)
    axes.set_title(textwrap.fill(title, max(24, int(side * 9))), parse_math=False, fontsize=11)
    extend = "neither" if largest <= top else "both" if signed else "max"
    bar = figure.colorbar(image, ax=axes, fraction=0.05, aspect=24, extend=extend)
    bar.set_label(colorbar_label)
    _write(figure, path)


def _map_side(n: int) -> float:
    """Side of a heat map in inches: 0.4 an atom if they are few, 0.2 if many, 2.2 to 26 in all."""
    return float(np.clip(n * np.interp(n, [8, 30], [0.4, 0.2]), 2.2, 26.0))


def _label_axes(axes: Axes, labels: Sequence[str]) -> None:
    """Name the atoms on both axes, every k-th where all would not fit."""
    n = len(labels)
    ticks = range(0, n, math.ceil(n / _MAX_LABELS))
    names = [labels[t] for t in ticks]
    size = 9 if n <= 20 else 8
    axes.set_xticks(ticks, names, fontsize=size, rotation=90 if n > 6 else 0)
    axes.set_yticks(ticks, names, fontsize=size)
    axes.set_xlabel("key atom j")
    axes.set_ylabel("query atom i")


def _write(figure: Figure, path: str | Path) -> None:
    """Save as PNG, cut to what is drawn."""
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", bbox_inches="tight", pad_inches=0.15)


def draw_pairs(
    molecule: Chem.Mol | Molecule,
    weights: npt.ArrayLike,
    path: str | Path,
    *,
    num_pairs: int = 5,
    title: str = "",
) -> None:
    """Write a PNG of the structure in 2-D with its strongest pairs of atoms marked.

    The strength of the unordered pair {i, j}, i != j, is |W_ij + W_ji| / 2. Each pair gets a band
    between its atoms, bonded or not: the wider the stronger, red and solid where the mean is
    positive, blue and dashed where it is negative, with its rank on it; a list gives the values.
    Hydrogens are drawn only where they take part in a pair. Atoms are named as by `atom_labels`;
    the disc of one is the darker, the larger the sum of its strengths with all other atoms is, and
    has a ring if it takes part in a pair. Formal charges stand at the upper right.

    Args:
        molecule: with explicit hydrogens; bonds of a `Molecule` are perceived. One without bonds
            is drawn as its coordinates look in their two widest directions.
        weights: [n, n], row i: the query atom, in the molecule's order of atoms.
        path: file to write.
        num_pairs: how many pairs to mark at most.
        title: above the structure; long ones are wrapped.

    Raises:
        ValueError: if weights are not finite [n, n], num_pairs is negative, or a `Molecule` has
            no atoms, an unknown element, or a position that is not finite.
    """
    pairs = strongest_pairs(weights, num_pairs)
    mol = _graph(molecule)
    n = mol.GetNumAtoms()
    if np.shape(weights) != (n, n):
        raise ValueError(f"weights: expected [n={n}, n={n}], got {list(np.shape(weights))}")
    labels = atom_labels([atom.GetAtomicNum() for atom in mol.GetAtoms()])
    charges = [atom.GetFormalCharge() for atom in mol.GetAtoms()]
    marked = {atom for i, j, _ in pairs for atom in (i, j)}
    with rdBase.BlockLogs():
        image, points = _rendered(_sketch(mol, marked))
    figure, axes = _canvas(image, len(pairs) + 4)  # and four lines above them
    _draw_bands(axes, pairs, points, np.array(image.shape[1::-1]))
    _draw_atoms(axes, labels, marked, _atom_shares(weights), points)
    _draw_charges(axes, charges, points)
    _list_pairs(axes, pairs, labels)
    title = textwrap.fill(title, (image.shape[1] + _PANEL_PX) // 15)
    figure.text(0, 1, title, parse_math=False, fontsize=11, va="bottom")
    _write(figure, path)


def _graph(molecule: Chem.Mol | Molecule) -> Chem.Mol:
    """The molecule as a graph with all its atoms."""
    if isinstance(molecule, Chem.Mol):
        return molecule
    mol = perceive_bonds(molecule.numbers, molecule.positions, smiles=molecule.smiles)
    if mol is None:
        raise ValueError("molecule: expected at least one atom, known elements, finite positions")
    return mol


def _sketch(mol: Chem.Mol, marked: set[int]) -> Chem.Mol:
    """The graph to draw: no hydrogens but marked ones, 2-D coordinates, each atom's `_row`."""
    mol = Chem.Mol(mol)
    mol.UpdatePropertyCache(strict=False)
    for row, atom in enumerate(mol.GetAtoms()):
        atom.SetIntProp("_row", row)
        atom.SetAtomMapNum(int(row in marked))  # RemoveHs is told to leave mapped atoms
    rules: Any = Chem.RemoveHsParameters()
    rules.removeMapped = False
    rules.removeDefiningBondStereo = True
    mol = Chem.RemoveHs(mol, rules, sanitize=False)
    for atom in mol.GetAtoms():
        atom.SetAtomMapNum(0)
    _lay_out(mol)
    try:
        return rdMolDraw2D.PrepareMolForDrawing(mol, True, False, False, False)
    except (ValueError, RuntimeError):  # cannot be kekulized
        return rdMolDraw2D.PrepareMolForDrawing(mol, False, False, False, False)


def _lay_out(mol: Chem.Mol) -> None:
    """Give a graph 2-D coordinates; atoms without any bond keep their places in space."""
    Chem.FastFindRings(mol)
    if mol.GetNumBonds() or not mol.GetNumConformers():
        rdDepictor.Compute2DCoords(mol, useRingTemplates=True)
        flat = mol.GetConformer().GetPositions()[:, :2]
    else:
        positions = mol.GetConformer().GetPositions()
        centred = positions - positions.mean(axis=0)
        flat = centred @ np.linalg.svd(centred.T @ centred)[2][:2].T  # the two widest directions
    conformer = Chem.Conformer(mol.GetNumAtoms())
    conformer.Set3D(False)
    for i, (x, y) in enumerate(_spread(flat).tolist()):
        conformer.SetAtomPosition(i, Point3D(x, y, 0.0))
    mol.RemoveAllConformers()
    mol.AddConformer(conformer)


def _spread(flat: _Points) -> _Points:
    """Points [n, 2] with those closer than _APART pushed away from each other."""
    i, j = np.triu_indices(len(flat), k=1)
    angle = np.arange(len(flat))
    nudge = np.stack([np.cos(angle), np.sin(angle)], axis=1)  # [n, 2], gives equal points a way
    for _ in range(_SPREAD_STEPS):
        apart = flat[i] - flat[j]
        dist = np.linalg.norm(apart, axis=1, keepdims=True)
        if dist.min(initial=_APART) > 0.99 * _APART:
            break
        away = np.where(dist > 1e-6, apart / np.maximum(dist, 1e-6), nudge[i] - nudge[j])
        push = np.maximum(_APART - dist, 0.0) / 2 * away
        flat = flat.copy()
        np.add.at(flat, i, push)
        np.add.at(flat, j, -push)
    return flat


def _rendered(sketch: Chem.Mol) -> tuple[npt.NDArray[np.float32], dict[int, _Points]]:
    """RDKit's picture of the bonds, transparent, and where each row's atom is in it, in pixels."""
    xy = sketch.GetConformer().GetPositions()[:, :2]
    low, extent = xy.min(axis=0), np.ptp(xy, axis=0)
    scale = min(_SCALE_PX, (_MAX_SIDE_PX - 2 * _MARGIN_PX) / max(extent.max(), 1e-3))
    margin = _MARGIN_PX / scale
    width, height = (math.ceil(side) for side in (extent + 2 * margin) * scale)
    drawer = rdMolDraw2D.MolDraw2DCairo(width, height)
    options: Any = drawer.drawOptions()  # its stubs forbid assignment
    options.useBWAtomPalette()  # colours are for weights
    options.setBackgroundColour((1.0, 1.0, 1.0, 0.0))
    options.prepareMolsBeforeDrawing = False
    options.noAtomLabels = True
    options.padding = 0.0
    options.bondLineWidth = 2
    drawer.SetScale(width, height, Point2D(*(low - margin)), Point2D(*(low + extent + margin)))
    drawer.DrawMolecule(sketch)
    places = [drawer.GetDrawCoords(k) for k in range(sketch.GetNumAtoms())]
    rows = [atom.GetIntProp("_row") for atom in sketch.GetAtoms()]
    drawer.FinishDrawing()
    image = imread(io.BytesIO(drawer.GetDrawingText()))
    return image, {row: np.array([at.x, at.y]) for row, at in zip(rows, places, strict=True)}


def _canvas(image: npt.NDArray[np.float32], rows: int) -> tuple[Figure, Axes]:
    """A figure with the picture at its own pixels and room at its right for a list of rows."""
    height, width = image.shape[:2]
    full = width + _PANEL_PX, max(height, rows * _ROW_PX)
    figure = Figure(figsize=(full[0] / _DPI, full[1] / _DPI), dpi=_DPI)
    axes = figure.add_axes((0, (1 - height / full[1]) / 2, width / full[0], height / full[1]))
    axes.imshow(image, interpolation="none", zorder=3)
    axes.set_axis_off()
    return figure, axes


def _style(value: float, top: float) -> dict[str, Any]:
    """Colour, width and dashes of a pair's band; `top` is the largest strength."""
    return {
        "color": _POSITIVE if value > 0 else _NEGATIVE,
        "linewidth": 3 + 7 * abs(value) / top,
        "linestyle": "-" if value > 0 else (0, (0.6, 0.4)),
        "alpha": 0.6,
        "solid_capstyle": "butt",
    }


def _draw_bands(
    axes: Axes, pairs: Sequence[Pair], points: dict[int, _Points], size: npt.NDArray[np.int64]
) -> None:
    """Bands between the atoms of each pair below the bonds, the pairs' ranks above them."""
    taken = list(points.values())
    badge = {"boxstyle": "circle,pad=0.2", "facecolor": "white", "linewidth": 0.5}
    for rank, (i, j, value) in enumerate(pairs, start=1):
        band = _curve(points[i], points[j], taken, size)
        axes.add_line(Line2D(*band.T, zorder=2, clip_on=False, **_style(value, abs(pairs[0][2]))))
        x, y = place = _clear_place(band, taken)
        taken.append(place)
        axes.text(x, y, str(rank), fontsize=6, ha="center", va="center", bbox=badge, zorder=6)


def _atom_shares(weights: npt.ArrayLike) -> _Points:
    """Sum of each atom's strengths with all others, [n], as a share of the largest one."""
    w = np.asarray(weights, dtype=np.float64)
    sums = np.abs(w + w.T).sum(axis=1) - 2 * np.abs(np.diag(w))
    shares: _Points = sums / max(sums.max(), np.finfo(np.float64).tiny)
    return shares.clip(0, 1)


def _draw_atoms(
    axes: Axes,
    labels: Sequence[str],
    marked: set[int],
    shares: _Points,
    points: dict[int, _Points],
) -> None:
    """A disc with its name on each atom."""
    for row, (x, y) in points.items():
        face = tuple(1 - shares[row] * (1 - _STRONGEST))
        edge = _RING if row in marked else "none"
        axes.add_patch(Circle((x, y), _ATOM_PX, facecolor=face, edgecolor=edge, zorder=4))
        size = 8 if len(labels[row]) < 4 else 6
        axes.text(x, y, labels[row], fontsize=size, ha="center", va="center_baseline", zorder=5)


def _draw_charges(axes: Axes, charges: Sequence[int], points: dict[int, _Points]) -> None:
    """Formal charges at the edge of the discs: +, 2+, −."""
    for row, (x, y) in points.items():
        if charges[row]:
            count = str(abs(charges[row])) if abs(charges[row]) > 1 else ""
            text = f"{count}{'+' if charges[row] > 0 else '−'}"
            place = x + 0.75 * _ATOM_PX, y - 0.75 * _ATOM_PX
            axes.text(*place, text, fontsize=8, weight="bold", ha="left", va="center", zorder=5)


def _curve(
    start: _Points, end: _Points, taken: Sequence[_Points], size: npt.NDArray[np.int64]
) -> _Points:
    """Points [41, 2] from start to end, bent no more than clears what is taken and the edges."""
    across = (end - start)[::-1] * (-1, 1)
    others = np.array([at for at in taken if at is not start and at is not end]).reshape(-1, 2)
    t = np.linspace(0, 1, 41)[:, None]  # [41, 1]
    best, most = start[None], -math.inf
    for bend in (0.0, 0.25, -0.25, 0.5, -0.5, 0.75, -0.75):
        control = (start + end) / 2 + bend * across
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * control + t**2 * end
        far = np.linalg.norm(curve[6:-6, None] - others, axis=-1)  # the ends stay near by nature
        inside = np.minimum(curve, size - curve).min()
        clear = min(float(far.min(initial=_CLEAR_PX)), _CLEAR_PX + float(inside))
        if clear > most:
            best, most = curve, clear
    return best


def _clear_place(band: _Points, taken: Sequence[_Points]) -> _Points:
    """The point [2] of a band nearest its middle that is clear of what is taken."""
    middle = len(band) // 2
    order = sorted(range(len(band)), key=lambda k: abs(k - middle))
    far = np.linalg.norm(band[order][:, None] - np.array(taken), axis=-1).min(axis=1)
    place: _Points = band[order][np.argmax(far.clip(max=_CLEAR_PX))]  # the first one of the best
    return place


def _list_pairs(axes: Axes, pairs: Sequence[Pair], labels: Sequence[str]) -> None:
    """The ranked pairs with their values at the right of the structure."""
    signed = any(value < 0 for _, _, value in pairs)
    form = "+#.3g" if signed else "#.3g"
    handles = [
        Line2D(
            [],
            [],
            label=f"{rank}  {labels[i]}, {labels[j]}   {value:{form}}",
            **_style(value, abs(pairs[0][2])),
        )
        for rank, (i, j, value) in enumerate(pairs, start=1)
    ]
    axes.legend(
        handles=handles,
        title=_FORMULA + (_SIGN if signed else "") + _DISCS if pairs else "no pairs to mark",
        alignment="left",
        loc="center left",
        bbox_to_anchor=(1.02, 0.5),
        frameon=False,
        handlelength=3.5,
    )
