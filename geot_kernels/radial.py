"""Radial functions of the distance: bases, cutoffs, the network on top, and sums of Gaussians.

Everything here is ordinary PyTorch in the dtype of the distances, differentiable to any order;
`tabulate` makes a table of it for the kernels, which evaluate a `GaussianSum` also without one.
Distances are Å. Give them in float32 or float64: in bfloat16 a distance of 30 Å is itself off by
up to 0.06 Å. Fixed centers and widths are Python numbers, made into tensors at each call, and not
buffers, which `.bfloat16()` would round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LN_2 = math.log(2.0)


def _require(holds: bool, argument: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


def _integer(value: int, argument: str, least: int) -> int:
    holds = isinstance(value, Integral) and value >= least
    _require(holds, argument, f"an integer >= {least}", value)
    return int(value)


def _positive(value: float, argument: str) -> float:
    _require(0 < value < math.inf, argument, "a number > 0", value)
    return float(value)


def _spaced(first: float, last: float, number: int, like: Tensor) -> Tensor:
    """Computes evenly spaced numbers in the dtype and on the device of `like`: `[number]`."""
    return torch.linspace(first, last, number, dtype=like.dtype, device=like.device)


def gaussians(x: Tensor, centers: Tensor, gammas: Tensor | float) -> Tensor:
    """Computes `exp(-gamma_k (x - mu_k)^2)`: `[...]` to `[..., K]`."""
    # Most of many narrow Gaussians underflow, and there exp in float32, which PyTorch takes from
    # MKL on x86, is 10 times slower than exp2.
    return torch.exp2((x.unsqueeze(-1) - centers).square() * (gammas / -_LN_2))


def _sinc(x: Tensor) -> Tensor:
    """Computes `sin(x) / x`, with correct derivatives of every order at and near 0.

    (The second derivative of `torch.sinc` at 0 is NaN, and near 0 the first one cancels.)
    """
    near = x.abs() < 1
    square = torch.where(near, x, 0).square()
    series = torch.ones_like(x)
    for n in range(9, 0, -1):  # what is left out is below 1/21! = 2e-20
        series = 1 - square * series / (2 * n * (2 * n + 1))
    far = torch.where(near, 1, x)
    return torch.where(near, series, torch.sin(far) / far)


class CosineCutoff(nn.Module):
    """A smooth step from 1 at d = 0 to 0 at `r_max`, with one continuous derivative.

        f(d) = (cos(pi d / r_max) + 1) / 2  for d < r_max,  0 beyond

    Computed as `sin^2((1 - d/r_max) pi/2)`, which is the same without cancellation. The second
    derivative jumps at `r_max` by `pi^2 / (2 r_max^2)`: for Hessians and molecular dynamics take
    `PolynomialCutoff`.

    Args:
        r_max: Å.

    Raises:
        ValueError: `r_max` is not a positive number.

    Source: Behler and Parrinello, Phys. Rev. Lett. 98, 146401 (2007).
    """

    def __init__(self, r_max: float) -> None:
        super().__init__()
        self.r_max = _positive(r_max, "r_max")

    def forward(self, dist: Tensor) -> Tensor:
        """Evaluates the cutoff.

        Args:
            dist: `[...]`, Å; differentiable to any order but at `r_max`, where it is once.

        Returns:
            `[...]`, from 0 to 1, in the dtype of `dist`.
        """
        x = (dist / self.r_max).clamp(max=1)
        return torch.sin((1 - x) * (math.pi / 2)).square()

    def extra_repr(self) -> str:
        """Shows the settings."""
        return f"r_max={self.r_max}"


class PolynomialCutoff(nn.Module):
    """A smooth step from 1 at d = 0 to 0 at `r_max`, with two continuous derivatives.

        f(d) = 1 - (p+1)(p+2)/2 x^p + p(p+2) x^(p+1) - p(p+1)/2 x^(p+2),  x = d / r_max < 1
        f(d) = 0  beyond

    Computed as `(1-x)^3 sum_{n<p} (n+1)(n+2)/2 x^n`, which is the same without cancellation.
    The larger `p`, the later the step falls; `p = 3` is PhysNet's `1 - 10 x^3 + 15 x^4 - 6 x^5`.

    Args:
        r_max: Å.
        p: The exponent, 3 at least.

    Raises:
        ValueError: `r_max` is not a positive number, or `p` no integer >= 3.

    Source: Gasteiger et al., Directional Message Passing for Molecular Graphs, ICLR 2020, eq. 8
    (without the 1/d that the authors' code includes), `p = 6`.
    """

    def __init__(self, r_max: float, p: int = 6) -> None:
        super().__init__()
        self.r_max = _positive(r_max, "r_max")
        self.p = _integer(p, "p", 3)

    def forward(self, dist: Tensor) -> Tensor:
        """Evaluates the cutoff.

        Args:
            dist: `[...]`, Å; differentiable to any order but at `r_max`, where it is twice.

        Returns:
            `[...]`, from 0 to 1, in the dtype of `dist`.
        """
        x = (dist / self.r_max).clamp(max=1)
        total = torch.zeros_like(x)
        for n in range(self.p - 1, -1, -1):
            total = total * x + (n + 1) * (n + 2) // 2
        return (1 - x) ** 3 * total

    def extra_repr(self) -> str:
        """Shows the settings."""
        return f"r_max={self.r_max}, p={self.p}"


class _Basis(nn.Module):
    """Functions of the distance, all times one optional cutoff.

    Attributes:
        num_basis: Number of functions `K`.
        r_max: Range of the distance the basis is made for, Å.
        cutoff: What multiplies every function, or None.
    """

    def __init__(
        self, num_basis: int, r_max: float, cutoff: Callable[[Tensor], Tensor] | None
    ) -> None:
        super().__init__()
        self.num_basis = _integer(num_basis, "num_basis", 1)
        self.r_max = _positive(r_max, "r_max")
        self.cutoff = cutoff

    def functions(self, dist: Tensor) -> Tensor:
        """Evaluates the functions without the cutoff: `[...]` to `[..., K]`."""
        raise NotImplementedError

    def forward(self, dist: Tensor) -> Tensor:
        """Evaluates the basis.

        Args:
            dist: `[...]`, Å; differentiable to any order (as often as the cutoff, at its end).

        Returns:
            `[..., K]` in the dtype and on the device of `dist`.
        """
        basis = self.functions(dist)
        return basis if self.cutoff is None else basis * self.cutoff(dist).unsqueeze(-1)

    def extra_repr(self) -> str:
        """Shows the settings."""
        return f"num_basis={self.num_basis}, r_max={self.r_max}"


class GaussianBasis(_Basis):
    """Gaussians of the distance at evenly spaced centers.

        e_k(d) = exp(-gamma (d - mu_k)^2),  mu_k = r_min + k (r_max - r_min) / (K - 1)

    Nothing is cut off at `r_max`.

    Args:
        num_basis: Number of Gaussians `K`.
        r_max: The last center, Å.
        r_min: The first center, Å.
        gamma: Å^-2; None takes `1 / (2 s^2)` with the spacing `s` of the centers (one Gaussian:
            `s = r_max - r_min`), a standard deviation of one spacing.
        trainable: Makes Parameters of the centers and of one gamma each, `centers [K]` and
            `gammas [K]`. As any Parameter they are rounded by `.bfloat16()`.
        cutoff: Multiplies every function: `CosineCutoff`, `PolynomialCutoff` or any function of
            the distances `[...]`.

    Raises:
        ValueError: A number is out of its range.

    Source: Schütt et al., SchNet, NeurIPS 2017, filter-generating networks (no equation number):
    300 centers every 0.1 Å and gamma = 10 Å^-2, which is `GaussianBasis.geot()`.
    """

    def __init__(
        self,
        num_basis: int,
        r_max: float,
        *,
        r_min: float = 0.0,
        gamma: float | None = None,
        trainable: bool = False,
        cutoff: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(num_basis, r_max, cutoff)
        _require(-math.inf < r_min < r_max, "r_min", f"a number < r_max={r_max}", r_min)
        self.r_min = float(r_min)
        if gamma is None:
            spacing = (self.r_max - self.r_min) / max(self.num_basis - 1, 1)
            gamma = 0.5 / spacing**2
        self.gamma = _positive(gamma, "gamma")
        self.trainable = trainable
        if trainable:
            self.centers = nn.Parameter(torch.linspace(self.r_min, self.r_max, self.num_basis))
            self.gammas = nn.Parameter(torch.full((self.num_basis,), self.gamma))

    @classmethod
    def geot(cls) -> GaussianBasis:
        """GeoT's and SchNet's basis: `exp(-10 (d - 0.1 k)^2)`, k = 0..299."""
        return cls(300, 29.9, gamma=10.0)

    def functions(self, dist: Tensor) -> Tensor:
        """Evaluates the Gaussians without the cutoff: `[...]` to `[..., K]`."""
        if self.trainable:
            return gaussians(dist, self.centers.to(dist.dtype), self.gammas.to(dist.dtype))
        return gaussians(dist, _spaced(self.r_min, self.r_max, self.num_basis, dist), self.gamma)


class ExponentialNormalBasis(_Basis):
    """Gaussians of `exp(-alpha d)`: dense at short distances, wide at long ones.

        e_k(d) = exp(-beta (exp(-alpha d) - mu_k)^2)
        mu_k = exp(-r_max) + k (1 - exp(-r_max)) / (K - 1)
        beta = (2/K (1 - exp(-r_max)))^-2

    (`r_max` as a number of Å.) The published one is this times a cosine cutoff: give it as
    `cutoff=CosineCutoff(r_max)`. Without, the functions go to constants beyond `r_max`.

    Args:
        num_basis: Number of functions `K`.
        r_max: Range of the distance, Å.
        alpha: Å^-1; None takes `5 / r_max`.
        cutoff: Multiplies every function, as for `GaussianBasis`.

    Raises:
        ValueError: A number is out of its range.

    Source: `ExpNormalSmearing` in the code of TorchMD-NET (Thölke and De Fabritiis, ICLR 2022),
    after PhysNet; its lower cutoff is 0 here and nothing is trained.
    """

    def __init__(
        self,
        num_basis: int,
        r_max: float,
        *,
        alpha: float | None = None,
        cutoff: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(num_basis, r_max, cutoff)
        self.alpha = 5 / self.r_max if alpha is None else _positive(alpha, "alpha")

    def functions(self, dist: Tensor) -> Tensor:
        """Evaluates the functions without the cutoff: `[...]` to `[..., K]`."""
        first = math.exp(-self.r_max)
        beta = (2 / self.num_basis * (1 - first)) ** -2
        centers = _spaced(first, 1.0, self.num_basis, dist)
        return gaussians(torch.exp(-self.alpha * dist), centers, beta)

    def extra_repr(self) -> str:
        """Shows the settings."""
        return f"{super().extra_repr()}, alpha={self.alpha}"


class PhysNetBasis(ExponentialNormalBasis):
    """PhysNet's basis: Gaussians of `exp(-d)` times a polynomial cutoff, 0 beyond `r_max`.

        e_k(d) = phi(d) exp(-beta (exp(-d) - mu_k)^2)
        phi(d) = 1 - 10 x^3 + 15 x^4 - 6 x^5,  x = d / r_max < 1

    with `mu_k` and `beta` as in `ExponentialNormalBasis`, `alpha = 1` Å^-1. The published network
    trains both from here and counts `k` from the other end; these are fixed.

    Args:
        num_basis: Number of functions `K`.
        r_max: Where the cutoff ends, Å.

    Raises:
        ValueError: A number is out of its range.

    Source: Unke and Meuwly, PhysNet, J. Chem. Theory Comput. 15, 3678 (2019), eq. 7, and
    `RBFLayer` in the authors' code.
    """

    def __init__(self, num_basis: int, r_max: float) -> None:
        super().__init__(num_basis, r_max, alpha=1.0, cutoff=PolynomialCutoff(r_max, p=3))


class BesselBasis(_Basis):
    """Spherical Bessel functions of order 0 that vanish at `r_max`.

        e_k(d) = sqrt(2 / r_max) sin(k pi d / r_max) / d,  k = 1..K

    At d = 0 the value is `sqrt(2 / r_max) k pi / r_max`, the slope 0 and the second derivative
    `-(k pi / r_max)^2 / 3` times the value, also under automatic differentiation.
    Beyond `r_max` the functions go on as the formula says; give a `cutoff` to end them there
    (the published network multiplies by `PolynomialCutoff(r_max, p=6)`).

    Args:
        num_basis: Number of functions `K`.
        r_max: Where all functions vanish, Å.
        cutoff: Multiplies every function, as for `GaussianBasis`.

    Raises:
        ValueError: A number is out of its range.

    Source: Gasteiger et al., Directional Message Passing for Molecular Graphs, ICLR 2020, eq. 7;
    frequencies are fixed.
    """

    def __init__(
        self,
        num_basis: int,
        r_max: float,
        *,
        cutoff: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(num_basis, r_max, cutoff)

    def functions(self, dist: Tensor) -> Tensor:
        """Evaluates the functions without the cutoff: `[...]` to `[..., K]`."""
        k = torch.arange(1, self.num_basis + 1, dtype=dist.dtype, device=dist.device)
        frequency = k * (math.pi / self.r_max)
        return _sinc(dist.unsqueeze(-1) * frequency) * (frequency * math.sqrt(2 / self.r_max))


def shifted_softplus(x: Tensor) -> Tensor:
    """Computes `ssp(x) = log(1 + exp(x)) - log(2)`, which is 0 at 0.

    Args:
        x: `[...]`; differentiable to any order.

    Returns:
        `[...]` in the dtype of `x`.

    Source: Schütt et al., SchNet, NeurIPS 2017.
    """
    # Beyond the threshold softplus returns x: at 40 that is exact in float64, and at the default
    # 20 a jump of 2e-9.
    return F.softplus(x, threshold=40.0) - _LN_2


class ShiftedSoftplus(nn.Module):
    """The activation `ssp(x) = log(1 + exp(x)) - log(2)`; see `shifted_softplus`."""

    def forward(self, x: Tensor) -> Tensor:
        """Evaluates the activation: `[...]` to `[...]`."""
        return shifted_softplus(x)


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "ssp": ShiftedSoftplus,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
}

Activation = str | Callable[[Tensor], Tensor]


def _activation(value: Activation, argument: str) -> Callable[[Tensor], Tensor]:
    if isinstance(value, str) and value in _ACTIVATIONS:
        return _ACTIVATIONS[value]()
    expected = f"one of {', '.join(_ACTIVATIONS)}, a Module or a function"
    if isinstance(value, str | type) or not callable(value):
        raise ValueError(f"{argument}: expected {expected}, got {value!r}")
    return value


class _Linear(nn.Linear):
    """`nn.Linear` in the dtype of its input, whatever the dtype of its parameters."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class RadialMLP(nn.Module):
    """A network on a radial basis: one function of the distance for each channel.

        y_0 = e(d)                         or, with types,  e(d) followed by a[t_i] + a[t_j]
        y_l = act(y_{l-1} W_l + b_l)       for each hidden layer
        f(d) = final(y_L W + b) cutoff(d)

    GeoT's filter, `ssp(ssp(e W_1 + b_1) W_2 + b_2)` of SchNet's 300 Gaussians, is
    `RadialMLP(GaussianBasis.geot(), 64, H * D, activation="ssp", final_activation="ssp")`, and
    with its atom embedding `num_types=200`. Computes in the dtype of the distances, to which the
    parameters are cast. Layers start as `nn.Linear` and `nn.Embedding` do.

    Args:
        basis: Distances `[M]`, Å, to `[M, K]`, with an attribute `num_basis = K`.
        hidden: Width of the hidden layer, or of each one; `()` for none.
        num_channels: Radial channels `C`: `H` for the score "bias", `H*D` for "filter".
        activation: After each hidden layer: "silu" (the usual one in the field today), "ssp",
            "gelu", "tanh", "elu", "relu", a Module (one for all layers) or a function. With
            "relu" forces jump, with "elu" their derivatives do.
        final_activation: After the last layer, likewise; None for none.
        cutoff: Multiplies the result: `CosineCutoff`, `PolynomialCutoff` or any function of the
            distances `[M]`.
        num_types: Number of atom types `T`; None for a function of the distance alone.
        type_dim: Width of the embedding `a [T, type_dim]` of the types.

    Attributes:
        num_channels: Radial channels `C`.
        takes_types: Whether `forward` needs the types of the two atoms.

    Raises:
        ValueError: A number is out of its range, `basis` has no `num_basis`, or an activation is
            unknown.

    Source: filters as in Schütt et al., SchNet, NeurIPS 2017; `SiLU` as in PaiNN and TorchMD-NET.
    """

    def __init__(
        self,
        basis: nn.Module,
        hidden: int | Sequence[int],
        num_channels: int,
        *,
        activation: Activation = "silu",
        final_activation: Activation | None = None,
        cutoff: Callable[[Tensor], Tensor] | None = None,
        num_types: int | None = None,
        type_dim: int = 64,
    ) -> None:
        super().__init__()
        inputs: int = getattr(basis, "num_basis", 0)
        _require(inputs > 0, "basis", "a Module with num_basis", basis)
        widths = hidden if isinstance(hidden, Sequence) else (hidden,)
        self.basis = basis
        self.num_channels = _integer(num_channels, "num_channels", 1)
        self.takes_types = num_types is not None
        if num_types is not None:
            embeddings = _integer(num_types, "num_types", 1)
            self.type_embedding = nn.Embedding(embeddings, _integer(type_dim, "type_dim", 1))
            inputs += type_dim
        sizes = [inputs, *(_integer(width, "hidden", 1) for width in widths), num_channels]
        self.layers = nn.ModuleList(map(_Linear, sizes[:-1], sizes[1:]))
        self.activation = _activation(activation, "activation")
        self.final_activation = (
            None if final_activation is None else _activation(final_activation, "final_activation")
        )
        self.cutoff = cutoff

    def forward(
        self, dist: Tensor, types_i: Tensor | None = None, types_j: Tensor | None = None
    ) -> Tensor:
        """Evaluates the function; symmetric in the two types.

        Args:
            dist: `[M]`, Å; differentiable as often as basis, activations and cutoff are.
            types_i: `[M]` int, types 0..T-1 of the first atoms, where `takes_types`.
            types_j: `[M]` int, of the second atoms.

        Returns:
            `[M, C]` in the dtype of `dist`; differentiable in the parameters as in `dist`.

        Raises:
            ValueError: Types are missing, or given to a function that takes none.
        """
        out: Tensor = self.basis(dist)
        if self.takes_types:
            if types_i is None or types_j is None:
                raise ValueError("types_i, types_j: expected atom types, got None")
            embedding = self.type_embedding.weight.to(dist.dtype)
            out = torch.cat((out, embedding[types_i] + embedding[types_j]), dim=-1)
        elif types_i is not None or types_j is not None:
            raise ValueError("types_i, types_j: expected None as num_types=None, got atom types")
        for layer in self.layers[:-1]:
            out = self.activation(layer(out))
        out = self.layers[-1](out)
        if self.final_activation is not None:
            out = self.final_activation(out)
        return out if self.cutoff is None else out * self.cutoff(dist).unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class GaussianSum:
    """Sums of Gaussians of the distance, which kernels evaluate exactly, without a table.

        f_c(d) = sum_k w_ck exp(-gamma_k (d - mu_k)^2)

    A pytree: it can be an argument of `torch.export`, `make_fx` and `torch.compile`d functions.

    Attributes:
        centers: `mu [K]`, Å. Differentiable, to any order.
        gammas: `gamma [K]`, Å^-2. Differentiable, to any order.
        weights: `w [C, K]`, in the unit of the function. Differentiable, to any order.

    Source: `docs/math.md`, section 5.
    """

    # No __post_init__ that checks: pytree functions build this class with any leaves.
    centers: Tensor
    gammas: Tensor
    weights: Tensor

    @property
    def num_channels(self) -> int:
        """Radial channels `C`."""
        return self.weights.shape[0]

    def __call__(self, dist: Tensor) -> Tensor:
        """Evaluates the sums.

        Args:
            dist: `[...]`, Å; differentiable to any order.

        Returns:
            `[..., C]`, in the dtype to which `dist`, `centers` and `gammas` promote.
        """
        phi = gaussians(dist, self.centers, self.gammas)
        return F.linear(phi, self.weights.to(phi.dtype))


torch.export.register_dataclass(GaussianSum, serialized_type_name="geot_kernels.GaussianSum")
