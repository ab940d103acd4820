"""What is timed: the inputs, our way to compute with them, and the ways of plain PyTorch.

    molecules of N atoms   a jittered lattice of 0.1 atoms/Å³, a ball cut out of it
    molecules of QM9       a random 32 of the sample in geot_model, 18.1 atoms on average

Plain PyTorch gets the layout that suits it best: `[B, H, N, D]`, contiguous, for a bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import geot_kernels as gk
from geot_kernels.radial import gaussians
from geot_kernels.reference import distances
from geot_model.qm9 import load_qm9, pad_batch

from .ways import Way, compiled

DENSITY = 0.1  # atoms/Å³, hydrogens included
JITTER = 0.6  # Å, of each coordinate: no two atoms closer than 0.9 Å
QM9_SEED = 2  # 18.1 atoms on average, 23 at most; all of QM9 has 18.0
R_MAX_BIAS, KNOTS_BIAS = 12.0, 1024
R_MAX_FILTER, KNOTS_FILTER = 15.0, 512
LAST_CENTER = 11.0  # Å: every Gaussian has died away at 12 Å, where the table ends


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


class BiasProblem:
    """Bias and softmax, with 64 Gaussians and a linear map to the heads.

    Args:
        batch: Molecules `B`.
        atoms: Atoms `N` of each.
        heads: `H`.
        dim: `D`.
        num_gaussians: `K`.
    """

    def __init__(
        self, batch: int, atoms: int, heads: int = 8, dim: int = 32, num_gaussians: int = 64
    ) -> None:
        torch.manual_seed(0)
        shape = (batch, atoms, heads, dim)
        self.features = [torch.randn(shape) for _ in range(3)]
        self.cotangent = torch.randn(shape)
        self.positions = lattice_molecules(batch, atoms)
        basis = gk.radial.GaussianBasis(num_gaussians, LAST_CENTER)
        centers = torch.linspace(0, LAST_CENTER, num_gaussians)
        gammas = torch.full_like(centers, basis.gamma)
        weights = 0.5 * torch.randn(heads, num_gaussians)
        self.sum = gk.GaussianSum(centers, gammas, weights.requires_grad_())
        with torch.no_grad():
            self.table = self.build()

    def build(self) -> gk.RadialTable:
        """The table of the Gaussians."""
        return gk.tabulate(self.sum, R_MAX_BIAS, KNOTS_BIAS)

    def _way(
        self, function: Callable[..., Tensor], heads_first: bool, parameters: list[Tensor]
    ) -> Way:
        features = [x.clone() for x in (*self.features, self.cotangent)]
        if heads_first:
            features = [x.transpose(1, 2).contiguous() for x in features]
        *features, cotangent = features
        inputs = [x.requires_grad_() for x in (*features, self.positions.clone())]
        return Way(function, inputs, cotangent, parameters, heads_first)

    def ours(self, backend: str = "cpu") -> Way:
        """Ours, the table given; its knots are a parameter."""
        table = gk.RadialTable(
            self.table.knots.clone().requires_grad_(), self.table.r_min, self.table.r_max
        )

        def attention(*inputs: Tensor) -> Tensor:
            return gk.geo_attention(*inputs, table, backend=backend)

        return self._way(attention, False, [table.knots])

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

    def compiled(self) -> Way:
        """The same under `torch.compile`."""
        return compiled(self.eager())

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
        return F.linear(phi, self.sum.weights).permute(0, 3, 1, 2)


class FilterProblem:
    """Filter and linear normalizer, as in GeoT: a network on Gaussians for each channel.

    Args:
        positions: `[B, N, 3]`, Å.
        mask: `[B, N]`.
        heads: `H`.
        dim: `D`.
        radial: Distances `[M]` to `[M, H*D]`.
        r_max: Of the table, Å.
        num_knots: Of the table.
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
    ) -> None:
        torch.manual_seed(0)
        self.positions, self.mask, self.radial = positions, mask, radial
        self.r_max, self.num_knots = r_max, num_knots
        features = torch.randn(4, *mask.shape, heads, dim)
        *self.features, self.cotangent = (features * mask[:, :, None, None]).unbind()
        with torch.no_grad():
            self.table = self.build()

    @classmethod
    def geot(cls) -> FilterProblem:
        """The published size: 32 molecules padded to 32 atoms, H = 64, D = 16."""
        torch.manual_seed(0)
        return cls(*qm9_molecules(32, 32), 64, 16, geot_filter(64 * 16))

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

    def _way(self, function: Callable[..., Tensor], parameters: list[Tensor]) -> Way:
        inputs = [x.clone().requires_grad_() for x in (*self.features, self.positions)]
        return Way(function, inputs, self.cotangent, parameters)

    def ours(self, backend: str = "cpu") -> Way:
        """Ours, the table given; its knots are a parameter."""
        table = gk.RadialTable(
            self.table.knots.clone().requires_grad_(), self.table.r_min, self.table.r_max
        )
        return self._way(lambda *inputs: self._fused(inputs, table, backend), [table.knots])

    def ours_building_the_table(self, backend: str = "cpu") -> Way:
        """Ours, from the network's parameters on."""
        parameters = list(self.radial.parameters())
        return self._way(lambda *inputs: self._fused(inputs, self.build(), backend), parameters)

    def _fused(self, inputs: Sequence[Tensor], table: gk.RadialTable, backend: str) -> Tensor:
        return gk.geo_attention(
            *inputs, table, mask=self.mask, score="filter", normalizer="linear", backend=backend
        )

    def eager(self) -> Way:
        """All pairs of the padded batch through basis and network: a filter `[B, N, N, H, D]`."""

        def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
            dist = distances(positions, positions)
            filters = self.radial(dist.flatten()).view(*dist.shape, *q.shape[2:])
            scores = (q[:, :, None] * filters * k[:, None]).sum(-1) * q.shape[-1] ** -0.5
            weights = scores.masked_fill(~self.mask[:, None, :, None], 0)  # [B, N, N, H]
            return torch.einsum("bijh,bjhd->bihd", weights, v)

        return self._way(attention, list(self.radial.parameters()))

    def compiled(self) -> Way:
        """The same under `torch.compile`."""
        return compiled(self.eager())


def geot_filter(channels: int) -> gk.radial.RadialMLP:
    """GeoT's radial network: 300 Gaussians, 64 hidden."""
    basis = gk.radial.GaussianBasis.geot()
    return gk.radial.RadialMLP(basis, 64, channels, activation="ssp", final_activation="ssp")
