"""Problems that several tests share: random inputs with everything that can vary."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import geot_kernels as gk
from geot_kernels.backends import why_not

SCORES = ("bias", "filter")
NORMALIZERS = ("softmax", "linear")
RADIALS = ("table", "pair tables", "affine", "gaussians")
LAYOUTS = ("full", "masked", "packed")
CPU_MISSING = why_not("cpu", torch.device("cpu"))
NEEDS_CPU = pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))
CPU = pytest.param("cpu", marks=NEEDS_CPU)  # the C++ kernels, where they are compiled
R_MIN, R_MAX, KNOTS, TYPES = 0.3, 5.0, 9, 3

VARIANTS = [
    v
    for v in itertools.product(SCORES, NORMALIZERS, RADIALS, LAYOUTS)
    if not (v[0] == "filter" and v[2] == "gaussians")
]


@dataclass
class Case:
    """Differentiable tensors by name, and a function of them."""

    score: str
    normalizer: str
    radial: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    pair_index: Tensor | None = None
    r_min: float = R_MIN
    r_max: float = R_MAX
    backend: str = "eager"
    real: Tensor = field(default_factory=lambda: torch.ones(()))

    def radial_function(self, tensors: dict[str, Tensor]) -> gk.RadialTable | gk.GaussianSum:
        if self.radial == "gaussians":
            return gk.GaussianSum(*(tensors[n] for n in ("centers", "gammas", "weights")))
        knots, affine = tensors["knots"], tensors.get("affine")
        return gk.RadialTable(knots, self.r_min, self.r_max, self.pair_index, affine)

    def attention(self, *tensors: Tensor, backend: str | None = None, **more: Any) -> Tensor:
        """`geo_attention` of `self.tensors`, or of others in the same order."""
        named = dict(zip(self.tensors, tensors or self.tensors.values(), strict=True))
        q, k, v, positions = (named[n] for n in ("q", "k", "v", "positions"))
        radial, options = self.radial_function(named), self.options | more
        if "attention_scale" in named:
            options["attention_scale"] = named["attention_scale"]
        return gk.geo_attention(
            q, k, v, positions, radial, backend=backend or self.backend, **options
        )

    def weights(self, *tensors: Tensor, backend: str | None = None, **more: Any) -> Tensor:
        """`attention_weights`, likewise."""
        named = dict(zip(self.tensors, tensors or self.tensors.values(), strict=True))
        options = self.options | more
        if "attention_scale" in named:
            options["attention_scale"] = named["attention_scale"]
        return gk.attention_weights(
            *(named[n] for n in ("q", "k", "positions")),
            self.radial_function(named),
            backend=backend or self.backend,
            **options,
        )


def make_case(
    score: str = "bias",
    normalizer: str = "softmax",
    radial: str = "table",
    layout: str = "masked",
    *,
    sizes: tuple[int, ...] = (4, 0, 3),
    heads: int = 2,
    channels: int = 3,
    dtype: torch.dtype = torch.float64,
    attention_scale: bool = False,
    coincident: bool = True,
    seed: int = 0,
) -> Case:
    """Makes a random case: two atoms at one point, one pair beyond `r_max`, masks with holes."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    batch, atoms = len(sizes), max(sizes)
    positions = 1.3 * rand(batch, atoms, 3)
    if coincident and atoms > 1:  # where differences see a cusp of the distance
        positions[0, 1] = positions[0, 0]
    if atoms > 2:
        positions[0, 2] += 6.0
    tensors = {n: rand(batch, atoms, heads, channels) for n in "qkv"} | {"positions": positions}
    types = torch.randint(0, TYPES, (batch, atoms), generator=g)
    options: dict[str, Any] = {"score": score, "normalizer": normalizer, "scale": 0.7}
    real = torch.ones(batch, atoms, dtype=torch.bool)
    if layout == "masked":
        real = torch.rand(batch, atoms, generator=g) < 0.75
        real[:, 0] = False
        real[0, 1:] = True
        if batch > 1:
            real[1] = sizes[1] > 0
        options["mask"] = real
    elif layout == "packed":
        real = torch.arange(atoms) < torch.tensor(sizes)[:, None]
        tensors = {name: x[real] for name, x in tensors.items()}
        types = types[real]
        options["ptr"] = torch.tensor([0, *itertools.accumulate(sizes)])
    num_channels = heads if score == "bias" else heads * channels
    pair_index = None
    if radial == "gaussians":
        tensors["centers"] = 2 * rand(4).abs()
        tensors["gammas"] = 0.5 + rand(4).abs()
        tensors["weights"] = rand(num_channels, 4)
    else:
        pairs = TYPES * (TYPES + 1) // 2
        tensors["knots"] = rand(pairs if radial == "pair tables" else 1, KNOTS, 2, num_channels)
        if radial == "affine":
            tensors["affine"] = torch.tensor([1.0, 0.2]).double() + 0.2 * rand(pairs, 2)
        if radial != "table":
            i, j = torch.triu_indices(TYPES, TYPES)
            pair_index = torch.zeros(TYPES, TYPES, dtype=torch.int64)
            pair_index[i, j] = pair_index[j, i] = torch.arange(pairs)
            options["atom_types"] = types
    if attention_scale:
        tensors["attention_scale"] = torch.tensor(0.4, dtype=torch.float64)
    tensors = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
    return Case(score, normalizer, radial, tensors, options, pair_index, real=real)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected number; NaN counts as infinite."""
    if got.shape != expected.shape:
        raise AssertionError(f"shapes {list(got.shape)} and {list(expected.shape)}")
    if not got.numel():
        return 0.0
    got, expected = got.detach().double(), expected.detach().double()
    error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    return error if error == error else float("inf")
