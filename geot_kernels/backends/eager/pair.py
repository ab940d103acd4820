"""What the passes share: blocks of pairs, their geometry, and the adjoints of score and distance.

A block is the rows `i` of some molecules against all atoms `j` of the same molecules. Shapes:
`b` molecules of the block, `I` its rows, `J` atoms, as many as its largest molecule has.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from ...reference import PackedRows, compute_dtype, distances, products, scores, zero_padding
from ...table import radial_coordinate
from ..inputs import Inputs
from .radial import Gaussians, Table, differences

_BLOCK_ELEMENTS = 1 << 21  # of a `[b, I, J, C]` tensor: 8 MB in float32


class Batch:
    """The operator's inputs, padded, in the compute dtype, with 0 in padded rows."""

    def __init__(self, inputs: Inputs, radial_dot: Tensor | None = None) -> None:
        self.inputs = inputs
        self.radial, self.radial_dot = inputs.radial, radial_dot
        if inputs.radial.ndim == 4:
            self.radial = differences(inputs.radial)
            self.radial_dot = None if radial_dot is None else differences(radial_dot)
        self.dtype = compute_dtype(inputs.q.dtype)
        self.score, self.scale = inputs.score, inputs.scale
        self.packed: PackedRows | None = None
        self.mask = inputs.mask
        if inputs.ptr is not None:
            max_atoms = None if inputs.max_atoms < 0 else inputs.max_atoms
            self.packed = PackedRows(inputs.ptr, max_atoms, len(inputs.q))
            self.mask = self.packed.mask
        self.q, self.k, self.v, self.x = (self.load(t) for t in inputs[:4])  # [B, N, ...]
        self.types = None if inputs.atom_types is None else self._pad(inputs.atom_types).long()

    def load(self, x: Tensor) -> Tensor:
        """Brings a tensor like `q` or `positions` into `[B, N, ...]`, 0 in padded rows."""
        return self._pad(x).to(self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        """A sum to fill, in the compute dtype."""
        return self.q.new_zeros(shape)

    def store(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The way back, with 0 in padded rows."""
        x = zero_padding(x, self.mask)
        return (x if self.packed is None else self.packed.unpad(x)).to(dtype)

    def _pad(self, x: Tensor) -> Tensor:
        return zero_padding(x, self.mask) if self.packed is None else self.packed.pad(x)

    def blocks(self) -> Iterator[Block]:
        """Yields the blocks that cover all rows, none larger than its largest molecule."""
        sizes = self._sizes()
        channels = max(self.inputs.radial.shape[-1], self.q.shape[2], 1)
        first = 0
        while first < len(sizes):
            last, atoms = first, sizes[first]
            while last + 1 < len(sizes):
                grown = max(atoms, sizes[last + 1])
                if (last + 2 - first) * grown * grown * channels > _BLOCK_ELEMENTS:
                    break
                last, atoms = last + 1, grown
            rows = max(_BLOCK_ELEMENTS // max(atoms * channels, 1), 1)
            for i in range(0, atoms, rows):
                yield Block(self, slice(first, last + 1), slice(i, min(i + rows, atoms)), atoms)
            first = last + 1

    def _sizes(self) -> list[int]:
        """Up to its last real atom, each molecule's rows; read back from the device."""
        num_molecules, num_atoms = self.q.shape[:2]
        if self.mask is None or num_atoms == 0:
            return [num_atoms] * num_molecules
        place = torch.arange(1, num_atoms + 1, device=self.mask.device)
        sizes: list[int] = (self.mask * place).amax(1).tolist()
        return sizes


class Block:
    """Some rows of some molecules: their slices, geometry and radial function.

    `at` are the rows `i`, `keys` the atoms `j` of a `[B, N, ...]` tensor.
    """

    def __init__(self, batch: Batch, molecules: slice, rows: slice, atoms: int) -> None:
        inputs = batch.inputs
        self.batch, self.at, self.keys = batch, (molecules, rows), (molecules, slice(atoms))
        self.q, self.k, self.v = batch.q[self.at], batch.k[self.keys], batch.v[self.keys]
        self.mask = None if batch.mask is None else batch.mask[self.keys]  # [b, J]
        self.x_i, self.x_j = batch.x[self.at], batch.x[self.keys]
        self.dist = distances(self.x_i, self.x_j)  # [b, I, J]
        self.pair: Tensor | None = None  # [b, I, J]
        if inputs.pair_index is not None and batch.types is not None:
            types_i, types_j = batch.types[self.at], batch.types[self.keys]
            self.pair = inputs.pair_index.long()[types_i[:, :, None], types_j[:, None, :]]
        self.z, self.m = radial_coordinate(self.dist, inputs.affine, self.pair)

    def radial(self) -> Table | Gaussians:
        """The radial function at the block's pairs, with the tangent of its parameters."""
        radial, dot, inputs = self.batch.radial, self.batch.radial_dot, self.batch.inputs
        if radial.ndim == 2:
            return Gaussians(radial, self.z, dot)
        pair = self.pair if len(radial) > 1 else None
        return Table(radial, self.z, pair, inputs.r_min, inputs.r_max, dot)

    @cached_property
    def direction(self) -> Tensor:
        """`u_ij [b, I, J, 3]`, 0 where the distance is 0."""
        apart = self.x_i[:, :, None] - self.x_j[:, None]
        return apart / torch.where(self.dist > 0, self.dist, 1).unsqueeze(-1)

    def scores(self, f: Tensor) -> Tensor:
        """`S [b, H, I, J]`."""
        return scores(self.q, self.k, f, self.batch.score, self.batch.scale)

    def products(self, q: Tensor, k: Tensor, f: Tensor) -> Tensor:
        """The score's product of `q [b, I, H, D]`, `k [b, J, H, D]` and `f [b, I, J, C]`."""
        return products(q, k, f, self.batch.score, self.batch.scale)

    def pull_q(self, e: Tensor, k: Tensor, f: Tensor) -> Tensor:
        """Adjoint of `products` in `q`: `κ Σ_j E_ij k_j [f]`, `[b, I, H, D]`."""
        if self.batch.score == "bias":
            return self.batch.scale * torch.einsum("bhij,bjhd->bihd", e, k)
        return self.batch.scale * (_spread(e) * _by_head(f, k) * k[:, None]).sum(2)

    def pull_k(self, e: Tensor, q: Tensor, f: Tensor) -> Tensor:
        """Adjoint of `products` in `k`: `κ Σ_i E_ij q_i [f]`, `[b, J, H, D]`."""
        if self.batch.score == "bias":
            return self.batch.scale * torch.einsum("bhij,bihd->bjhd", e, q)
        return self.batch.scale * (_spread(e) * _by_head(f, q) * q[:, :, None]).sum(1)

    def pull_f(self, e: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Adjoint of `scores` in `f`: `E_ij`, of a filter `κ E_ij q_ic k_jc`: `[b, I, J, C]`."""
        if self.batch.score == "bias":
            return e.permute(0, 2, 3, 1)
        g = self.batch.scale * _spread(e) * q[:, :, None] * k[:, None]
        return g.flatten(-2)


def _spread(e: Tensor) -> Tensor:
    return e.permute(0, 2, 3, 1).unsqueeze(-1)  # [b, I, J, H, 1]


def _by_head(f: Tensor, like: Tensor) -> Tensor:
    heads: Tensor = f.unflatten(-1, like.shape[2:])  # [b, I, J, H, D]
    return heads


class GeometryGradient:
    """Sums what the pairs give to the positions and to the affine map."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.positions = batch.zeros(*batch.x.shape)
        affine = batch.inputs.affine
        self.affine = None if affine is None else batch.zeros(*affine.shape)

    def add_forces(self, block: Block, w: Tensor) -> None:
        """Adds `w_ij [b, I, J, 3]` to atom `i` and takes it from atom `j`."""
        self.positions[block.at] += w.sum(2)
        self.positions[block.keys] -= w.sum(1)

    def add_affine(self, block: Block, dm: Tensor, dc: Tensor) -> None:
        """Adds the pairs' `dm`, `dc [b, I, J]` to their pair of types."""
        if self.affine is None:
            return
        terms = torch.stack((dm, dc), -1).flatten(0, -2)
        pair = terms.new_zeros(len(terms), dtype=torch.int64)
        self.affine.index_add_(0, pair if block.pair is None else block.pair.flatten(), terms)
