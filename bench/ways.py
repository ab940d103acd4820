"""A way to compute an attention, its passes, and the checks that it computes the right thing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

BUDGET = {"out": 1e-5, "gradient": 2e-4, "second gradient": 2e-4}
"""Largest allowed difference of two ways, relative to the largest number; the table's included."""

FEATURES = ("q", "k", "v", "positions")
PASSES = ("forward", "backward+table", "force_step", "backward", "training")
"""`backward`: q, k, v, positions (or the bias); `+table`: and the radial parameters; `training`:
these, but not the positions; `force_step`: see `Way.force_step`."""
MEASURED = PASSES[:3]  # by the suite

Results = dict[str, Tensor]


def kind(name: str) -> str:
    """Of the results of a pass: a key of `BUDGET`."""
    return {"forward": "out", "force_step": "second gradient"}.get(name, "gradient")


def wants(name: str, leaf: str) -> bool:
    """Whether a pass needs the gradient of a leaf."""
    if name in ("forward", "backward"):
        return name == "backward" and leaf in (*FEATURES, "bias")
    return name != "training" or leaf != "positions"


@dataclass
class Way:
    """One way to compute an attention: a function and tensors of its own.

    Attributes:
        function: `q, k, v, positions` to the output; or fewer of them.
        inputs: Leaves.
        cotangent: Of the output.
        parameters: Further leaves, which `function` reads.
        heads_first: Whether features are `[B, H, N, D]`, not `[B, N, H, D]`.
        names: Of the parameters.
        project: Makes results comparable to those of the oracle, for the check alone.
        step: Takes the place of `force_step`.
    """

    function: Callable[..., Tensor]
    inputs: list[Tensor]
    cotangent: Tensor
    parameters: list[Tensor] = field(default_factory=list)
    heads_first: bool = False
    names: tuple[str, ...] = ()
    project: Callable[[Results], Results] | None = None
    step: Callable[[], tuple[Tensor, ...]] | None = None

    def leaves(self) -> dict[str, Tensor]:
        """Inputs and parameters by name."""
        named = dict(zip(FEATURES, self.inputs, strict=False))
        return named | dict(zip(self.names, self.parameters, strict=True))

    def prepare(self, name: str) -> Way:
        """Lets require a gradient what a pass needs one of, and nothing else."""
        for leaf, tensor in self.leaves().items():
            tensor.requires_grad_(name == "force_step" or wants(name, leaf))
        return self

    def call(self, name: str) -> Callable[[], Any]:
        """A pass, by its name."""
        return {"forward": self.forward, "force_step": self.force_step}.get(name, self.backward)

    def named(self, name: str, values: Any) -> Results:
        """Results of a pass by name, features as `[B, N, H, D]`."""
        if name == "forward":
            names = ["out"]
        else:
            names = [n for n, x in self.leaves().items() if x.requires_grad]
            names = [f"d {n}" for n in names if name != "force_step" or n != "positions"]
        values = [values] if isinstance(values, Tensor) else values
        results = dict(zip(names, values, strict=True))
        if self.heads_first:
            features = results.keys() & {"out", "d q", "d k", "d v"}
            results |= {n: results[n].transpose(1, 2) for n in features}
        return results if self.project is None else self.project(results)

    def forward(self) -> Tensor:
        """The output, without a graph."""
        with torch.no_grad():
            return self.function(*self.inputs)

    def backward(self) -> tuple[Tensor, ...]:
        """Forward and backward: gradients of the inputs and parameters that require one."""
        leaves = [x for x in (*self.inputs, *self.parameters) if x.requires_grad]
        return torch.autograd.grad(self.function(*self.inputs), leaves, self.cotangent)

    def force_step(self) -> tuple[Tensor, ...]:
        """Trains on energies and forces: gradients of q, k, v and parameters.

        E_b = Σ out · cotangent over a molecule,   loss = Σ_b E_b² + Σ |dE/dx|²

        Energies of 16-bit features are summed in float32.
        """
        if self.step is not None:
            return self.step()
        energies = _wide(self.function(*self.inputs)) * _wide(self.cotangent)
        energies = energies.flatten(1).sum(1)
        (slope,) = torch.autograd.grad(energies.sum(), self.inputs[3], create_graph=True)
        loss = energies.square().sum() + slope.square().sum()
        return torch.autograd.grad(loss, (*self.inputs[:3], *self.parameters))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest number expected."""
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max())


def errors(got: Results, expected: Results) -> dict[str, float]:
    """Relative errors of those results that the other way has too."""
    return {n: relative_error(x, expected[n]) for n, x in got.items() if n in expected}


def budgets(name: str, losses: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """What each result of a pass may lose.

    Twice what eager PyTorch loses in that dtype, one unit of its rounding, and `BUDGET`, for the
    table and for float32 sums in another order.
    """
    allowed = BUDGET[kind(name)] + torch.finfo(dtype).eps
    return {result: allowed + 2 * loss for result, loss in losses.items()}


def closest(
    found: Iterable[tuple[str, float]], allowed: dict[str, float]
) -> tuple[str, float, float]:
    """Which of some errors comes closest to its budget, that error, and that budget."""

    def share(item: tuple[str, float]) -> float:
        ratio = item[1] / allowed[item[0]]
        return math.inf if math.isnan(ratio) else ratio

    result, error = max(found, key=share)
    return result, error, allowed[result]


def verdict(result: str, error: float, budget: float) -> dict[str, str]:
    """Columns of what `closest` found."""
    columns = ("worst_result", "relative_error", "error_budget")
    return dict(zip(columns, (result, f"{error:.2g}", f"{budget:.2g}"), strict=True))


def refuse_wrong(result: str, error: float, budget: float) -> None:
    """Raises an ArithmeticError where the error that `closest` found is beyond its budget."""
    if not error <= budget:  # a NaN fails too
        raise ArithmeticError(f"wrong: {result} is off by {error:.2g}, allowed {budget:.2g}")


def compiled(way: Way) -> Way:
    """A way under `torch.compile`, for these shapes alone."""
    way.function = torch.compile(way.function, dynamic=False, fullgraph=True)
    return way


def compiled_force_step(way: Way) -> Way:
    """A way whose step on forces is compiled, which takes a trace: `torch.compile` alone refuses.

    The trace is made at the first call, once it is known what requires a gradient.
    """
    made: list[Callable[..., Any]] = []

    def step() -> Any:
        if not made:
            graph = make_fx(lambda *inputs: replace(way, inputs=[*inputs], step=None).force_step())
            made.append(torch.compile(graph(*way.inputs), dynamic=False, fullgraph=True))
        with torch.no_grad():
            return made[0](*way.inputs)

    return replace(way, step=step)


def pair_distance(positions: Tensor, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Of two atoms, for a `score_mod` of FlexAttention; its derivative is 0 where it is 0."""
    square = sum((positions[b, i, axis] - positions[b, j, axis]) ** 2 for axis in range(3))
    apart = square > 0
    return torch.where(apart, torch.sqrt(torch.where(apart, square, 1.0)), 0.0)


def gaussian_score_mod(
    positions: Tensor,
    centers: list[float],
    gammas: list[float],
    weights: Tensor,
    mask: Tensor | None = None,
) -> Callable[..., Tensor]:
    """A `score_mod` that adds a sum of Gaussians; it knows no vectors, so the sum is unrolled."""
    log2e = 1.4426950408889634

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        dist = pair_distance(positions, b, i, j)
        for n, (center, gamma) in enumerate(zip(centers, gammas, strict=True)):
            score = score + weights[h, n] * torch.exp2((dist - center) ** 2 * (-gamma * log2e))
        return score if mask is None else torch.where(mask[b, j], score, -math.inf)

    return score_mod


def table_score_mod(
    positions: Tensor,
    knots: Tensor,
    r_min: float,
    r_max: float,
    mask: Tensor | None = None,
    maps: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Callable[..., Tensor]:
    """A `score_mod` that adds the spline of a table, knots `[G+1, 2, H]`.

    `maps`: atom types `[B, N]`, the number of each pair of types `[T, T]`, and `(m, c)` `[P, 2]`.
    """
    intervals = knots.shape[0] - 1

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        z = pair_distance(positions, b, i, j)
        if maps is not None:
            types, index, affine = maps
            pair = index[types[b, i], types[b, j]]
            z = affine[pair, 0] * z + affine[pair, 1]
        at = torch.clamp((z - r_min) * (intervals / (r_max - r_min)), 0.0, float(intervals))
        g = torch.clamp(at.to(torch.int32), max=intervals - 1)
        t = at - g
        u = 1 - t
        low = (1 + 2 * t) * u * u * knots[g, 0, h] + t * u * u * knots[g, 1, h]
        high = t * t * (3 - 2 * t) * knots[g + 1, 0, h] - t * t * u * knots[g + 1, 1, h]
        score = score + low + high
        return score if mask is None else torch.where(mask[b, j], score, -math.inf)

    return score_mod
