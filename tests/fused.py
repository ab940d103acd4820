"""What tests of fused kernels share: Triton's, interpreted, and CUDA's, emulated.

A test that takes the fixture `backend` runs twice: with "triton" in a process of its own, under
`TRITON_INTERPRET=1` (`make test` does that; without it the backend refuses tensors on a CPU), and
with "cuda" in the ordinary one.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType

import pytest
import torch
from cases import Case, make_case
from passes import largest_difference, passes

EXACT = 1e-12  # float64 sums of some hundred terms in another order
# Sums of integers, whose unit comes from a bound on what they could be: for the second order of a
# wide filter's softmax a rough one. All are far below the rounding of float32, 6e-8.
QUANTIZED = {"d knots": 1e-10, "dd knots": 2e-9}
# Here the gradients of an affine map are such sums too. Their bound has |f'| and |f''| in it, and
# all bounds grow as the batch does.
OF_CUDA = {"d knots": 1e-10, "dd knots": 1e-8, "d affine": 1e-10, "dd affine": 5e-8}
HOW = {"triton": (pytest.mark.interpreted,), "cuda": ()}


def on(backend: str, cases: Iterable) -> list:
    """Cases of the parameters `("backend", ...)`, with `indirect=["backend"]`."""
    return [pytest.param(backend, *case, marks=HOW[backend]) for case in cases]


def triton_module(name: str = "") -> ModuleType:
    """A module of the Triton backend; imported late, for triton is not everywhere."""
    return importlib.import_module(f"geot_kernels.backends.triton{name and '.'}{name}")


def exact_case(*variant: str, sizes: tuple[int, ...] = (4, 0, 3), **options) -> Case:
    """A case whose scalar arguments are the same in float32 and in float64."""
    case = make_case(*variant, sizes=sizes, **options)
    case.options["scale"], case.r_min, case.r_max = 0.75, 0.25, 4.25
    return case


def holed(variant: tuple[str, ...], sizes: tuple[int, ...], **options) -> Case:
    """A case whose masks have holes, at the first and the last atom too."""
    shape = {"sizes": sizes, "heads": 2, "channels": 3} | options
    case = exact_case(*variant, "masked", **shape)
    real = torch.rand(len(sizes), max(sizes)) < 0.6
    real[:, 0] = real[0, -1] = False
    real[:, 2] = True
    real[1:2] &= sizes[-1] > 0
    case.options["mask"] = case.real = real
    return case


def at_its_ends(*variant: str, far: float = 4.25, slope: float | None = None) -> Case:
    """Atoms at exactly 0, r_min, `far` from each other, below, between and beyond."""
    case = exact_case(*variant, sizes=(8,), heads=1, channels=2)
    along = torch.tensor([0, 0, 0.125, 0.25, 1.75, far, far + 0.125, 40.0], dtype=torch.float64)
    with torch.no_grad():
        case.tensors["positions"].zero_()[0, :, 1] = along
        if slope is not None:
            case.tensors["knots"][:, -1, 1] = slope
    return case


def detached(args: Iterable) -> list:
    """The same arguments without their history."""
    return [x.detach() if isinstance(x, torch.Tensor) else x for x in args]


def assert_equal(got: dict, expected: dict, budgets: dict[str, float] = QUANTIZED) -> None:
    """Compares passes; sums of integers by their own budget."""
    for name in expected:
        _, error = largest_difference({name: got[name]}, {name: expected[name]})
        assert error <= budgets.get(name, EXACT), (name, error)


def assert_passes_equal(case: Case, backend: str, **options) -> None:
    """Compares all passes with those of the reference."""
    budgets = {"triton": QUANTIZED, "cuda": OF_CUDA}[backend]
    got, expected = (passes(case, b, **options) for b in (backend, "reference"))
    assert_equal(got, expected, budgets)
