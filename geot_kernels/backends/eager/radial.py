"""The radial function at a block's pairs: derivatives, tangents and adjoints.

`Table` and `Gaussians` both give `f`, `f'`, `f''` at `z`, the tangent `ḟ` along their parameters'
dotted direction with its derivative in `z`, and the adjoint: of the weight `g` on `f(z)` and of
the weight `g̃` on the tangent `f̃ = f'(z) ż + ḟ(z)`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ...radial import gaussians
from ...table import hermite, hermite_curvature, hermite_slope, knot_rows, locate


def differences(knots: Tensor) -> Tensor:
    """Rows `(y_g, s_g, y_{g+1} - y_g, s_{g+1})` of each interval: `[P, G, 4, C]`.

    Differences of neighbours lose nothing; those of their weighted sums cost float32 a digit.
    """
    here, there = knots[:, :-1], knots[:, 1:]  # [P, G, 2, C]
    rows = (here[:, :, 0], here[:, :, 1], there[:, :, 0] - here[:, :, 0], there[:, :, 1])
    return torch.stack(rows, 2)


class Table:
    """A spline table at `z [...]`, from the `differences` of its knots and of their tangent."""

    def __init__(
        self,
        steps: Tensor,
        z: Tensor,
        pair: Tensor | None,
        r_min: float,
        r_max: float,
        dot: Tensor | None,
    ) -> None:
        intervals = steps.shape[1]
        self._steps = steps.flatten(0, 2)  # [P * G * 4, C]
        self._steps_dot = None if dot is None else dot.flatten(0, 2)
        g, self._t = locate(z, r_min, r_max, intervals)
        self._knot_rows = knot_rows(g, pair, intervals + 1)  # [..., 4]
        interval = g if pair is None else pair * intervals + g
        self._step_rows = 4 * interval.unsqueeze(-1) + torch.arange(4, device=z.device)
        inside = (z >= r_min) & (z <= r_max)  # constant beyond
        self._per_h = inside.to(z.dtype).unsqueeze(-1) * (intervals / (r_max - r_min))

    def value(self) -> Tensor:
        """`f [..., C]`."""
        return self._combine(self._steps, hermite(self._t), 1)

    def slope(self) -> Tensor:
        """`f' [..., C]`."""
        return self._combine(self._steps, hermite_slope(self._t) * self._per_h, 0)

    def curvature(self) -> Tensor:
        """`f'' [..., C]`."""
        return self._combine(self._steps, hermite_curvature(self._t) * self._per_h**2, 0)

    def tangent(self) -> Tensor | None:
        """`ḟ [..., C]`, or None where the parameters have no tangent."""
        if self._steps_dot is None:
            return None
        return self._combine(self._steps_dot, hermite(self._t), 1)

    def tangent_slope(self) -> Tensor | None:
        """`ḟ' [..., C]`, or None."""
        if self._steps_dot is None:
            return None
        return self._combine(self._steps_dot, hermite_slope(self._t) * self._per_h, 0)

    def add_adjoint(
        self, grad: Tensor, g: Tensor, g_dot: Tensor | None, z_dot: Tensor | None
    ) -> None:
        """Adds to `grad`, shaped like the knots, what `g` and `g_dot [..., C]` weigh."""
        self._scatter(grad, hermite(self._t), g)
        if g_dot is not None and z_dot is not None:
            weights = hermite_slope(self._t) * self._per_h * z_dot.unsqueeze(-1)
            self._scatter(grad, weights, g_dot)

    def _combine(self, steps: Tensor, weights: Tensor, first: int) -> Tensor:
        """Sums four rows; `first` is what the weights of `y_g` and `y_{g+1}` add up to."""
        weights[..., 0] = first
        summed = embedding_bag(
            self._step_rows.view(-1, 4), steps, per_sample_weights=weights.view(-1, 4), mode="sum"
        )
        return summed.view(*self._t.shape, -1)

    def _scatter(self, grad: Tensor, weights: Tensor, g: Tensor) -> None:
        terms = (weights.unsqueeze(-1) * g.unsqueeze(-2)).flatten(0, -2)  # [pairs * 4, C]
        grad.flatten(0, 2).index_add_(0, self._knot_rows.flatten(), terms)


class Gaussians:
    """`f_c(z) = Σ_k w_ck φ_k`, `φ_k = exp(-γ_k (z - μ_k)²)`, from `[2 + C, K]` at `z [...]`."""

    def __init__(self, parameters: Tensor, z: Tensor, dot: Tensor | None) -> None:
        center, self._gamma, self._w = parameters[0], parameters[1], parameters[2:]
        self._dot = dot
        self._e = z.unsqueeze(-1) - center  # [..., K]
        self._phi = gaussians(z, center, self._gamma)

    # Derivatives of φ by z (so minus those by μ) and γ, [..., K] each. Far away φ is 0, and times
    # φ come first the powers of e, which overflow.
    def _phi_z(self) -> Tensor:
        return -2 * self._gamma * self._e * self._phi

    def _phi_zz(self) -> Tensor:
        return -2 * self._gamma * (self._phi + self._e * self._phi_z())

    def _phi_g(self) -> Tensor:
        return -self._e * (self._e * self._phi)

    def _phi_zg(self) -> Tensor:
        return -2 * (self._e * self._phi + self._gamma * self._e * self._phi_g())

    def _phi_gg(self) -> Tensor:
        return -self._e * (self._e * self._phi_g())

    def value(self) -> Tensor:
        """`f [..., C]`."""
        return self._phi @ self._w.T

    def slope(self) -> Tensor:
        """`f' [..., C]`."""
        return self._phi_z() @ self._w.T

    def curvature(self) -> Tensor:
        """`f'' [..., C]`."""
        return self._phi_zz() @ self._w.T

    def tangent(self) -> Tensor | None:
        """`ḟ [..., C]`, or None where the parameters have no tangent."""
        if self._dot is None:
            return None
        center, gamma, w = self._dot[0], self._dot[1], self._dot[2:]
        moved = self._phi_g() * gamma - self._phi_z() * center
        return self._phi @ w.T + moved @ self._w.T

    def tangent_slope(self) -> Tensor | None:
        """`ḟ' [..., C]`, or None."""
        if self._dot is None:
            return None
        center, gamma, w = self._dot[0], self._dot[1], self._dot[2:]
        moved = self._phi_zg() * gamma - self._phi_zz() * center
        return self._phi_z() @ w.T + moved @ self._w.T

    def add_adjoint(
        self, grad: Tensor, g: Tensor, g_dot: Tensor | None, z_dot: Tensor | None
    ) -> None:
        """Adds to `grad [2 + C, K]` what `g` and `g_dot [..., C]` weigh."""
        gw = g @ self._w  # [..., K]
        _add(grad[0], -self._phi_z() * gw)
        _add(grad[1], self._phi_g() * gw)
        grad[2:] += _outer(g, self._phi)
        if g_dot is None:
            return
        # Where φ stood, its tangent: along ż, and along μ̇ and γ̇ where there are any.
        by_z, by_zz, by_zg = self._phi_z(), self._phi_zz(), self._phi_zg()
        shift = torch.zeros_like(self._e) if z_dot is None else z_dot.unsqueeze(-1)
        spread = torch.zeros_like(self._gamma)
        if self._dot is not None:
            shift, spread = shift - self._dot[0], self._dot[1]
        gw_dot = g_dot @ self._w
        _add(grad[0], -(by_zz * shift + by_zg * spread) * gw_dot)
        _add(grad[1], (by_zg * shift + self._phi_gg() * spread) * gw_dot)
        grad[2:] += _outer(g_dot, by_z * shift + self._phi_g() * spread)
        if self._dot is not None:
            g_by_dot = g_dot @ self._dot[2:]
            _add(grad[0], -by_z * g_by_dot)
            _add(grad[1], self._phi_g() * g_by_dot)


def _add(total: Tensor, terms: Tensor) -> None:
    total += terms.flatten(0, -2).sum(0)


def _outer(g: Tensor, phi: Tensor) -> Tensor:
    return g.flatten(0, -2).T @ phi.flatten(0, -2)  # [C, K]
