"""What the Triton kernels, interpreted, lose to rounding, against what the reference loses.

The interpreter's bfloat16 is wrong (it truncates, and multiplies raw bits): float16 stands for it.
"""

from __future__ import annotations

import pytest
import torch
from cases import make_case
from passes import over_budget, typical_errors
from test_triton import module

pytestmark = pytest.mark.interpreted
DRAWS = 3
VARIANTS = [
    ("bias", "softmax", "table"),
    ("bias", "linear", "affine"),
    ("bias", "softmax", "gaussians"),
    ("filter", "linear", "pair tables"),
    ("filter", "softmax", "affine"),
]


def draws(*variant, dtype=torch.float32, **options):
    options = {"sizes": (7, 0, 5), "heads": 2, "channels": 8} | options
    cases = [make_case(*variant, "packed", seed=seed, **options) for seed in range(DRAWS)]
    for case in cases:  # 16 bits for features only
        case.tensors = {
            n: x.detach().to(dtype if n in "qkv" else torch.float32).requires_grad_()
            for n, x in case.tensors.items()
        }
    return cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_passes_stay_within_twice_the_error_of_the_reference(variant, dtype):
    assert not over_budget(typical_errors(draws(*variant, dtype=dtype), "triton"))


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[4]], ids=" ".join)
def test_a_force_step_stays_within_twice_the_error_of_the_reference(variant):
    assert not over_budget(typical_errors(draws(*variant), "triton", tangent=["positions"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("normalizer", ["softmax", "linear"])
def test_tiles_and_rows_stay_within_twice_the_error_of_the_reference(
    normalizer, dtype, monkeypatch
):
    monkeypatch.setattr(module("launch"), "_PAIRS_FOR_ROWS", 0)
    cases = draws("bias", normalizer, "table", dtype=dtype, sizes=(70,), heads=1)
    assert not over_budget(typical_errors(cases, "triton"))


@pytest.mark.parametrize(
    ("score", "offset"), [("bias", 100.0), ("bias", 1000.0), ("filter", 100.0)]
)
def test_large_scores_cost_a_softmax_no_more_than_the_reference(score, offset):
    cases = draws(score, "softmax", "table")
    with torch.no_grad():
        for case in cases:
            case.tensors["knots"][:, :, 0] += offset
    assert not over_budget(typical_errors(cases, "triton"))
