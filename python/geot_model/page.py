"""One HTML file that shows maps between atoms: in 3-D, as tables, and as heat maps.

The file needs nothing else, no network and no server, so it can be mailed: 3Dmol.js, our own
script (`assets/page.js`) and the data are in it. Of each map [L, H, n, n] it has whole numbers
from -127 to 127 times a scale for each layer and head, compressed, and the aggregate in float32.
Names and SMILES are data: they reach the page as JSON without `<`, and as text from there.
"""

from __future__ import annotations

import base64
import html
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem

_STEPS = 127  # of an int8
_MOST_NUMBERS = 13_000_000  # on a page: a byte each, 4/3 in base64: 17 MB if nothing packs
_MOST_MOLECULES = 50  # on a page

_PARTS = {"style": "page.css", "viewer": "3Dmol-min.js", "script": "page.js"}
_PRECISION = (
    f"In this page, a single layer or head is exact to 1/{2 * _STEPS} of its largest value; "
    "the .npz files have all digits."
)
_WITHOUT_HEADS = (
    " To keep this page small, single heads of some methods are only in the .npz files."
)


@dataclass(frozen=True)
class Method:
    """A way to weigh pairs of atoms, as the page names and explains it.

    Attributes:
        name: What it is called.
        formula: Of the aggregate A_ij.
        meaning: In plain words.
        mean: Whether the aggregate is the mean over layers and heads, else it is the sum.
        signed: Whether values have signs.
        targets: The targets, each with a map of its own, as (name, unit); () for one map of all.
    """

    name: str
    formula: str
    meaning: str
    mean: bool
    signed: bool
    targets: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Row:
    """A prediction as the page shows it.

    Attributes:
        target: The property.
        value: As text.
        known: A known value, as text, or None.
        unit: Of both, or "".
    """

    target: str
    value: str
    known: str | None
    unit: str


@dataclass(frozen=True, eq=False)
class Entry:
    """A molecule on a page.

    Attributes:
        name: What it is called.
        formula: Its sum formula.
        labels: Names of its n atoms.
        graph: Atoms in that order, bonds, and a conformer.
        predictions: One of each property.
        maps: `[L, H, n, n]` in the order of the methods, of a method in that of its targets.
    """

    name: str
    formula: str
    labels: Sequence[str]
    graph: Chem.Mol
    predictions: Sequence[Row]
    maps: Sequence[NDArray[np.float32]]


@dataclass(frozen=True)
class Part:
    """The molecules of one page.

    Attributes:
        rows: Which ones.
        whole: Whether there is room for the single heads of each method.
    """

    rows: range
    whole: tuple[bool, ...]


def divide(sizes: Sequence[int], layers: int, heads: int, methods: Sequence[Method]) -> list[Part]:
    """Divide molecules into pages of at most 50 of them, and 13,000,000 numbers.

    Where single heads need more, methods with a map for each target lose them first, then all.

    Args:
        sizes: Atoms of each molecule.
        layers: Of the model.
        heads: Of a layer.
        methods: What is shown of each molecule.
    """
    counts = [max(1, len(method.targets)) for method in methods]
    pairs = [size**2 for size in sizes]
    parts = []
    first = 0
    while first < len(sizes):
        last, numbers = first, 0
        while last < len(sizes) and last - first < _MOST_MOLECULES:
            numbers += sum(counts) * layers * pairs[last]
            if numbers > _MOST_NUMBERS and last > first:
                break
            last += 1
        one_map = layers * heads * sum(pairs[first:last])
        for whole in ([True] * len(methods), [not method.targets for method in methods]):
            if one_map * sum(c for c, w in zip(counts, whole, strict=True) if w) <= _MOST_NUMBERS:
                break
        else:
            whole = [False] * len(methods)
        parts.append(Part(range(first, last), tuple(whole)))
        first = last
    return parts


def write_page(
    molecules: Sequence[Mapping[str, Any]],
    methods: Sequence[Method],
    path: str | Path,
    *,
    heads: int,
    title: str,
    method: str,
    target: int = 0,
    num_pairs: int,
    problems: Sequence[str] = (),
    links: Sequence[tuple[str, str]] = (),
) -> None:
    """Write a page.

    Args:
        molecules: What `encode` made of them, at least one, all of one model.
        methods: What their maps are.
        path: The file.
        heads: Of a layer of the model.
        title: Above the page.
        method: The name of the one that is shown first.
        target: Which one of a method that has a map for each.
        num_pairs: How many pairs are shown at first.
        problems: Lines to list at the end.
        links: Names and files of all pages, where there are several.

    Raises:
        ValueError: There is no molecule, or no such method.
        OSError: The file cannot be written.
    """
    names = [one.name for one in methods]
    if method not in names:
        raise ValueError(f"method: expected one of {', '.join(names)}, got {method!r}")
    if not molecules:
        raise ValueError("molecules: expected at least one, got none")
    path = Path(path)
    scales = [one["scales"] for one in molecules[0]["maps"]]
    whole = all(len(layer) == heads for layers in scales for layer in layers)
    content = {
        "layers": len(scales[0]),
        "heads": heads,
        "method": names.index(method),
        "target": target,
        "pairs": num_pairs,
        "methods": _method_content(methods),
        "molecules": molecules,
        "precision": _PRECISION + ("" if whole else _WITHOUT_HEADS),
        "problems": list(problems),
        "pages": [{"name": name, "file": file, "here": file == path.name} for name, file in links],
    }
    path.write_text(_fill(title, content), encoding="utf-8")


def _method_content(methods: Sequence[Method]) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    first = 0
    for one in methods:
        targets = [{"name": name, "unit": unit} for name, unit in one.targets]
        content.append({**vars(one), "targets": targets, "first": first})
        first += max(1, len(targets))
    return content


def encode(entry: Entry, methods: Sequence[Method], whole: Sequence[bool]) -> dict[str, Any]:
    """Turn a molecule and its maps into what is on the page: plain values, numbers compressed.

    Args:
        entry: The molecule.
        methods: What its maps are.
        whole: Whether each method shows single heads, as `divide` says.

    Raises:
        ValueError: There are not as many maps as the methods have.
    """
    graph = entry.graph
    apart = Chem.GetDistanceMatrix(graph)
    bonds = [
        [bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), round(bond.GetBondTypeAsDouble())]
        for bond in graph.GetBonds()
    ]
    kinds = [k for k, method in enumerate(methods) for _ in range(max(1, len(method.targets)))]
    return {
        "name": entry.name,
        "formula": entry.formula,
        "labels": list(entry.labels),
        "elements": [atom.GetSymbol() for atom in graph.GetAtoms()],
        "positions": np.round(_turned(graph.GetConformer().GetPositions()), 3).tolist(),
        "bonds": bonds,
        "apart": np.where(apart > len(apart), -1, apart).astype(int).ravel().tolist(),
        "predictions": [vars(row) for row in entry.predictions],
        "maps": [
            _map_content(one, methods[kind].mean, whole[kind])
            for one, kind in zip(entry.maps, kinds, strict=True)
        ],
    }


def _turned(positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Positions [n, 3] with their widest direction along x, and their narrowest along z."""
    centred = positions - positions.mean(axis=0)
    axes = np.linalg.svd(centred.T @ centred)[2]
    axes[2] = np.cross(axes[0], axes[1])  # right-handed, so this is no mirror image
    turned: NDArray[np.float64] = centred @ axes.T
    return turned


def _map_content(maps: NDArray[np.float32], mean: bool, whole: bool) -> dict[str, Any]:
    """One map as it is in the page: whole numbers, their scales, and the aggregate."""
    aggregate = maps.mean(axis=(0, 1)) if mean else maps.sum(axis=(0, 1))
    if not whole:
        maps = maps.mean(axis=1, keepdims=True) if mean else maps.sum(axis=1, keepdims=True)
    scales = np.abs(maps).max(axis=(2, 3)) / _STEPS  # [L, H or 1]
    steps = np.rint(maps / np.where(scales > 0, scales, 1)[..., None, None]).astype(np.int8)
    return {
        "scales": [[float(f"{scale:.6g}") for scale in row] for row in scales.tolist()],
        "packed": _packed(steps),
        "aggregate": _packed(aggregate.astype("<f4")),
    }


def _packed(array: NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(array.tobytes(), 9)).decode()


def _fill(title: str, content: Mapping[str, Any]) -> str:
    """Put everything into the page."""
    assets = resources.files(__package__) / "assets"
    read = {name: (assets / file).read_text(encoding="utf-8") for name, file in _PARTS.items()}
    parts = {
        **read,
        "title": html.escape(title),
        "data": _json(content),
    }
    template = (assets / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def _json(content: Mapping[str, Any]) -> str:
    """JSON that is safe inside a script element: no `<`, so neither its end nor a comment."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
