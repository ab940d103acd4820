"""A way to compute an attention, its three passes, and the check that two ways agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

BUDGET = {"out": 1e-5, "gradient": 2e-4, "second gradient": 2e-4}
"""Largest allowed difference of two ways, relative to the largest number; the table's included."""


@dataclass
class Way:
    """One way to compute an attention: a function and tensors of its own.

    Attributes:
        function: `q, k, v, positions` to the output; or fewer of them.
        inputs: Leaves.
        cotangent: Of the output.
        parameters: Further leaves, which `function` reads.
        heads_first: Whether features are `[B, H, N, D]`, not `[B, N, H, D]`.
    """

    function: Callable[..., Tensor]
    inputs: list[Tensor]
    cotangent: Tensor
    parameters: list[Tensor] = field(default_factory=list)
    heads_first: bool = False

    def forward(self) -> Tensor:
        """The output, without a graph."""
        with torch.no_grad():
            return self.function(*self.inputs)

    def backward(self) -> tuple[Tensor, ...]:
        """Forward and backward: gradients of inputs and parameters."""
        leaves = (*self.inputs, *self.parameters)
        return torch.autograd.grad(self.function(*self.inputs), leaves, self.cotangent)

    def force_step(self) -> tuple[Tensor, ...]:
        """Trains on energies and forces: gradients of q, k, v and parameters.

        E_b = Σ out · cotangent over a molecule,   loss = Σ_b E_b² + Σ |dE/dx|²
        """
        energies = (self.function(*self.inputs) * self.cotangent).flatten(1).sum(1)
        (slope,) = torch.autograd.grad(energies.sum(), self.inputs[3], create_graph=True)
        loss = energies.square().sum() + slope.square().sum()
        return torch.autograd.grad(loss, (*self.inputs[:3], *self.parameters))

    def atoms_first(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Results of any pass, features as `[B, N, H, D]`."""
        if not self.heads_first:
            return list(results)
        return [x.transpose(1, 2) if x.ndim == 4 else x for x in results]


def check(ours: Way, other: Way, passes: Sequence[str], mask: Tensor | None = None) -> None:
    """Holds our results against another way's.

    Raises:
        RuntimeError: One differs by more than `BUDGET`.
    """
    kinds = {"forward": "out", "backward": "gradient", "force_step": "second gradient"}
    for name in passes:
        results = []
        for way in (ours, other):
            result = getattr(way, name)()
            results.append(way.atoms_first([result] if isinstance(result, Tensor) else result))
        if name == "forward" and mask is not None:
            results = [[out[mask] for out in outs] for outs in results]
        for number, (got, expected) in enumerate(zip(*results, strict=True)):
            error = relative_error(got, expected)
            if not error <= BUDGET[kinds[name]]:  # a NaN fails too
                raise RuntimeError(f"{name}, result {number}: relative error {error:.1e}")


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest number expected."""
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max())


def compiled(way: Way) -> Way:
    """A way under `torch.compile`, for these shapes alone."""
    torch._dynamo.reset()  # beyond a number of recompilations it would go on uncompiled
    way.function = torch.compile(way.function, dynamic=False, fullgraph=True)
    return way
