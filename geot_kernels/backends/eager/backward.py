"""First backward: the gradients of `(q, k, v, positions, radial, affine)`.

    A_ij = dO_i·v_j + dr_i
    softmax:  δ_i = Σ_j P_ij A_ij,  E_ij = P_ij (A_ij - δ_i)        linear:  E_ij = A_ij

`E` is the gradient of the scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...reference import mask_keys, normalize
from ..inputs import Inputs
from .pair import Batch, Block, GeometryGradient


class Coefficients:
    """`P`, `A`, `δ` and `E [b, H, I, J]` of a block, which both backward passes start from."""

    def __init__(
        self, block: Block, f: Tensor, d_out: Tensor | None, d_row: Tensor | None
    ) -> None:
        normalizer = block.batch.inputs.normalizer
        self.weights = normalize(block.scores(f), block.mask, normalizer)
        self.a = torch.zeros_like(self.weights)
        if d_out is not None:
            self.a = torch.einsum("bihd,bjhd->bhij", d_out, block.v)
        if d_row is not None:
            self.a = self.a + d_row.transpose(1, 2).unsqueeze(-1)
        if normalizer == "softmax":
            self.delta = (self.weights * self.a).sum(-1, keepdim=True)
            self.e = self.weights * (self.a - self.delta)
        else:
            self.e = mask_keys(self.a, block.mask)


def attention_bwd(
    inputs: Inputs,
    d_out: Tensor | None,
    d_row: Tensor | None,
    out: Tensor,
    row: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Computes those of the six gradients that `needs` asks for, each like its tensor."""
    batch = Batch(inputs)
    d_out = None if d_out is None else batch.load(d_out)
    d_row = None if d_row is None else batch.load(d_row)
    dq, dk, dv = (batch.zeros(*batch.q.shape) for _ in range(3))
    d_radial = batch.zeros(*inputs.radial.shape)
    geometry = GeometryGradient(batch)
    for block in batch.blocks():
        radial = block.radial()
        f = radial.value()
        rows = [None if x is None else x[block.at] for x in (d_out, d_row)]
        c = Coefficients(block, f, *rows)
        dq[block.at] = block.pull_q(c.e, block.k, f)
        dk[block.keys] += block.pull_k(c.e, block.q, f)
        if d_out is not None:
            dv[block.keys] += torch.einsum("bhij,bihd->bjhd", c.weights, d_out[block.at])
        g = block.pull_f(c.e, block.q, block.k)
        if needs[4]:
            radial.add_adjoint(d_radial, g, None, block.z)
        if needs[3] or needs[5]:
            b = (g * radial.slope()).sum(-1)  # dL/dz
            geometry.add_affine(block, b * block.dist, b)
            slope = b if block.m is None else block.m * b
            geometry.add_forces(block, slope.unsqueeze(-1) * block.direction)
    dtype = inputs.q.dtype
    gradients = (
        *(batch.store(x, dtype) for x in (dq, dk, dv)),
        batch.store(geometry.positions, batch.dtype),
        d_radial,
        geometry.affine,
    )
    return [x for x, wanted in zip(gradients, needs, strict=True) if wanted and x is not None]
