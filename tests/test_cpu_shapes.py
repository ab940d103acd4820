"""The C++ kernels on what nobody thought of: shapes drawn by hypothesis, tracers, differences."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, NEEDS_CPU, NORMALIZERS, RADIALS, SCORES, VARIANTS, make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from passes import (
    ROUNDING,
    assert_nothing_of_no_atoms,
    in_float64,
    largest_difference,
    passes,
)
from test_ops import POLICIES

pytestmark = NEEDS_CPU
SIZES = st.lists(st.sampled_from([0, *range(1, 20), 31, 32, 33, 64, 65, 97]), max_size=9)


@st.composite
def problems(draw):
    score = draw(st.sampled_from(SCORES))
    radials = [r for r in RADIALS if (score, r) != ("filter", "gaussians")]
    sizes = draw(SIZES.filter(any))
    return make_case(
        score,
        draw(st.sampled_from(NORMALIZERS)),
        draw(st.sampled_from(radials)),
        draw(st.sampled_from(LAYOUTS)),
        sizes=tuple(sizes),
        heads=draw(st.integers(1, 20)),
        channels=draw(st.integers(1, 20)),
        dtype=draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(problems(), st.data())
def test_any_shape_agrees_with_plain_pytorch(case, data):
    dtype = case.tensors["q"].dtype
    if dtype == torch.bfloat16:
        case.tensors = {n: x.float() if n not in "qkv" else x for n, x in case.tensors.items()}
    tangent = data.draw(st.lists(st.sampled_from(list(case.tensors)), min_size=1, unique=True))
    expected = passes(case, "eager", tensors=in_float64(case), tangent=tangent)
    got = {n: x.double() for n, x in passes(case, "cpu", tangent=tangent).items()}
    name, error = largest_difference(got, expected)
    # In less than float64, only that nothing is grossly wrong: a cusp may be anywhere.
    assert error <= (ROUNDING if dtype == torch.float64 else 0.2), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_batches_without_atoms_give_nothing_and_a_gradient_of_zero(policy, layout):
    assert_nothing_of_no_atoms(policy, layout, "cpu")


DIFFERENCES = [v for v in VARIANTS if v[2:] in {("affine", "masked"), ("pair tables", "packed")}]


@pytest.mark.parametrize("variant", DIFFERENCES, ids=" ".join)
def test_derivatives_of_both_orders_are_those_of_differences(variant):
    case = make_case(*variant, attention_scale=True, coincident=False)
    case.backend = "cpu"
    tensors = tuple(case.tensors.values())
    assert torch.autograd.gradcheck(case.attention, tensors, atol=1e-7, fast_mode=True)
    assert torch.autograd.gradgradcheck(case.attention, tensors, atol=1e-6, fast_mode=True)


def test_fullgraph_compile_calls_the_kernels():
    case = make_case("bias", "softmax", "affine", attention_scale=True)
    case.backend = "cpu"

    def step(attention):
        for x in case.tensors.values():
            x.grad = None
        attention(*case.tensors.values()).square().sum().backward()
        return {n: x.grad for n, x in case.tensors.items()}

    expected = step(case.attention)
    got = step(torch.compile(case.attention, fullgraph=True))
    assert largest_difference(got, expected)[1] <= ROUNDING


def test_cpu_is_what_runs_unless_another_backend_is_named():
    case = make_case()
    with torch.profiler.profile() as profile:
        case.backend = None
        case.attention()
    assert any(e.name == "geot_cpu::attention" for e in profile.events())
