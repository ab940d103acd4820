"""Named cases: one attention layer of a real model, at its size, on real molecules.

What a model has beyond our operators is left out of its case, and said here:

    geot-qm9             GeoT as published. The attention scale is left out.
    graphormer3d-pcqm    Graphormer-3D. One bias serves all its layers: "bias given" is its way.
    transformer-m        Transformer-M. The bias of bonds and shortest paths is left out.
    unimol               Uni-Mol's first layer; in later ones the bias is the last layer's scores.
    torchmd-et-md17      TorchMD-ET: SiLU of the scores, filtered values and the vector channel
                         are left out; the cosine cutoff is a factor of the filter.
    drug-like            `FusedGeoAttention` as it comes, on drug-like molecules.
    protein-2k           The same Gaussians on one protein.
    pytorch-152593       pytorch#152593: 5 Gaussians, 4 heads, 1600 atoms, in a `score_mod`.
    grid-BxN             64 Gaussians on molecules of one size, cut out of a jittered lattice: how
                         a layer that does not pad behaves by size.

The Gaussians of Graphormer-3D, Transformer-M and Uni-Mol are trained; here they are evenly spaced
and 0.5 Å wide. Distances are those of the files in `bench/geometries`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import geot_kernels as gk
from geot_kernels.radial import (
    CosineCutoff,
    ExponentialNormalBasis,
    GaussianBasis,
    RadialMLP,
)

from .geometry import Geometry, load
from .problems import BiasProblem, Problem, gaussian_sum

Radial = gk.GaussianSum | nn.Module


@dataclass(frozen=True)
class Case:
    """A layer.

    Attributes:
        name: Also that of its file of rows, unless `file` says otherwise.
        geometry: Of `bench.geometry`; "" for a lattice.
        molecules: `B`.
        atoms: Width of the padded batch; 0 for the largest molecule.
        heads: `H`.
        head_dim: `D`.
        gaussians: Functions of the basis, `K`.
        radial: Makes the radial function, given heads and channels of all heads.
        score: "bias" or "filter".
        table: First and last knot, Å, and number of knots.
        mapped: Whether each pair of elements has an affine map of the distance.
        heavy: Whether hydrogens are left out.
        quick: Molecules and atoms for `--quick`.
        compiles: Whether `--quick` compiles eager PyTorch here, but for force steps.
        file: Name of the file of rows.
    """

    name: str
    geometry: str
    molecules: int
    atoms: int
    heads: int
    head_dim: int
    gaussians: int
    radial: Callable[[int, int], Radial]
    score: str = "bias"
    table: tuple[float, float, int] = (0.0, 12.0, 1024)
    mapped: bool = False
    heavy: bool = False
    quick: tuple[int, int] = (4, 0)
    compiles: bool = False
    file: str = ""

    def of_size(self, size: str) -> Case:
        """The case as published, for `--quick`, or as small as a check needs it."""
        if size == "full":
            return self
        molecules, atoms = self.quick
        if size == "check":
            molecules, atoms = min(molecules, 2), 24 if molecules == 1 else atoms
        return replace(self, molecules=molecules, atoms=atoms)

    def batch(self) -> Geometry:
        """The molecules."""
        return load(self.geometry, self.molecules, max_atoms=self.atoms or None, heavy=self.heavy)

    @functools.cached_property
    def shape(self) -> tuple[int, int, float]:
        """Molecules, width of the padded batch, real atoms of a molecule; no device is asked."""
        if not self.geometry:
            return self.molecules, self.atoms, self.atoms
        mask = self.batch().mask
        return *mask.shape, float(mask.sum()) / len(mask)

    def problem(self, device: str, dtype: torch.dtype) -> Problem:
        """The tensors."""
        if not self.geometry:
            shape = self.molecules, self.atoms, self.heads, self.head_dim, self.gaussians
            return BiasProblem(*shape, device=device, dtype=dtype)
        torch.manual_seed(0)
        geometry = self.batch()
        r_min, r_max, knots = self.table
        return Problem(
            geometry,
            self.heads,
            self.head_dim,
            self.radial(self.heads, self.heads * self.head_dim),
            score=self.score,
            r_min=r_min,
            r_max=r_max,
            num_knots=knots,
            affine=affine_maps(geometry.num_types) if self.mapped else None,
            device=device,
            dtype=dtype,
        )


def affine_maps(num_types: int) -> Tensor:
    """`(m, c)` of each pair of elements, near `(1, 0)`, where Graphormer-3D's training starts."""
    pairs = num_types * (num_types + 1) // 2
    return torch.tensor([1.0, 0.0]) + 0.1 * (2 * torch.rand(pairs, 2) - 1)


def _geot(heads: int, channels: int) -> RadialMLP:
    basis = GaussianBasis.geot()
    return RadialMLP(basis, 64, channels, activation="ssp", final_activation="ssp")


def _graphormer(heads: int, channels: int) -> RadialMLP:
    basis = GaussianBasis(128, 12.0, gamma=2.0)  # 0.5 Å wide
    return RadialMLP(basis, 128, heads, activation="gelu")


def _torchmd(heads: int, channels: int) -> RadialMLP:
    cutoff = CosineCutoff(5.0)
    return RadialMLP(ExponentialNormalBasis(32, 5.0), (), channels, cutoff=cutoff)


def _default(heads: int, channels: int) -> RadialMLP:
    return RadialMLP(GaussianBasis(64, 11.0), 64, heads)


def _gaussians(number: int) -> Callable[[int, int], gk.GaussianSum]:
    return lambda heads, channels: gaussian_sum(heads, number)


MAPPED = {"mapped": True, "table": (-1.0, 15.0, 1024)}
CASES = {
    case.name: case
    for case in (
        Case(
            *("geot-qm9", "qm9", 32, 32, 64, 16, 300, _geot),
            **{"score": "filter", "table": (0.0, 15.0, 512), "quick": (2, 32), "compiles": True},
        ),
        Case(
            *("graphormer3d-pcqm", "pcqm_like", 32, 0, 48, 16, 128, _graphormer),
            **MAPPED,
            quick=(2, 0),
        ),
        Case(
            *("transformer-m", "pcqm_like", 64, 50, 32, 24, 128, _graphormer),
            **MAPPED,
            heavy=True,
            quick=(4, 0),
        ),
        Case("unimol", "drug_like", 16, 0, 64, 8, 128, _graphormer, **MAPPED, quick=(1, 48)),
        Case(
            *("torchmd-et-md17", "aspirin", 8, 0, 8, 16, 32, _torchmd),
            **{"score": "filter", "table": (0.0, 5.0, 1024), "quick": (8, 0)},
        ),
        Case("drug-like", "drug_like", 32, 0, 8, 32, 64, _default, quick=(2, 0)),
        Case("protein-2k", "protein", 1, 0, 8, 32, 64, _gaussians(64), quick=(1, 192)),
        Case(
            *("pytorch-152593", "protein", 1, 1600, 4, 32, 5, _gaussians(5)),
            **{"table": (0.0, 26.0, 1024), "quick": (1, 384), "compiles": True},
        ),
    )
}
GRID = {
    "cpu": ((64, 32), (32, 64), (8, 128), (1, 512)),
    "cuda": ((2048, 16), (1024, 32), (512, 64), (256, 128), (128, 256), (64, 512), (16, 2048)),
}
GRID_HEADS = {"cpu": ((8, 32),), "cuda": ((8, 32), (32, 16))}


@functools.cache
def grid(device: str) -> dict[str, Case]:
    """The sizes of molecules of one size."""
    cases = [
        Case(
            *(f"grid-{batch}x{atoms}", "", batch, atoms, *heads, 64, _gaussians(64)),
            **{"quick": (max(batch // 16, 1), min(atoms, 128)), "file": "grid"},
        )
        for batch, atoms in GRID[device]
        for heads in GRID_HEADS[device]
    ]
    return {f"{case.name}-{case.heads}" if device == "cuda" else case.name: case for case in cases}


def all_cases(device: str) -> dict[str, Case]:
    """By name."""
    return {**CASES, **grid(device)}
