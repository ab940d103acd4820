"""All passes of one attention, by name: what tests of backends compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from cases import Case
from torch import Tensor

import geot_kernels as gk

ROUNDING = 1e-11  # float64 sums of some thousand terms in another order


def passes(
    case: Case,
    backend: str,
    *,
    tangent: Sequence[str] | None = None,
    tensors: dict[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The output, its gradients and their gradients, along random cotangents and tangents.

    Args:
        case: What to compute; `case.tensors` says in which dtypes everything is drawn.
        backend: Who computes.
        tangent: Names of the gradients that the second order differentiates; None takes all.
        tensors: In place of `case.tensors`, say the same numbers in another dtype.
        seed: Of cotangents and tangents.

    Returns:
        `out`, `d q` ..., and `dd out` (of its cotangent), `dd q` ....
    """
    g = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, name: str) -> Tensor:
        x = torch.randn(like.shape, generator=g, dtype=torch.float64)
        return x.to(case.tensors[name].dtype).to(like.dtype)

    tensors = tensors or case.tensors
    leaves = {n: x.detach().requires_grad_() for n, x in tensors.items()}
    out = case.attention(*leaves.values(), backend=backend)
    cotangent = draw(out, "q").requires_grad_()
    first = torch.autograd.grad(out, leaves.values(), cotangent, create_graph=True)
    dots = [draw(x, n) for n, x in zip(leaves, first, strict=True)]
    chosen = [i for i, n in enumerate(leaves) if tangent is None or n in tangent]
    wanted = {"out": cotangent, **leaves}
    second = torch.autograd.grad(
        [first[i] for i in chosen], wanted.values(), [dots[i] for i in chosen], allow_unused=True
    )
    pairs = zip(wanted.items(), second, strict=True)
    return {
        "out": out.detach(),
        **{f"d {n}": x.detach() for n, x in zip(leaves, first, strict=True)},
        **{f"dd {n}": torch.zeros_like(w) if x is None else x.detach() for (n, w), x in pairs},
    }


def in_float64(case: Case) -> dict[str, Tensor]:
    """The case's tensors, the same numbers in float64."""
    return {n: x.detach().double() for n, x in case.tensors.items()}


def largest_difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[str, float]:
    """The name and the size of the largest difference, relative to its tensor's numbers.

    Terms are of order 1: where they cancel, as for the softmax of a single atom, what is left of
    them is rounding, and is not measured by itself.
    """
    worst = "", 0.0
    for name, x in expected.items():
        assert got[name].shape == x.shape, name
        assert got[name].dtype == x.dtype, name
        if x.numel():
            difference = (got[name] - x).detach().abs().max().nan_to_num(torch.inf, torch.inf)
            error = float(difference / x.detach().abs().max().clamp(min=1e-2))
            worst = max(worst, (name, error), key=lambda pair: pair[1])
    return worst


def typical_errors(
    cases: Sequence[Case], backend: str, **options: Any
) -> dict[str, tuple[float, float]]:
    """What a backend typically loses to rounding, and what the reference loses in that dtype.

    A single draw says little, since either may be lucky: over draws that differ in their seeds,
    the ratio of two sound implementations reaches 10. So the error of each tensor, root mean
    square over its numbers relative to the largest of them, is averaged over draws by its
    logarithm, as one does with ratios.

    Returns:
        By name `(error, error of the reference)`, in units of rounding of the tensor's dtype.
    """
    logs: dict[str, list[Tensor]] = {}
    for seed, case in enumerate(cases):
        exact = passes(case, "reference", tensors=in_float64(case), seed=seed, **options)
        both = (passes(case, b, seed=seed, **options) for b in (backend, "reference"))
        for (name, x), *results in zip(exact.items(), *(p.values() for p in both), strict=True):
            unit = torch.finfo(results[0].dtype).eps * x.abs().max().clamp(min=1e-30)
            errors = torch.stack([(r.double() - x).square().mean().sqrt() / unit for r in results])
            logs.setdefault(name, []).append((errors.nan_to_num(torch.inf) + 0.1).log())
    means = {name: torch.stack(x).mean(0).exp() - 0.1 for name, x in logs.items()}
    return {name: (float(a), float(b)) for name, (a, b) in means.items()}


def over_budget(errors: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Those beyond the budget: twice what the reference loses, and one unit of rounding."""
    return {n: (a, b) for n, (a, b) in errors.items() if not a <= 2 * b + 1}


def assert_nothing_of_no_atoms(policy: tuple[str, str], layout: str, backend: str) -> None:
    """Batches without atoms: all of both orders is 0, and so are weights."""
    for molecules, atoms in ((0, 0), (0, 5), (3, 0), (2, 4)):
        shape = (molecules, atoms) if layout != "packed" else (0,)
        channels = 2 if policy[0] == "bias" else 6
        q, k, v = (torch.randn(*shape, 2, 3, requires_grad=True) for _ in range(3))
        positions = torch.randn(*shape, 3, requires_grad=True)
        knots = torch.randn(1, 9, 2, channels, requires_grad=True)
        options = {"score": policy[0], "normalizer": policy[1], "backend": backend}
        if layout == "packed":
            options["ptr"] = torch.zeros(molecules + 1, dtype=torch.int64)
        elif layout == "masked":
            options["mask"] = torch.zeros(shape, dtype=torch.bool)
        elif atoms and molecules:
            continue
        leaves = [q, k, v, positions, knots]
        table = gk.RadialTable(knots, 0.0, 5.0)
        out = gk.geo_attention(*leaves[:4], table, **options)
        assert out.shape == q.shape
        first = torch.autograd.grad(out.sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.sum() for x in first), leaves, allow_unused=True)
        for x in (out, *first, *(x for x in second if x is not None)):
            assert not bool(x.any())
        del options["normalizer"]
        with torch.no_grad():
            weights = gk.attention_weights(q, k, positions, table, **options)
        assert not bool(weights.any())
