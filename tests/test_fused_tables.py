"""The fused kernels at the ends of a table, and beyond."""

from __future__ import annotations

import pytest
import torch
from cases import SCORES
from fused import OF_CUDA, assert_equal, assert_passes_equal, at_its_ends, exact_case
from passes import passes
from test_ops import POLICIES


@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_distances_at_the_ends_of_a_table(policy, backend):
    for tangent in (None, ["positions"], ["knots"]):
        assert_passes_equal(at_its_ends(*policy, "table", "full"), backend, tangent=tangent)


@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_affine_maps_may_lead_below_and_beyond_the_table(policy, backend):
    case = exact_case(*policy, "affine", sizes=(4, 3), coincident=False)
    affine = torch.tensor([[1, 0], [-2, 1], [1, -1.5], [0, 2], [4, 0.5], [0.5, -30]]).double()
    case.tensors["affine"] = affine.requires_grad_()
    assert_passes_equal(case, backend)


@pytest.mark.parametrize("score", SCORES)
def test_two_atoms_at_one_point_have_no_force_on_each_other(score, backend):
    case = exact_case(score, "linear", layout="full", sizes=(2,))
    with torch.no_grad():
        case.tensors["positions"][0, 1] = case.tensors["positions"][0, 0]
    got = passes(case, backend)
    assert not bool(got["d positions"].any()) and not bool(got["dd positions"].any())
    assert_equal(got, passes(case, "reference"), OF_CUDA)


# Knots of one table: few, as many as fit into shared memory with their sums, without, and more.
KNOTS = [2, 3, 300]
MANY_KNOTS = [(n, sizes) for n in (500, 1000, 2500) for sizes in ((4, 3), (20,), (40,), (70,))]


@pytest.mark.parametrize(
    ("score", "knots", "sizes"),
    [*((s, n, (4, 3)) for s in SCORES for n in KNOTS), *(("bias", *x) for x in MANY_KNOTS)],
    ids=str,
)
def test_tables_of_any_number_of_knots(score, knots, sizes, emulated):
    case = exact_case(score, "softmax", "pair tables", sizes=sizes)
    pairs, _, _, channels = case.tensors["knots"].shape
    case.tensors["knots"] = torch.randn(pairs, knots, 2, channels, dtype=torch.float64)
    case.tensors["knots"].requires_grad_()
    case.r_max = 0.25 + (knots - 1) / 64
    assert_passes_equal(case, "cuda")
