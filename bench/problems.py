"""What is timed: the inputs, our way to compute with them, and the ways of plain PyTorch.

    molecules of N atoms   a jittered lattice of 0.1 atoms/Å³, a ball cut out of it
    molecules of QM9       a random 32 of the sample in geot_model, 18.1 atoms on average

Plain PyTorch gets the layout that suits it best: `[B, H, N, D]`, contiguous, for a bias. With
16-bit features it computes geometry and Gaussians in float32 and all products in 16 bits, as under
autocast.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import geot_kernels as gk
from geot_kernels.radial import gaussians
from geot_kernels.reference import distances
from geot_model.qm9 import load_qm9, pad_batch

from .ways import (
    Results,
    Way,
    budgets,
    compiled,
    errors,
    gaussian_score_mod,
    table_score_mod,
)

DENSITY = 0.1  # atoms/Å³, hydrogens included
JITTER = 0.6  # Å, of each coordinate: no two atoms closer than 0.9 Å
QM9_SEED = 2  # 18.1 atoms on average, 23 at most; all of QM9 has 18.0
R_MAX_BIAS, KNOTS_BIAS = 12.0, 1024
R_MAX_FILTER, KNOTS_FILTER = 15.0, 512
LAST_CENTER = 11.0  # Å: every Gaussian has died away at 12 Å, where the table ends
PADDED = ("out", "d q", "d k", "d v", "d positions")
LOSS_PAIRS = 1 << 20  # of atoms, at most, on which it is measured what eager PyTorch loses


def lattice_molecules(batch: int, atoms: int) -> Tensor:
    """Positions `[B, N, 3]`, Å: the N points of a lattice nearest to a random point, jittered."""
    reach = math.ceil((atoms * 3 / (4 * math.pi)) ** (1 / 3)) + 2
    axis = torch.arange(-reach, reach + 1.0)
    grid = torch.cartesian_prod(axis, axis, axis)  # [M, 3]
    center = torch.rand(batch, 1, 3) - 0.5
    nearest = (grid - center).square().sum(-1).topk(atoms, largest=False).indices  # [B, N]
    shuffled = nearest[:, torch.randperm(atoms)]
    return grid[shuffled] * DENSITY ** (-1 / 3) + JITTER * (2 * torch.rand(batch, atoms, 3) - 1)


def qm9_molecules(batch: int, width: int, atoms: int | None = None) -> tuple[Tensor, Tensor]:
    """Positions `[B, N, 3]`, Å, and mask `[B, N]` of random molecules, of one size if wanted."""
    molecules = load_qm9()
    if atoms is not None:
        molecules = molecules[np.diff(molecules.ptr) == atoms]
    # numpy froze the stream of RandomState; that of default_rng may change with a release.
    chosen = np.random.RandomState(QM9_SEED).permutation(len(molecules))[:batch]
    _, positions, mask = pad_batch(molecules[chosen], width)
    return positions, mask


class Problem:
    """What both problems have: the oracle of their passes, and what a pass may lose."""

    features: list[Tensor]
    cotangent: Tensor
    positions: Tensor

    def __init__(self) -> None:
        self._expected: dict[tuple[str, str], Results] = {}
        self._losses: dict[tuple[str, str], dict[str, float]] = {}

    def oracle(self, radial: str) -> Way:
        """A way in float64."""
        raise NotImplementedError

    def lossy(self) -> list[tuple[str, Way]]:
        """Plain PyTorch on a part that fits into memory, and which oracle it is held against."""
        raise NotImplementedError

    def part(self) -> Problem:
        """A problem of the same kind with `LOSS_PAIRS` pairs at most."""
        raise NotImplementedError

    def expected(self, name: str, radial: str) -> Results:
        """What a pass must give; `radial`: "gaussians", their "table", or "none"."""
        name = name if name in ("forward", "force_step") else "backward+table"
        if (name, radial) not in self._expected:
            way = self.oracle(radial).prepare(name)
            self._expected[name, radial] = way.named(name, way.call(name)())
        return self._expected[name, radial]

    def losses(self, name: str, radial: str) -> dict[str, float]:
        """What eager PyTorch loses in each result of a pass, to rounding in this dtype.

        With a table its values are rounded to that dtype; with "gaussians" so are these, and what
        a network makes of them. What one of the two does not have is that of the other.
        """
        name = name if name in ("forward", "force_step") else "backward+table"
        if (name, radial) not in self._losses:
            part, lost = self.part(), {}
            for function, way in part.lossy():
                got = way.prepare(name).named(name, way.call(name)())
                lost[function] = errors(got, part.expected(name, function))
            self._losses[name, "table"] = lost["gaussians"] | lost["table"]
            self._losses[name, "gaussians"] = lost["table"] | lost["gaussians"]
        return self._losses[name, radial]

    def verify(
        self, way: Way, name: str, values: object, radial: str, strict: bool
    ) -> tuple[str, float, float]:
        """Which result comes closest to its budget, its relative error, and that budget.

        Args:
            way: Who computed.
            name: Of the pass.
            values: What came out.
            radial: The oracle to hold it against.
            strict: Whether the radial function is never computed in 16 bits.
        """
        got = errors(way.named(name, values), self.expected(name, radial))
        losses = self.losses(name, "table" if strict else "gaussians")
        allowed = budgets(name, losses, self.cotangent.dtype)

        def share(result: str) -> float:
            ratio = got[result] / allowed[result]
            return ratio if ratio == ratio else math.inf

        worst = max(got, key=share)
        return worst, got[worst], allowed[worst]


class BiasProblem(Problem):
    """Bias and softmax, with 64 Gaussians and a linear map to the heads.

    Args:
        batch: Molecules `B`.
        atoms: Atoms `N` of each.
        heads: `H`.
        dim: `D`.
        num_gaussians: `K`.
        device: Of all tensors; their numbers are the same everywhere.
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
        super().__init__()
        torch.manual_seed(0)
        shape = (batch, atoms, heads, dim)
        self.features = [torch.randn(shape).to(device, dtype) for _ in range(3)]
        self.cotangent = torch.randn(shape).to(device, dtype)
        self.positions = lattice_molecules(batch, atoms).to(device)
        basis = gk.radial.GaussianBasis(num_gaussians, LAST_CENTER)
        centers = torch.linspace(0, LAST_CENTER, num_gaussians)
        gammas = torch.full_like(centers, basis.gamma)
        weights = 0.5 * torch.randn(heads, num_gaussians)
        tensors = [x.to(device) for x in (centers, gammas, weights)]
        self.sum = gk.GaussianSum(*tensors[:2], tensors[2].requires_grad_())
        with torch.no_grad():
            self.table = self.build()

    def build(self) -> gk.RadialTable:
        """The table of the Gaussians."""
        return gk.tabulate(self.sum, R_MAX_BIAS, KNOTS_BIAS)

    def part(self) -> BiasProblem:
        """The first molecules, or the first atoms of the first one."""
        atoms = min(self.positions.shape[1], math.isqrt(LOSS_PAIRS))
        few = slice(LOSS_PAIRS // atoms**2), slice(atoms)
        part = copy.copy(self)
        Problem.__init__(part)
        part.features = [x[few] for x in self.features]
        part.cotangent, part.positions = self.cotangent[few], self.positions[few]
        return part

    def lossy(self) -> list[tuple[str, Way]]:
        """Eager PyTorch with Gaussians, and with a table, whose knots have a gradient too."""
        return [("gaussians", self.eager()), ("table", self.eager_table())]

    def _way(
        self,
        function: Callable[..., Tensor],
        heads_first: bool,
        parameters: list[Tensor],
        name: str = "weights",
    ) -> Way:
        features = [x.clone() for x in (*self.features, self.cotangent)]
        if heads_first:
            features = [x.transpose(1, 2).contiguous() for x in features]
        *features, cotangent = features
        inputs = [x.requires_grad_() for x in (*features, self.positions.clone())]
        names = (name,) * len(parameters)
        return Way(function, inputs, cotangent, parameters, heads_first, names)

    def ours(self, backend: str = "cpu") -> Way:
        """Ours, the table given; its knots are a parameter."""
        table = own_table(self.table)

        def attention(*inputs: Tensor) -> Tensor:
            return gk.geo_attention(*inputs, table, backend=backend)

        return self._way(attention, False, [table.knots], "knots")

    def oracle(self, radial: str) -> Way:
        """Plain PyTorch inside our operators, in float64 and in bounded memory."""
        centers, gammas, weights = (
            x.detach().double() for x in (self.sum.centers, self.sum.gammas, self.sum.weights)
        )
        name, used = "weights", gk.GaussianSum(centers, gammas, weights)
        parameters = [weights]
        if radial == "table":
            name, used = "knots", own_table(self.table, torch.float64)
            parameters = [used.knots]
        elif radial == "none":
            used = gk.GaussianSum(centers[:1], gammas[:1], 0 * weights[:, :1])
            parameters = []

        def attention(*inputs: Tensor) -> Tensor:
            return gk.geo_attention(*inputs, used, backend="eager")

        way = self._way(attention, False, parameters, name)
        way.inputs = [x.detach().double() for x in way.inputs]
        way.cotangent = way.cotangent.double()
        return way

    def ours_building_the_table(self, backend: str = "cpu") -> Way:
        """Ours, from the Gaussians' weights on."""

        def attention(*inputs: Tensor) -> Tensor:
            return gk.geo_attention(*inputs, self.build(), backend=backend)

        return self._way(attention, False, [self.sum.weights])

    def plain(self) -> Way:
        """`scaled_dot_product_attention` of q, k, v: no geometry at all."""
        way = self._way(F.scaled_dot_product_attention, True, [])
        way.inputs = way.inputs[:3]
        return way

    def eager(self) -> Way:
        """Distances, Gaussians, linear map, bias, softmax: all of it in memory."""

        def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            return (scores + self._bias(positions)).softmax(-1) @ v

        return self._way(attention, True, [self.sum.weights])

    def eager_table(self) -> Way:
        """The same with a table of the Gaussians."""
        table = own_table(self.table)

        def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            bias = table(distances(positions, positions)).to(q.dtype).permute(0, 3, 1, 2)
            return (scores + bias).softmax(-1) @ v

        return self._way(attention, True, [table.knots], "knots")

    def compiled(self) -> Way:
        """Eager PyTorch under `torch.compile`."""
        return compiled(self.eager())

    def bias_given(self) -> Way:
        """PyTorch's attention with a bias that was computed before, for all layers to share."""
        with torch.no_grad():
            bias = self._bias(self.positions).contiguous()

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

        way = self._way(attention, True, [bias], "bias")
        way.inputs, way.project = way.inputs[:3], self._weights_of_bias
        return way

    def _weights_of_bias(self, results: Results) -> Results:
        """Makes of the gradient of the bias that of the weights."""
        if "d bias" not in results:
            return results
        total = torch.zeros_like(self.sum.weights, dtype=torch.float64)
        for x, d_bias in zip(self.positions, results["d bias"], strict=True):
            phi = gaussians(distances(x, x), self.sum.centers, self.sum.gammas)
            total += torch.einsum("hij,ijk->hk", d_bias.float(), phi)
        return {n: x for n, x in results.items() if n != "d bias"} | {"d weights": total}

    def bias_recomputed(self) -> Way:
        """PyTorch's attention with a bias computed at each call."""

        def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
            bias = self._bias(positions).contiguous()
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

        return self._way(attention, True, [self.sum.weights])

    def flex(self) -> Way:
        """FlexAttention, the Gaussians evaluated for each pair."""
        centers, gammas = self.sum.centers.tolist(), self.sum.gammas.tolist()
        weights = self.sum.weights

        def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
            mod = gaussian_score_mod(positions, centers, gammas, weights)
            return flex_attention(q, k, v, score_mod=mod)

        return self._way(attention, True, [weights])

    def flex_table(self) -> Way:
        """FlexAttention, a table of the Gaussians read for each pair."""
        knots, r_max = self.table.knots[0].clone(), self.table.r_max

        def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
            mod = table_score_mod(positions, knots, r_max)
            return flex_attention(q, k, v, score_mod=mod)

        return self._way(attention, True, [knots], "knots")

    def math(self) -> Way:
        """Eager bias, then the backend of PyTorch's attention that has a second derivative."""

        def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
            bias = self._bias(positions)
            with sdpa_kernel(SDPBackend.MATH):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

        return self._way(attention, True, [self.sum.weights])

    def _bias(self, positions: Tensor) -> Tensor:
        """`[B, H, N, N]`."""
        phi = gaussians(distances(positions, positions), self.sum.centers, self.sum.gammas)
        dtype = self.cotangent.dtype
        return F.linear(phi.to(dtype), self.sum.weights.to(dtype)).permute(0, 3, 1, 2)


class FilterProblem(Problem):
    """Filter and linear normalizer, as in GeoT: a network on Gaussians for each channel.

    Args:
        positions: `[B, N, 3]`, Å.
        mask: `[B, N]`.
        heads: `H`.
        dim: `D`.
        radial: Distances `[M]` to `[M, H*D]`.
        r_max: Of the table, Å.
        num_knots: Of the table.
        device: Of all tensors.
        dtype: Of features.
    """

    def __init__(
        self,
        positions: Tensor,
        mask: Tensor,
        heads: int,
        dim: int,
        radial: gk.radial.RadialMLP,
        r_max: float = R_MAX_FILTER,
        num_knots: int = KNOTS_FILTER,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positions, self.mask = positions.to(device), mask.to(device)
        self.radial = radial.to(device)
        self.r_max, self.num_knots = r_max, num_knots
        features = torch.randn(4, *mask.shape, heads, dim) * mask[:, :, None, None]
        *self.features, self.cotangent = features.to(device, dtype).unbind()
        with torch.no_grad():
            self.table = self.build()

    @classmethod
    def geot(cls, device: str = "cpu", dtype: torch.dtype = torch.float32) -> FilterProblem:
        """The published size: 32 molecules padded to 32 atoms, H = 64, D = 16."""
        torch.manual_seed(0)
        radial = geot_filter(64 * 16)
        return cls(*qm9_molecules(32, 32), 64, 16, radial, device=device, dtype=dtype)

    @classmethod
    def demo(cls) -> FilterProblem:
        """The size of `make demo`: 32 molecules of 18 atoms, H = 4, D = 16, 256 knots to 13 Å."""
        torch.manual_seed(0)
        basis = gk.radial.GaussianBasis(128, 13.0)
        radial = gk.radial.RadialMLP(basis, 64, 64, activation="ssp", final_activation="ssp")
        return cls(*qm9_molecules(32, 18, atoms=18), 4, 16, radial, 13.0, 256)

    def build(self) -> gk.RadialTable:
        """The table of the network."""
        return gk.tabulate(self.radial, self.r_max, self.num_knots)

    def part(self) -> FilterProblem:
        """All of it: that is small enough."""
        return self

    def lossy(self) -> list[tuple[str, Way]]:
        """Eager PyTorch with the network, and with a table, whose knots have a gradient too."""
        return [("gaussians", self.eager()), ("table", self.eager_table())]

    def _way(
        self, function: Callable[..., Tensor], parameters: list[Tensor], name: str = ""
    ) -> Way:
        inputs = [x.clone().requires_grad_() for x in (*self.features, self.positions)]
        names = (name,) if name else tuple(f"radial.{n}" for n in range(len(parameters)))
        return Way(
            function, inputs, self.cotangent, parameters, names=names, project=self._real_atoms
        )

    def _real_atoms(self, results: Results) -> Results:
        """Without the rows of padded atoms, which each way leaves in its own state."""
        return {n: x[self.mask] if n in PADDED else x for n, x in results.items()}

    def oracle(self, radial: str) -> Way:
        """The specification, in float64."""
        used: Callable[..., Tensor] = copy.deepcopy(self.radial).double()
        parameters, name, backend = list(used.parameters()), "", "reference"
        if radial == "table":
            used = own_table(self.table, torch.float64)
            parameters, name, backend = [used.knots], "knots", "eager"
        way = self._way(lambda *inputs: self._fused(inputs, used, backend), parameters, name)
        way.inputs = [x.detach().double() for x in way.inputs]
        way.cotangent = way.cotangent.double()
        return way

    def ours(self, backend: str = "cpu") -> Way:
        """Ours, the table given; its knots are a parameter."""
        table = own_table(self.table)

        def attention(*inputs: Tensor) -> Tensor:
            return self._fused(inputs, table, backend)

        return self._way(attention, [table.knots], "knots")

    def ours_building_the_table(self, backend: str = "cpu") -> Way:
        """Ours, from the network's parameters on."""
        parameters = list(self.radial.parameters())
        return self._way(lambda *inputs: self._fused(inputs, self.build(), backend), parameters)

    def _fused(
        self, inputs: Sequence[Tensor], table: Callable[..., Tensor], backend: str
    ) -> Tensor:
        return gk.geo_attention(
            *inputs, table, mask=self.mask, score="filter", normalizer="linear", backend=backend
        )

    def eager(self) -> Way:
        """All pairs of the padded batch through basis and network: a filter `[B, N, N, H, D]`."""
        device, dtype = self.mask.device.type, self.cotangent.dtype

        def radial(dist: Tensor) -> Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                return self.radial(dist.flatten())

        return self._plain(radial, list(self.radial.parameters()))

    def eager_table(self) -> Way:
        """The same with a table of the network."""
        table = own_table(self.table)
        return self._plain(table, [table.knots], "knots")

    def _plain(
        self, radial: Callable[[Tensor], Tensor], parameters: list[Tensor], name: str = ""
    ) -> Way:
        def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
            dist = distances(positions, positions)
            filters = radial(dist).view(*dist.shape, *q.shape[2:]).to(q.dtype)
            scores = (q[:, :, None] * filters * k[:, None]).sum(-1) * q.shape[-1] ** -0.5
            weights = scores.masked_fill(~self.mask[:, None, :, None], 0)  # [B, N, N, H]
            return torch.einsum("bijh,bjhd->bihd", weights, v)

        return self._way(attention, parameters, name)

    def compiled(self) -> Way:
        """Eager PyTorch under `torch.compile`."""
        return compiled(self.eager())


def own_table(table: gk.RadialTable, dtype: torch.dtype | None = None) -> gk.RadialTable:
    """A copy of a table whose knots are a leaf."""
    knots = table.knots.detach().to(dtype or table.knots.dtype, copy=True).requires_grad_()
    return gk.RadialTable(knots, table.r_min, table.r_max)


def geot_filter(channels: int) -> gk.radial.RadialMLP:
    """GeoT's radial network: 300 Gaussians, 64 hidden."""
    basis = gk.radial.GaussianBasis.geot()
    return gk.radial.RadialMLP(basis, 64, channels, activation="ssp", final_activation="ssp")
