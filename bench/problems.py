"""What is timed: the inputs of a layer, our way to compute it, and the ways of plain PyTorch.

Plain PyTorch gets the layout that suits it best: `[B, H, N, D]`, contiguous, for a bias. With
16-bit features it computes geometry and basis in float32 and all products in 16 bits, as under
autocast. Padded atoms are masked out as keys; what stands in their rows of a result is not
compared.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import geot_kernels as gk
from geot_kernels.radial import gaussians
from geot_kernels.reference import distances
from geot_kernels.table import number_pairs

from .geometry import Geometry, lattice_molecules
from .ways import (
    Results,
    Way,
    budgets,
    closest,
    errors,
    gaussian_score_mod,
    table_score_mod,
)

R_MAX, KNOTS = 12.0, 1024
LAST_CENTER = 11.0  # Å: every Gaussian has died away at 12 Å, where the table ends
PADDED = ("out", "d q", "d k", "d v", "d positions")
LOSS_PAIRS = 1 << 20  # of atoms, at most, on which it is measured what eager PyTorch loses


class Problem:
    """One layer: bias and softmax, or filter and linear normalizer.

    Args:
        geometry: Molecules.
        heads: `H`.
        dim: `D`.
        radial: Distances `[M]` to `[M, C]`: a `GaussianSum`, whose weights are trained, or a
            Module.
        score: "bias", with softmax, or "filter", with the linear normalizer.
        r_min: Of the table, Å.
        r_max: Of the table, Å.
        num_knots: Of the table.
        affine: `[P, 2]`, `(m, c)` of each pair of atom types: `radial` is a function of `m d + c`.
        device: Of all tensors; their numbers are the same everywhere.
        dtype: Of features.
    """

    def __init__(
        self,
        geometry: Geometry,
        heads: int,
        dim: int,
        radial: gk.GaussianSum | nn.Module,
        *,
        score: str = "bias",
        r_min: float = 0.0,
        r_max: float = R_MAX,
        num_knots: int = KNOTS,
        affine: Tensor | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        types, positions, mask, self.num_types = geometry
        self.positions, self.types = positions.to(device), types.to(device)
        self.mask = None if bool(mask.all()) else mask.to(device)
        self.score = score
        self.range = r_min, r_max, num_knots
        features = torch.randn(4, *types.shape, heads, dim) * mask[:, :, None, None]
        *self.features, self.cotangent = features.to(device, dtype).unbind()
        self.affine = None if affine is None else affine.to(device)
        self.radial: Any
        if isinstance(radial, nn.Module):
            self.radial = radial.to(device)
        else:
            tensors = (radial.centers, radial.gammas, radial.weights)
            self.radial = gk.GaussianSum(*(x.to(device) for x in tensors))
        with torch.no_grad():
            self.table = self.build()
        self._forget()

    def _forget(self) -> None:
        self._expected: dict[tuple[str, str], Results] = {}
        self._losses: dict[tuple[str, str], dict[str, float]] = {}

    # What the radial function depends on, and how it is computed.

    def parameters(self) -> dict[str, Tensor]:
        """What is trained of the radial function, by name."""
        if isinstance(self.radial, nn.Module):
            named = {f"radial.{n}": x for n, x in self.radial.named_parameters()}
        else:
            named = {"weights": self.radial.weights}
        return named if self.affine is None else {**named, "affine": self.affine}

    def build(self) -> gk.RadialTable:
        """The table of the radial function."""
        r_min, r_max, num_knots = self.range
        types = None if self.affine is None else self.num_types
        return gk.tabulate(
            self.radial, r_max, num_knots, r_min=r_min, num_types=types, affine=self.affine
        )

    def radial_of_pairs(self, positions: Tensor, types: Tensor) -> Tensor:
        """The radial function of all pairs, `[B, N, N, C]`, in the dtype of the features."""
        z = distances(positions, positions)
        if self.affine is not None:
            index = number_pairs(self.num_types, z.device)
            m, c = self.affine[index[types[:, :, None], types[:, None]]].unbind(-1)
            z = m * z + c
        dtype = self.cotangent.dtype
        if isinstance(self.radial, gk.GaussianSum):
            phi = gaussians(z, self.radial.centers, self.radial.gammas)
            return F.linear(phi.to(dtype), self.radial.weights.to(dtype))
        narrow = torch.finfo(dtype).bits < 32
        with torch.autocast(z.device.type, dtype if narrow else torch.bfloat16, enabled=narrow):
            return self.radial(z.flatten()).view(*z.shape, -1).to(dtype)

    def bias(self, positions: Tensor) -> Tensor:
        """`[B, H, N, N]`, -∞ for padded keys."""
        bias = self.radial_of_pairs(positions, self.types).permute(0, 3, 1, 2)
        return bias if self.mask is None else self._hide(bias)

    def _hide(self, scores: Tensor, value: float = -math.inf) -> Tensor:
        return scores.masked_fill(~self.mask[:, None, None], value)

    # What is right.

    def expected(self, name: str, radial: str) -> Results:
        """What a pass must give; `radial`: "exact", its "table", or "none"."""
        name = name if name in ("forward", "force_step") else "backward+table"
        if (name, radial) not in self._expected:
            way = self.oracle(radial).prepare(name)
            self._expected[name, radial] = way.named(name, way.call(name)())
        return self._expected[name, radial]

    def losses(self, name: str, radial: str) -> dict[str, float]:
        """What eager PyTorch loses in each result of a pass, to rounding in this dtype.

        With a table its values are rounded to that dtype; with "exact" so are the basis and what
        a network makes of it. What one of the two does not have is that of the other.
        """
        name = name if name in ("forward", "force_step") else "backward+table"
        if (name, radial) not in self._losses:
            part, lost = self.part(), {}
            for function, way in (("exact", part.eager()), ("table", part.eager_table())):
                got = way.prepare(name).named(name, way.call(name)())
                lost[function] = errors(got, part.expected(name, function))
            self._losses[name, "table"] = lost["exact"] | lost["table"]
            self._losses[name, "exact"] = lost["table"] | lost["exact"]
        return self._losses[name, radial]

    def verify(
        self,
        way: Way,
        name: str,
        values: object,
        radial: str,
        strict: bool,
        tabulates: bool = False,
    ) -> tuple[str, float, float]:
        """Which result comes closest to its budget, its relative error, and that budget.

        Args:
            way: Who computed.
            name: Of the pass.
            values: What came out.
            radial: The oracle to hold it against.
            strict: Whether the radial function is never computed in 16 bits.
            tabulates: Whether it takes a table for the exact function: then what sees f'', the
                affine map in a force step, may be wrong as f'' of that table is.
        """
        got = errors(way.named(name, values), self.expected(name, radial))
        losses = self.losses(name, "table" if strict else "exact")
        allowed = budgets(name, losses, self.cotangent.dtype)
        if tabulates and name == "force_step" and "d affine" in allowed:
            allowed["d affine"] += self.curvature_error
        return closest(got.items(), allowed)

    @functools.cached_property
    def curvature_error(self) -> float:
        """Error of the table's second derivative, relative to the largest one."""
        found = gk.table_error(self.radial, self.table)
        return found.curvature / found.max_curvature

    def part(self) -> Problem:
        """The first molecules, or the first atoms of the first one: `LOSS_PAIRS` pairs at most."""
        pairs = self.positions.shape[1] * self.positions.shape[1]
        if len(self.positions) * pairs <= LOSS_PAIRS:
            return self
        atoms = min(self.positions.shape[1], math.isqrt(LOSS_PAIRS))
        few = slice(LOSS_PAIRS // atoms**2), slice(atoms)
        part = copy.copy(self)
        part._forget()
        part.features = [x[few] for x in self.features]
        part.cotangent, part.positions = self.cotangent[few], self.positions[few]
        part.types = self.types[few]
        part.mask = None if self.mask is None else self.mask[few]
        return part

    def oracle(self, radial: str) -> Way:
        """A way in float64, in bounded memory where the radial function allows it."""
        used: Any
        backend, parameters, score = "eager", {}, self.score
        if radial == "table":
            used = own_table(self.table, torch.float64)
            parameters = table_leaves(used)
        elif radial == "none":
            zero = torch.zeros(1, dtype=torch.float64, device=self.positions.device)
            used = gk.GaussianSum(zero, zero + 1, zero.expand(self.features[0].shape[2], 1))
            score = "bias"
        elif isinstance(self.radial, gk.GaussianSum) and self.affine is None:
            tensors = (self.radial.centers, self.radial.gammas, self.radial.weights)
            used = gk.GaussianSum(*(x.detach().double() for x in tensors))
            parameters = {"weights": used.weights}
        else:
            exact = copy.copy(self)
            exact.radial, backend = copy.deepcopy(self.radial).double(), "reference"
            exact.affine = None if self.affine is None else self.affine.detach().double()
            parameters, used = exact.parameters(), _Exact(exact)
        way = self._way(
            lambda *inputs: self._fused(inputs, used, backend, score), False, parameters
        )
        way.inputs = [x.detach().double() for x in way.inputs]
        way.cotangent = way.cotangent.double()
        return way

    # Ours.

    def ours(self, backend: str = "cpu") -> Way:
        """Ours, the table given; its knots, and the affine map, are parameters."""
        table = own_table(self.table)
        leaves = table_leaves(table)
        return self._way(lambda *inputs: self._fused(inputs, table, backend), False, leaves)

    def ours_building_the_table(self, backend: str = "cpu") -> Way:
        """Ours, from the radial function's parameters on."""
        parameters = self.parameters()
        return self._way(
            lambda *inputs: self._fused(inputs, self.build(), backend), False, parameters
        )

    def _fused(
        self, inputs: tuple[Tensor, ...], radial: Any, backend: str, score: str | None = None
    ) -> Tensor:
        score = score or self.score
        typed = isinstance(radial, _Exact) or getattr(radial, "pair_index", None) is not None
        return gk.geo_attention(
            *inputs,
            radial,
            mask=self.mask,
            atom_types=self.types if typed else None,
            score=score,
            normalizer="softmax" if score == "bias" else "linear",
            backend=backend,
        )

    def _way(
        self,
        function: Callable[..., Tensor],
        heads_first: bool,
        parameters: dict[str, Tensor],
        project: Callable[[Results], Results] | None = None,
    ) -> Way:
        features = [x.clone() for x in (*self.features, self.cotangent)]
        if heads_first:
            features = [x.transpose(1, 2).contiguous() for x in features]
        *features, cotangent = features
        inputs = [x.requires_grad_() for x in (*features, self.positions.clone())]
        leaves = [x.requires_grad_() for x in parameters.values()]
        names = tuple(parameters)
        chain = [step for step in (project, self._real_atoms, _together) if step is not None]

        def comparable(results: Results) -> Results:
            for step in chain:
                results = step(results)
            return results

        return Way(function, inputs, cotangent, leaves, heads_first, names, comparable)

    def _real_atoms(self, results: Results) -> Results:
        """Without the rows of padded atoms, which each way leaves in its own state."""
        if self.mask is None:
            return results
        return {n: x[self.mask] if n in PADDED else x for n, x in results.items()}

    # Plain PyTorch.

    def plain(self) -> Way:
        """`scaled_dot_product_attention` of q, k, v: no geometry at all."""
        mask = None if self.mask is None else self.mask[:, None, None]

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        way = self._way(attention, True, {})
        way.inputs = way.inputs[:3]
        return way

    def eager(self) -> Way:
        """Distances, basis, radial function, scores, weights: all of it in memory."""
        if self.score == "filter":
            return self._way(self._eager_filter(self._exact), False, self.parameters())

        def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            return (scores + self.bias(positions)).softmax(-1) @ v

        return self._way(attention, True, self.parameters())

    def eager_table(self) -> Way:
        """The same with a table in place of the radial function."""
        table = own_table(self.table)

        def radial(positions: Tensor) -> Tensor:
            types: tuple[Tensor, ...] = ()
            if table.pair_index is not None:
                shape = *self.types.shape, self.types.shape[1]
                types = self.types[:, :, None].expand(shape), self.types[:, None].expand(shape)
            return table(distances(positions, positions), *types).to(self.cotangent.dtype)

        if self.score == "filter":
            return self._way(self._eager_filter(radial), False, table_leaves(table))

        def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            bias = radial(positions).permute(0, 3, 1, 2)
            bias = bias if self.mask is None else self._hide(bias)
            return (scores + bias).softmax(-1) @ v

        return self._way(attention, True, table_leaves(table))

    def _exact(self, positions: Tensor) -> Tensor:
        return self.radial_of_pairs(positions, self.types)

    def _eager_filter(self, radial: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        """All pairs of the padded batch have a filter `[B, N, N, H, D]` in memory."""

        def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
            filters = radial(positions).unflatten(-1, q.shape[2:])
            scores = (q[:, :, None] * filters * k[:, None]).sum(-1) * q.shape[-1] ** -0.5
            weights = scores.permute(0, 3, 1, 2)  # [B, H, N, N]
            weights = weights if self.mask is None else self._hide(weights, 0)
            return torch.einsum("bhij,bjhd->bihd", weights, v)

        return attention

    def bias_given(self, attention: Callable[..., Tensor] | None = None) -> Way:
        """PyTorch's attention with a bias that was computed before, for all layers to share.

        Args:
            attention: Another's, of q, k, v `[B, H, N, D]` and a bias `[B, H, N, N]`.
        """
        call = attention or self._sdpa
        with torch.no_grad():
            bias = self.bias(self.positions).contiguous()
        way = self._way(
            lambda q, k, v: call(q, k, v, bias), True, {"bias": bias}, self._parameters_of_bias
        )
        way.inputs = way.inputs[:3]
        return way

    @staticmethod
    def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def _parameters_of_bias(self, results: Results) -> Results:
        """Makes of the gradient of the bias those of the radial parameters."""
        if "d bias" not in results:
            return results
        parameters = {n: x.detach().requires_grad_() for n, x in self.parameters().items()}
        single = copy.copy(self)
        single.cotangent = self.cotangent.float()
        totals = {n: torch.zeros_like(x, dtype=torch.float64) for n, x in parameters.items()}
        self._replace(single, parameters)
        some = max(LOSS_PAIRS // self.positions.shape[1] ** 2, 1)  # molecules at a time
        for few in (slice(b, b + some) for b in range(0, len(self.positions), some)):
            pairs = single.radial_of_pairs(self.positions[few], self.types[few])
            cotangent = results["d bias"][few].float().permute(0, 2, 3, 1)
            found = torch.autograd.grad(pairs, list(parameters.values()), cotangent)
            for name, gradient in zip(parameters, found, strict=True):
                totals[name] += gradient
        rest = {n: x for n, x in results.items() if n != "d bias"}
        return rest | {f"d {n}": x for n, x in totals.items()}

    @staticmethod
    def _replace(problem: Problem, parameters: dict[str, Tensor]) -> None:
        """Gives a copy of a problem these parameters."""
        problem.affine = parameters.get("affine")
        if isinstance(problem.radial, gk.GaussianSum):
            old = problem.radial
            problem.radial = gk.GaussianSum(old.centers, old.gammas, parameters["weights"])
            return
        problem.radial = copy.deepcopy(problem.radial)
        for name, parameter in problem.radial.named_parameters():
            parameter.requires_grad_()
            parameters[f"radial.{name}"] = parameter

    def bias_recomputed(self) -> Way:
        """PyTorch's attention with a bias computed at each call."""

        def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
            return self._sdpa(q, k, v, self.bias(positions).contiguous())

        return self._way(attention, True, self.parameters())

    def math(self) -> Way:
        """Eager bias, then the backend of PyTorch's attention that has a second derivative."""

        def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
            bias = self.bias(positions)
            with sdpa_kernel(SDPBackend.MATH):
                return self._sdpa(q, k, v, bias)

        return self._way(attention, True, self.parameters())

    def flex(self) -> Way:
        """FlexAttention, the Gaussians of a `GaussianSum` evaluated for each pair."""
        centers, gammas = self.radial.centers.tolist(), self.radial.gammas.tolist()
        weights = self.radial.weights

        def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
            mod = gaussian_score_mod(positions, centers, gammas, weights, self.mask)
            return flex_attention(q, k, v, score_mod=mod)

        return self._way(attention, True, {"weights": weights})

    def flex_table(self) -> Way:
        """FlexAttention, a table of the radial function read for each pair."""
        table = own_table(self.table)
        knots, index = table.knots.detach()[0].clone(), table.pair_index
        leaves = {"knots": knots} if table.affine is None else table_leaves(table)
        leaves["knots"] = knots

        def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
            maps = None if index is None else (self.types, index, table.affine)
            mod = table_score_mod(positions, knots, table.r_min, table.r_max, self.mask, maps)
            return flex_attention(q, k, v, score_mod=mod)

        return self._way(attention, True, leaves)


def _together(results: Results) -> Results:
    """The gradient of a radial network as one vector.

    Alone, that of the last layer's bias is a sum that vanishes: a softmax does not see it.
    """
    inside = {n: x for n, x in results.items() if n.startswith("d radial.")}
    if not inside:
        return results
    rest = {n: x for n, x in results.items() if n not in inside}
    return rest | {"d radial": torch.cat([x.flatten() for x in inside.values()])}


class _Exact:
    """A radial function with its affine map, as `backend="reference"` calls it."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def __call__(self, dist: Tensor, types_i: Tensor, types_j: Tensor) -> Tensor:
        if self.problem.affine is not None:
            index = number_pairs(self.problem.num_types, dist.device)
            m, c = self.problem.affine[index[types_i, types_j]].unbind(-1)
            dist = m * dist + c
        return self.problem.radial(dist)


class BiasProblem(Problem):
    """Bias and softmax, Gaussians with a linear map to the heads; molecules from a lattice.

    Args:
        batch: Molecules `B`.
        atoms: Atoms `N` of each.
        heads: `H`.
        dim: `D`.
        num_gaussians: `K`.
        device: Of all tensors.
        dtype: Of features.
    """

    def __init__(
        self,
        batch: int,
        atoms: int,
        heads: int = 8,
        dim: int = 32,
        num_gaussians: int = 64,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        positions = lattice_molecules(batch, atoms)
        types = torch.zeros(batch, atoms, dtype=torch.int64)
        geometry = Geometry(types, positions, torch.ones_like(types, dtype=torch.bool), 1)
        radial = gaussian_sum(heads, num_gaussians)
        super().__init__(geometry, heads, dim, radial, device=device, dtype=dtype)


def gaussian_sum(heads: int, number: int) -> gk.GaussianSum:
    """Evenly spaced Gaussians with random weights."""
    basis = gk.radial.GaussianBasis(number, LAST_CENTER)
    centers = torch.linspace(0, LAST_CENTER, number)
    weights = 0.5 * torch.randn(heads, number)
    return gk.GaussianSum(centers, torch.full_like(centers, basis.gamma), weights)


def own_table(table: gk.RadialTable, dtype: torch.dtype | None = None) -> gk.RadialTable:
    """A copy of a table whose knots and affine map are leaves."""
    dtype = dtype or table.knots.dtype
    knots = table.knots.detach().to(dtype, copy=True).requires_grad_()
    affine = table.affine
    if affine is not None:
        affine = affine.detach().to(dtype, copy=True).requires_grad_()
    return gk.RadialTable(knots, table.r_min, table.r_max, table.pair_index, affine)


def table_leaves(table: gk.RadialTable) -> dict[str, Tensor]:
    """What is trained of a table."""
    leaves = {"knots": table.knots}
    return leaves if table.affine is None else {**leaves, "affine": table.affine}
