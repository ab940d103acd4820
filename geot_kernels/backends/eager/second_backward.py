"""Second backward: the gradients of `Ψ = <dO, Ȯ> + <dr, ṙ>` along the dotted direction.

    ẋ_ij = ẋ_i - ẋ_j,  ḋ_ij = u_ij·ẋ_ij,  ż_ij = m_p ḋ_ij + ṁ_p d_ij + ċ_p
    f̃_c = f_c'(z_ij) ż_ij + ḟ_c(z_ij),    Ȧ_ij = dO_i·v̇_j
    softmax:  ρ_i = Σ_j P_ij Ṡ_ij,   Ṗ_ij = P_ij (Ṡ_ij - ρ_i)
              G_ij = Ṡ_ij (A_ij - δ_i) - ρ_i A_ij + Ȧ_ij,   ε_i = Σ_j P_ij G_ij
              S̄_ij = P_ij (G_ij - ε_i)
    linear:   Ṗ_ij = Ṡ_ij,   S̄_ij = Ȧ_ij

`E` pulls back on the tangent `Ṡ`, `S̄` on `S`. In names, a dotted quantity ends in `_dot`, a
barred one in `_bar`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...reference import mask_keys
from ...table import radial_coordinate
from ..inputs import Inputs, Tangent
from .backward import Coefficients
from .pair import Batch, Block, GeometryGradient


def attention_bwd_bwd(
    inputs: Inputs,
    tangent: Tangent,
    d_out: Tensor | None,
    d_row: Tensor | None,
    out: Tensor,
    row: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Computes those gradients of `(d_out, d_row, *six inputs)` that `needs` asks for."""
    batch = Batch(inputs, tangent.radial)
    pulled = [None if x is None else batch.load(x) for x in (d_out, d_row)]
    q_dot, k_dot, v_dot, x_dot = (None if x is None else batch.load(x) for x in tangent[:4])
    grad_d_out, gq, gk, gv = (batch.zeros(*batch.q.shape) for _ in range(4))
    grad_d_row = batch.zeros(*batch.q.shape[:3])
    d_radial = batch.zeros(*inputs.radial.shape)
    geometry = GeometryGradient(batch)
    for block in batch.blocks():
        at, keys, q, k = block.at, block.keys, block.q, block.k
        dot = _BlockTangent(block, q_dot, k_dot, v_dot, x_dot, tangent.affine)
        d_out_i, d_row_i = (None if x is None else x[at] for x in pulled)
        radial = block.radial()
        f, f1 = radial.value(), radial.slope()
        f_dot = _sum(None if dot.z is None else f1 * dot.z.unsqueeze(-1), radial.tangent())
        c = Coefficients(block, f, d_out_i, d_row_i)
        s_dot = dot.scores(f, f_dot)
        a_dot = None
        if d_out_i is not None and dot.v is not None:
            a_dot = torch.einsum("bihd,bjhd->bhij", d_out_i, dot.v)
        weights_dot, s_bar = _normalizer_tangent(block, c, s_dot, a_dot)

        grad_d_out[at] = torch.einsum("bhij,bjhd->bihd", weights_dot, block.v)
        if dot.v is not None:
            grad_d_out[at] += torch.einsum("bhij,bjhd->bihd", c.weights, dot.v)
        grad_d_row[at] = weights_dot.sum(-1).transpose(1, 2)
        if d_out_i is not None:
            gv[keys] += torch.einsum("bhij,bihd->bjhd", weights_dot, d_out_i)

        gq[at] = block.pull_q(s_bar, k, f)
        gk[keys] += block.pull_k(s_bar, q, f)
        g_bar, g_dot = block.pull_f(s_bar, q, k), block.pull_f(c.e, q, k)
        if dot.k is not None:
            gq[at] += block.pull_q(c.e, dot.k, f)
        if dot.q is not None:
            gk[keys] += block.pull_k(c.e, dot.q, f)
        if inputs.score == "filter":
            if f_dot is not None:
                gq[at] += block.pull_q(c.e, k, f_dot)
                gk[keys] += block.pull_k(c.e, q, f_dot)
            if dot.q is not None:
                g_bar = g_bar + block.pull_f(c.e, dot.q, k)
            if dot.k is not None:
                g_bar = g_bar + block.pull_f(c.e, q, dot.k)

        if needs[6]:
            radial.add_adjoint(d_radial, g_bar, None if f_dot is None else g_dot, dot.z)
        if needs[5] or needs[7]:
            f1_dot = radial.tangent_slope()
            if dot.z is not None:
                f1_dot = _sum(f1_dot, radial.curvature() * dot.z.unsqueeze(-1))
            b_bar = (g_bar * f1).sum(-1)
            if f1_dot is not None:
                b_bar = b_bar + (g_dot * f1_dot).sum(-1)
            _add_geometry(geometry, block, dot, b_bar, (g_dot * f1).sum(-1))
    dtype = inputs.q.dtype
    gradients = (
        batch.store(grad_d_out, dtype),
        batch.store(grad_d_row, batch.dtype),
        *(batch.store(x, dtype) for x in (gq, gk, gv)),
        batch.store(geometry.positions, batch.dtype),
        d_radial,
        geometry.affine,
    )
    return [x for x, wanted in zip(gradients, needs, strict=True) if wanted and x is not None]


class _BlockTangent:
    """The dotted quantities of a block: rows of `q̇`, all `k̇`, `v̇`, and `ẋ_ij`, `ḋ`, `ż`."""

    def __init__(
        self,
        block: Block,
        q_dot: Tensor | None,
        k_dot: Tensor | None,
        v_dot: Tensor | None,
        x_dot: Tensor | None,
        affine_dot: Tensor | None,
    ) -> None:
        self._block = block
        self.q = None if q_dot is None else q_dot[block.at]
        self.k = None if k_dot is None else k_dot[block.keys]
        self.v = None if v_dot is None else v_dot[block.keys]
        self.x: Tensor | None = None  # ẋ_ij [b, I, J, 3]
        self.d: Tensor | None = None  # ḋ_ij [b, I, J]
        self.z: Tensor | None = None  # ż_ij [b, I, J]
        self.m: Tensor | None = None  # ṁ_p, where it is not 0
        if x_dot is not None:
            self.x = x_dot[block.at][:, :, None] - x_dot[block.keys][:, None]
            self.d = (block.direction * self.x).sum(-1)
            self.z = self.d if block.m is None else block.m * self.d
        if affine_dot is not None:
            moved, self.m = radial_coordinate(block.dist, affine_dot, block.pair)
            self.z = _sum(self.z, moved)

    def scores(self, f: Tensor, f_dot: Tensor | None) -> Tensor:
        """`Ṡ [b, H, I, J]`."""
        block = self._block
        s_dot = None
        if self.q is not None:
            s_dot = block.products(self.q, block.k, f)
        if self.k is not None:
            s_dot = _sum(s_dot, block.products(block.q, self.k, f))
        if f_dot is not None and block.batch.score == "bias":
            s_dot = _sum(s_dot, f_dot.permute(0, 3, 1, 2))
        elif f_dot is not None:
            s_dot = _sum(s_dot, block.products(block.q, block.k, f_dot))
        if s_dot is None:
            heads = block.q.shape[2]
            return f.new_zeros(len(f), heads, *f.shape[1:3])
        return s_dot


def _normalizer_tangent(
    block: Block, c: Coefficients, s_dot: Tensor, a_dot: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Computes `Ṗ` and `S̄ [b, H, I, J]`."""
    if block.batch.inputs.normalizer == "linear":
        s_bar = torch.zeros_like(s_dot) if a_dot is None else mask_keys(a_dot, block.mask)
        return mask_keys(s_dot, block.mask), s_bar
    rho = (c.weights * s_dot).sum(-1, keepdim=True)
    g = s_dot * (c.a - c.delta) - rho * c.a
    if a_dot is not None:
        g = g + a_dot
    epsilon = (c.weights * g).sum(-1, keepdim=True)
    return c.weights * (s_dot - rho), c.weights * (g - epsilon)


def _add_geometry(
    geometry: GeometryGradient, block: Block, dot: _BlockTangent, b_bar: Tensor, e_dot: Tensor
) -> None:
    """Adds what `b̄` on `z` and `ẽ` on `ż` give to the positions and the affine map."""
    along = b_bar if block.m is None else block.m * b_bar
    if dot.m is not None:
        along = along + dot.m * e_dot
    w = along.unsqueeze(-1) * block.direction
    dm = b_bar * block.dist
    if dot.x is not None and dot.d is not None:
        across = torch.where(block.dist > 0, e_dot / block.dist, 0)
        if block.m is not None:
            across = block.m * across
        w = w + across.unsqueeze(-1) * (dot.x - block.direction * dot.d.unsqueeze(-1))
        dm = dm + e_dot * dot.d
    geometry.add_forces(block, w)
    geometry.add_affine(block, dm, b_bar)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
