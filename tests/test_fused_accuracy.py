"""What the fused kernels lose to rounding, against what the reference loses.

The bfloat16 of Triton's interpreter is wrong (it truncates, and multiplies raw bits): float16
stands for it.
"""

from __future__ import annotations

import pytest
import torch
from cases import make_case
from fused import on
from passes import over_budget, typical_errors

DRAWS = 3
VARIANTS = [
    ("bias", "softmax", "table"),
    ("bias", "linear", "affine"),
    ("bias", "softmax", "gaussians"),
    ("filter", "linear", "pair tables"),
    ("filter", "softmax", "affine"),
]
DTYPES = {
    "triton": [torch.float32, torch.float16],
    "cuda": [torch.float32, torch.float16, torch.bfloat16],
}
OF_DTYPES = [x for b, dtypes in DTYPES.items() for x in on(b, [(d,) for d in dtypes])]
# Atoms and channels: of one warp, two and four, of whole molecules and sweeps, and of a bias by
# tensor cores and with sums in registers of each width.
LARGER = {
    "bias": [(18, 32), (33, 8), (50, 64), (70, 33), (64, 80), (129, 128), (66, 1)],
    "filter": [(18, 32), (33, 8), (20, 128), (66, 5)],
    "gaussians": [(18, 5), (40, 33), (70, 8)],
}
AT_LARGER = [
    (v, shape, dtype)
    for v in VARIANTS
    for shape in LARGER["gaussians" if v[2] == "gaussians" else v[0]]
    for dtype in DTYPES["cuda"]
    if v[0] == "bias" or dtype == torch.float32  # else computed in float32 too
]


def draws(*variant, dtype=torch.float32, count=DRAWS, **options):
    options = {"sizes": (7, 0, 5), "heads": 2, "channels": 8} | options
    cases = [make_case(*variant, "packed", seed=seed, **options) for seed in range(count)]
    for case in cases:  # 16 bits for features only
        case.tensors = {
            n: x.detach().to(dtype if n in "qkv" else torch.float32).requires_grad_()
            for n, x in case.tensors.items()
        }
    return cases


@pytest.mark.parametrize(("backend", "dtype"), OF_DTYPES, indirect=["backend"], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_passes_stay_within_twice_the_error_of_the_reference(variant, backend, dtype):
    assert not over_budget(typical_errors(draws(*variant, dtype=dtype), backend))


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[4]], ids=" ".join)
def test_a_force_step_stays_within_twice_the_error_of_the_reference(variant, backend):
    assert not over_budget(typical_errors(draws(*variant), backend, tangent=["positions"]))


@pytest.mark.parametrize(
    ("backend", "score", "offset"),
    [
        x
        for case in (("bias", 100.0), ("bias", 1000.0), ("filter", 100.0))
        for b in DTYPES
        for x in on(b, [case])
    ],
    indirect=["backend"],
    ids=str,
)
def test_large_scores_cost_a_softmax_no_more_than_the_reference(backend, score, offset):
    cases = draws(score, "softmax", "table")
    with torch.no_grad():
        for case in cases:
            case.tensors["knots"][:, :, 0] += offset
    assert not over_budget(typical_errors(cases, backend))


@pytest.mark.parametrize(("variant", "shape", "dtype"), AT_LARGER, ids=str)
def test_warps_and_sweeps_stay_within_twice_the_error_of_the_reference(
    variant, shape, dtype, emulated
):
    atoms, channels = shape
    shape = {"sizes": (atoms,), "heads": 1, "channels": channels}
    # Of four Gaussians there are four numbers: an average over few draws is luck.
    count = 12 if variant[2] == "gaussians" else DRAWS
    cases = draws(*variant, dtype=dtype, count=count, **shape)
    assert not over_budget(typical_errors(cases, "cuda"))
