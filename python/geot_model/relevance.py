"""How strong the relation between two atoms of a molecule is for a trained GeoT, in three ways.

    weight               |P_ij| / Σ_k |P_ik|       a weight's share in its row
    weight x value       |P_ij| ||W_O v_j||        what atom j adds to atom i
    gradient x weight    P_ij ∂y_t/∂P_ij           what that does to target t, to first order

`P` are the weights that multiply the values `v` in a head of a layer, after normalizer and
attention scale, and `W_O` that head's columns of the output projection. Shares and norms tell how
strong a relation is, the gradient also in which direction it moves the output. None of them
changes with `P -> c P`, `v -> v / c`, which is the same network.

A prediction with relations taken out, `deleted`, tells whether the network really uses them.

Source: weight x value: Kobayashi et al., "Attention is Not Only a Weight", EMNLP 2020; gradient x
weight: Shrikumar et al., arXiv 1605.01713, applied to attention weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geot_kernels import FusedGeoAttention, attention_weights
from geot_kernels.table import RadialTable

from .model import GeoT, GeoTLayer
from .molecules import Molecule, Molecules, pad_batch

WEIGHT, VALUE, GRADIENT = METHODS = ("weight", "weight x value", "gradient x weight")

_ENTRIES = 2**21  # of a batch: molecules times pairs of atoms times width


class Pass(NamedTuple):
    """A forward pass with its attention.

    Attributes:
        outputs: `[B, T]`.
        weights: `P [B, H, N, N]` of each layer, 0 on padding.
        values: `v [B, N, H, D]` of each layer.
    """

    outputs: Tensor
    weights: list[Tensor]
    values: list[Tensor]


def forward(
    model: GeoT,
    numbers: Tensor,
    positions: Tensor,
    mask: Tensor | None = None,
    *,
    change: Callable[[Tensor], Tensor] | None = None,
) -> Pass:
    """Computes what `model(numbers, positions, mask)` does, each attention as `W_O (P v) + b_O`.

    Differentiable in the weights that `change` returns; those of later layers, computed from what
    earlier ones gave, depend on them. Parameters of the radial functions, and positions where the
    distances are concerned, count as constants.

    Args:
        model: The network.
        numbers: int `[B, N]`, 0 = padding.
        positions: `[B, N, 3]`, Å.
        mask: bool `[B, N]`, True = real atom; None: `numbers > 0`.
        change: From the weights `[B, H, N, N]` of a layer to those to use; called for one layer
            after the other. None: they stay.

    Raises:
        TypeError: As for `GeoT.forward`.
        ValueError: As for `GeoT.forward`.
    """
    x, layout, types = model._embed(numbers, positions, mask, None, None)
    # Padded rows hold something finite throughout, which weights of 0 keep from all others.
    all_weights, all_values = [], []
    for layer in _layers(model):
        weights, values = _attention(layer.attention, x, positions, layout.mask, types)
        if change is not None:
            weights = change(weights)
        heads = torch.einsum("bhij,bjhd->bihd", weights, values)
        x = layer.update(x, layer.attention.out_proj(heads.flatten(-2)))
        all_weights.append(weights)
        all_values.append(values)
    outputs = model.readout(x, positions, layout) + model.output_offset
    return Pass(outputs, all_weights, all_values)


def _layers(model: GeoT) -> Iterator[GeoTLayer]:
    for layer in model.layers:
        assert isinstance(layer, GeoTLayer)
        yield layer


def _attention(
    attention: FusedGeoAttention,
    x: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    types: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes weights `[B, H, N, N]` and values `[B, N, H, D]` of features `[B, N, E]`."""
    shape = (3, attention.num_heads, attention.head_dim)
    q, k, v = attention.in_proj(x).unflatten(-1, shape).unbind(-3)
    weights = attention_weights(
        q,
        k,
        positions,
        _constant_radial(attention),
        mask=mask,
        atom_types=types,
        score=attention.score,
        normalizer=attention.normalizer,
        attention_scale=attention.attention_scale,
        backend=attention.backend,
    )
    return weights, v


def _constant_radial(attention: FusedGeoAttention) -> RadialTable | Callable[..., Tensor]:
    """The radial function as in inference: a table is made once, and kept by a model in eval()."""
    with torch.no_grad():
        radial = attention._radial()
    return radial if isinstance(radial, RadialTable) else torch.no_grad()(radial)


def relevance(
    model: GeoT, molecules: Molecules, method: str, target: int | str = 0
) -> list[Tensor]:
    """Computes how strong each relation of atoms is, for each layer and head.

        weight               |P_ij| / Σ_k |P_ik|, 0 in a row of zeros
        weight x value       |P_ij| ||W_O v_j||, without the projection's bias
        gradient x weight    P_ij ∂y_t/∂P_ij

    The derivative is exact and whole: that of the output when this one weight of this one layer
    and head changes (after the softmax, if there is one) and all that follows, later weights
    included, is computed anew. It is of the network's output, before `TargetScaler`.

    Args:
        model: The network; nothing of it changes. Fastest in `eval()`.
        molecules: M of them, of elements that the model has.
        method: One of `METHODS`.
        target: Which output, by number, or by name if the model has a `card`; only the gradient
            depends on it.

    Returns:
        For each molecule `[L, H, n, n]`, row i: the query atom (the one that is changed), column
        j: the key atom; in the dtype of the model, on the CPU, without gradients.

    Raises:
        ValueError: The method, the target or an element is not known.
    """
    _check_method(method)
    column = _column(model, target)
    device = model.output_offset.device
    sizes = np.diff(molecules.ptr)
    maps: dict[int, Tensor] = {}
    for rows in _batches(sizes, model.embedding.embedding_dim):
        numbers, positions, mask = (x.to(device) for x in pad_batch(molecules[rows]))
        found = _relevance(model, numbers, positions, mask, method, column).cpu()
        for place, row in enumerate(rows.tolist()):
            n = int(sizes[row])
            maps[row] = found[:, place, :, :n, :n].clone()
    return [maps[row] for row in range(len(molecules))]


def _relevance(
    model: GeoT, numbers: Tensor, positions: Tensor, mask: Tensor, method: str, column: int
) -> Tensor:
    """Computes the maps `[L, B, H, N, N]` of a padded batch."""
    if method == GRADIENT:
        with torch.inference_mode(False), torch.enable_grad():
            one = forward(model, numbers, positions, mask, change=Tensor.requires_grad_)
            gradients = torch.autograd.grad(one.outputs[:, column].sum(), one.weights)
        return torch.stack([p.detach() * dp for p, dp in zip(one.weights, gradients, strict=True)])
    with torch.no_grad():
        one = forward(model, numbers, positions, mask)
        strength = torch.stack(one.weights).abs()
        if method == WEIGHT:
            total = strength.sum(-1, keepdim=True)
            return torch.where(total > 0, strength / total, 0)
        added = [
            _added(layer.attention, values)
            for layer, values in zip(_layers(model), one.values, strict=True)
        ]
        return strength * torch.stack(added).unsqueeze(-2)


def _added(attention: FusedGeoAttention, values: Tensor) -> Tensor:
    """Computes `||W_O^h v_j|| [B, H, N]` of values `[B, N, H, D]`.

    With `W_O^h = Q R`, Q's columns orthonormal, it is `||R v_j||`: D numbers instead of E.
    """
    heads = attention.out_proj.weight.unflatten(1, values.shape[2:]).permute(1, 0, 2)  # [H, E, D]
    triangles = torch.linalg.qr(heads, mode="r").R  # [H, D, D]
    norms: Tensor = torch.einsum("hcd,bjhd->bhjc", triangles, values).norm(dim=-1)
    return norms


def aggregate(maps: Tensor, method: str) -> Tensor:
    """Sums up layers and heads.

        weight               W_ij = mean over l, h of  |P_ij^lh| / Σ_k |P_ik^lh|
        weight x value       W_ij = Σ_lh |P_ij^lh| ||W_O^lh v_j^lh||
        gradient x weight    W_ij = Σ_lh P_ij^lh ∂y_t/∂P_ij^lh, with its sign

    Each row of the first sums to 1. The second bounds the length of what all heads and layers
    together add to atom i from atom j. The third is, to first order, what the output would lose
    without the relation: `y(P) - y(P with P_ij = 0 everywhere)`.

    Args:
        maps: `[L, H, n, n]` of `relevance`.
        method: The one they were made with.

    Returns:
        `W [n, n]`, differentiable.

    Raises:
        ValueError: The method is not known.
    """
    _check_method(method)
    return maps.mean((0, 1)) if method == WEIGHT else maps.sum((0, 1))


def pair_strength(aggregate: Tensor) -> Tensor:
    """Computes the strength of the unordered pair {i, j}: `|W_ij + W_ji| / 2`.

    Signs go last: both directions of a pair are added with their signs, so opposite ones cancel,
    and the strength of their sum is what is left.

    Args:
        aggregate: `W [n, n]`.

    Returns:
        `[n, n]`, symmetric; on the diagonal `|W_ii|`.
    """
    return (aggregate + aggregate.T).abs() / 2


def deleted(model: GeoT, molecule: Molecule, kept: Tensor) -> Tensor:
    """Computes outputs without some of the relations between atoms.

    Where a pair is not kept, `P_ij` is set to 0 in all layers and heads: after softmax and
    attention scale, so the other weights of the row do not grow in its place. Weights of later
    layers are computed from what is left.

    Args:
        model: The network. Fastest in `eval()`.
        molecule: The molecule, of n atoms.
        kept: bool `[S, n, n]`, True = kept, row i: the query atom. The diagonal is the attention
            of atoms to themselves.

    Returns:
        `[S, T]`, of the network itself, before `TargetScaler`; on the CPU, without gradients.

    Raises:
        TypeError: `kept` is not bool.
        ValueError: A shape is wrong, or an element is not known.
    """
    n = len(molecule.numbers)
    if kept.dtype != torch.bool:
        raise TypeError(f"kept: expected bool, got {kept.dtype}")
    if kept.ndim != 3 or kept.shape[1:] != (n, n):
        raise ValueError(f"kept: expected [S, n={n}, n={n}], got {list(kept.shape)}")
    device = model.output_offset.device
    numbers = torch.from_numpy(molecule.numbers).to(device)
    positions = torch.from_numpy(molecule.positions).to(device)
    at_once = max(1, _ENTRIES // max(1, n * n * model.embedding.embedding_dim))
    outputs = []
    with torch.no_grad():
        for some in kept.to(device).split(at_once):
            copies = numbers.expand(len(some), n), positions.expand(len(some), n, 3)
            left = partial(torch.mul, some.unsqueeze(1))
            outputs.append(forward(model, *copies, change=left).outputs)
    return torch.cat(outputs).cpu()


def _batches(sizes: NDArray[np.int64], width: int) -> Iterator[NDArray[np.int64]]:
    """Divides molecules among batches of bounded size, those of like size together."""
    rows: list[int] = []
    for row in np.argsort(sizes, kind="stable").tolist():
        if rows and (len(rows) + 1) * int(sizes[row]) ** 2 * width > _ENTRIES:
            yield np.array(rows, np.int64)
            rows = []
        rows.append(row)
    if rows:
        yield np.array(rows, np.int64)


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")


def _column(model: GeoT, target: int | str) -> int:
    """The place of a target among the outputs."""
    count = len(model.readout.kinds)
    if isinstance(target, str):
        names = () if model.card is None else tuple(model.card.scaler.names)
        if target not in names:
            known = f"one of {', '.join(names)}" if names else "a number: the model has no card"
            raise ValueError(f"target: expected {known}, got {target!r}")
        return names.index(target)
    if not 0 <= target < count:
        raise ValueError(f"target: expected a number from 0 to {count - 1}, got {target}")
    return target
