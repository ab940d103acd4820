"""From atoms to molecules: sums over the atoms of padded and packed batches, and the read-outs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

READOUTS = ("pooled", "sum", "mean", "dipole")


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the atoms of a batch are: padded, with a mask, or packed, with pointers.

    Attributes:
        mask: bool `[B, N]`, True = real atom; None where packed.
        ptr: int `[B+1]`, molecule `b` is the rows `ptr[b]:ptr[b+1]`; None where padded.
        max_atoms: Size of the largest packed molecule; None: it is read back.
    """

    mask: Tensor | None
    ptr: Tensor | None = None
    max_atoms: int | None = None

    def counts(self) -> Tensor:
        """Atoms of each molecule: int64 `[B]`."""
        if self.ptr is not None:
            return self.ptr.diff().long()
        assert self.mask is not None
        return self.mask.sum(1)

    def real(self, x: Tensor) -> Tensor:
        """Puts 0 into padded rows: `[B, N, C]` or `[T, C]` to the same."""
        return x if self.mask is None else x.masked_fill(~self.mask.unsqueeze(-1), 0)

    def sum(self, x: Tensor) -> Tensor:
        """Sums over the real atoms of each molecule: `[B, N, C]` or `[T, C]` to `[B, C]`."""
        if self.mask is not None:
            return self.real(x).sum(1)
        molecules = self.counts()
        return x.new_zeros(len(molecules), x.shape[-1]).index_add(0, self.molecule(x), x)

    def mean(self, x: Tensor) -> Tensor:
        """Averages over the real atoms of each molecule, 0 where there are none: `[B, C]`."""
        return self.sum(x) / self.counts().clamp(min=1).unsqueeze(-1)

    def spread(self, y: Tensor, x: Tensor) -> Tensor:
        """Gives each atom what its molecule has: `[B, C]` to `[B, N, C]` or `[T, C]`, as `x`."""
        return y.unsqueeze(1) if self.mask is not None else y[self.molecule(x)]

    def molecule(self, x: Tensor) -> Tensor:
        """The molecule of each packed row of `x`: int64 `[T]`."""
        counts = self.counts()
        index = torch.arange(len(counts), device=x.device)
        return index.repeat_interleave(counts, output_size=x.shape[0])


class Readout(nn.Module):
    """Properties of a molecule from the features of its atoms.

        pooled   y = W_2 elu(W_1 Σ_i x_i + b_1) + b_2         GeoT's own
        sum      y = Σ_i a_i,  a = V_2 elu(V_1 x + c_1) + c_2    for what grows with a molecule
        mean     y = 1/n Σ_i a_i                              for what does not
        dipole   y = |Σ_i (a_i - 1/n Σ_j a_j) r_i|            charges that sum to 0, so that the
                                                              place of the molecule is no matter

    One network makes the outputs of all pooled targets, one the `a` of all others.

    Args:
        embed_dim: Width of the atoms' features.
        hidden: Width of the networks' hidden layer.
        kinds: One of `READOUTS` for each target.
        feed_forward: Makes a network of one hidden layer: inputs, hidden, outputs.

    Raises:
        ValueError: A name is wrong.

    Source: GeoT (Kwak et al., ACS Omega 2023); sums, means and the dipole as in SchNet (Schütt et
    al., J. Chem. Phys. 148, 241722 (2018)).
    """

    def __init__(
        self,
        embed_dim: int,
        hidden: int,
        kinds: Sequence[str],
        feed_forward: Callable[[int, int, int], nn.Module],
    ) -> None:
        super().__init__()
        for kind in kinds:
            if kind not in READOUTS:
                raise ValueError(f"readout: expected one of {', '.join(READOUTS)}, got {kind!r}")
        self.kinds = tuple(kinds)
        pooled = self.kinds.count("pooled")
        atomwise = len(self.kinds) - pooled
        self.pooled = feed_forward(embed_dim, hidden, pooled) if pooled else None
        self.atomwise = feed_forward(embed_dim, hidden, atomwise) if atomwise else None

    def forward(self, x: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """Computes the properties.

        Args:
            x: `[B, N, E]` or packed `[T, E]`. Differentiable, twice.
            positions: `[B, N, 3]` or `[T, 3]`, Å. Differentiable, twice.
            layout: Which atoms belong to which molecule.

        Returns:
            `[B, T]`.
        """
        columns = {}
        if self.pooled is not None:
            columns["pooled"] = self.pooled(layout.sum(x)).unbind(-1)
        if self.atomwise is not None:
            columns["atomwise"] = self.atomwise(x).unbind(-1)
        taken = {name: iter(values) for name, values in columns.items()}
        out = []
        for kind in self.kinds:
            if kind == "pooled":
                out.append(next(taken["pooled"]))
                continue
            values = next(taken["atomwise"]).unsqueeze(-1)  # [..., 1]
            if kind == "sum":
                out.append(layout.sum(values).squeeze(-1))
            elif kind == "mean":
                out.append(layout.mean(values).squeeze(-1))
            else:
                charges = values - layout.spread(layout.mean(values), values)
                places = layout.real(positions).to(charges.dtype)
                out.append(_norm(layout.sum(charges * places)))
        return torch.stack(out, dim=-1)


def _norm(x: Tensor) -> Tensor:
    """Length of vectors `[B, 3]`; its derivatives at 0 are 0."""
    square = x.square().sum(-1)
    zero = square == 0
    return square.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
