"""What the operators hand to a backend's launchers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The arguments of `geot::attention`, in its order; backends read, never write them.

    Attributes:
        q: `[B, N, H, D]`, packed `[T, H, D]`; any strides; any floating dtype.
        k: Like `q`.
        v: Like `q`.
        positions: `[B, N, 3]`, packed `[T, 3]`, Å, in the compute dtype (float32; float64 where
            `q` is).
        radial: Compute dtype. A table's knots `[P, G+1, 2, C]`, or Gaussians `[2 + C, K]`:
            centers (Å), gammas (Å⁻²), then the weights of each channel.
        affine: `[P', 2]`, `(m, c)` for each pair of types, compute dtype; None: `z = d`.
        mask: bool `[B, N]`, True = real atom; None: all are. Padded rows may hold anything.
        ptr: int `[B + 1]`; molecule `b` is the rows `ptr[b]:ptr[b+1]`; None: padded layout.
        atom_types: int `[B, N]`, packed `[T]`; there where `pair_index` is.
        pair_index: int `[T, T]`: the pair of two types; None: one pair.
        max_atoms: The largest molecule of a packed batch; -1: not known.
        r_min: Radial coordinate of the first knot, Å.
        r_max: Radial coordinate of the last knot, Å.
        scale: κ.
        score: `"bias"` or `"filter"`.
        normalizer: `"softmax"` or `"linear"`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor
    radial: Tensor
    affine: Tensor | None
    mask: Tensor | None
    ptr: Tensor | None
    atom_types: Tensor | None
    pair_index: Tensor | None
    max_atoms: int
    r_min: float
    r_max: float
    scale: float
    score: str
    normalizer: str


class Tangent(NamedTuple):
    """Cotangents of the six gradients, the tangent of the second backward; None is 0."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    positions: Tensor | None
    radial: Tensor | None
    affine: Tensor | None
