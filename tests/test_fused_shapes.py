"""The fused kernels at every size: tiles, warps, molecules of a batch, layouts of memory."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, NORMALIZERS, RADIALS, SCORES, make_case
from fused import (
    EXACT,
    OF_CUDA,
    assert_equal,
    assert_passes_equal,
    detached,
    exact_case,
    on,
)
from passes import assert_nothing_of_no_atoms, largest_difference, passes
from test_cpu_robust import assert_same_bits, strided
from test_ops import POLICIES, operator_arguments

SHAPES = {  # N, H, D
    "bias": [
        *((1, 3, 8), (2, 2, 12), (5, 1, 80), (15, 1, 2), (16, 2, 16), (17, 1, 3), (31, 1, 24)),
        *((33, 1, 32), (64, 1, 64), (65, 2, 48), (100, 1, 2), (129, 1, 128)),
    ],
    "filter": [
        *((1, 1, 1), (2, 2, 12), (2, 1, 80), (3, 1, 48), (3, 1, 128), (5, 1, 64), (6, 1, 24)),
        *((5, 2, 16), (9, 1, 32), (15, 1, 2), (17, 1, 3), (17, 1, 128), (33, 1, 2), (65, 1, 1)),
    ],
}
# One warp, two and four; whole molecules and sweeps; where shared memory runs out, fewer warps.
MORE = [
    *((3, 5, 7), (7, 1, 1), (16, 1, 33), (17, 2, 64), (24, 1, 65), (31, 2, 96), (32, 1, 15)),
    *((33, 1, 5), (40, 2, 8), (47, 1, 33), (48, 1, 16), (49, 3, 4), (63, 1, 12), (64, 2, 24)),
    *((65, 1, 31), (66, 1, 128), (80, 1, 40), (96, 1, 1), (97, 2, 3), (130, 1, 80), (200, 1, 5)),
]
BATCHES = {
    "bias": [(3, 0, 33, 1, 17), (20, 34, 0)],
    "filter": [(3, 0, 9, 1, 17), (0, 34, 2)],
}
MORE_BATCHES = [(*range(9), 0, 0, 64), (0, 70, 3, 0, 0, 129), (16, 16, 15, 17, 1) * 5, (1,) * 300]
AT_SHAPES = [(score, n, shape) for score in SHAPES for n in NORMALIZERS for shape in SHAPES[score]]
AT_MORE = [(score, n, shape) for score in SCORES for n in NORMALIZERS for shape in MORE]
AT_BATCHES = [(score, n, b) for score in BATCHES for n in NORMALIZERS for b in BATCHES[score]]
AT_MORE_BATCHES = [(score, n, b) for score in SCORES for n in NORMALIZERS for b in MORE_BATCHES]


@pytest.mark.parametrize(
    ("backend", "score", "normalizer", "shape"),
    [*on("triton", AT_SHAPES), *on("cuda", AT_SHAPES + AT_MORE)],
    indirect=["backend"],
    ids=str,
)
def test_all_passes_equal_the_reference_at_odd_sizes(backend, score, normalizer, shape):
    atoms, heads, channels = shape
    number = (AT_SHAPES + AT_MORE).index((score, normalizer, shape))
    radials = RADIALS[:3] if score == "filter" else RADIALS
    radial, layout = radials[number % len(radials)], LAYOUTS[number % 2 * 2]
    shape = {"sizes": (atoms,), "heads": heads, "channels": channels}
    assert_passes_equal(exact_case(score, normalizer, radial, layout, **shape), backend)


@pytest.mark.parametrize(
    ("backend", "score", "normalizer", "sizes"),
    [*on("triton", AT_BATCHES), *on("cuda", AT_BATCHES + AT_MORE_BATCHES)],
    indirect=["backend"],
    ids=str,
)
def test_all_passes_equal_the_reference_for_molecules_of_all_sizes(
    backend, score, normalizer, sizes
):
    number = (AT_BATCHES + AT_MORE_BATCHES).index((score, normalizer, sizes))
    radial, layout = ("affine", "table")[number % 2], LAYOUTS[1 + number // 2 % 2]
    shape = {"sizes": sizes, "heads": 1, "channels": 2}
    assert_passes_equal(exact_case(score, normalizer, radial, layout, **shape), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_batches_without_atoms_give_nothing_and_a_gradient_of_zero(policy, layout, backend):
    assert_nothing_of_no_atoms(policy, layout, backend)


@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_strides_and_kinds_of_integers_do_not_matter(policy, backend):
    layout = ("masked", "packed")[POLICIES.index(policy) in (1, 2)]
    case = exact_case(*policy, "affine", layout, sizes=(4, 0, 6))
    expected = passes(case, backend)
    arguments = operator_arguments(case)
    for name in ("attention_bwd", "attention_bwd_bwd"):
        op = getattr(torch.ops.geot, name).default
        args = detached(arguments[name][:-1])
        floats = [isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in args]
        other = [strided(x) if f else x for x, f in zip(args, floats, strict=True)]
        for a, b in zip(op(*args, backend), op(*other, backend), strict=True):
            assert torch.equal(a, b), name
    case.tensors = {n: strided(x) for n, x in case.tensors.items()}
    for name in ("ptr", "atom_types"):
        if name in case.options:
            case.options[name] = case.options[name].int()
    case.pair_index = case.pair_index.int()
    assert_same_bits(passes(case, backend), expected)


@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_views_of_one_projection_and_expanded_cotangents(policy, backend):
    case = exact_case(*policy, layout="full", sizes=(5, 3), heads=2, channels=8)
    projected = torch.randn(2, 5, 3, 2, 8, dtype=torch.float64)
    heads_first = torch.randn(2, 2, 5, 8, dtype=torch.float64).transpose(1, 2)
    one = torch.randn(1, 1, 2, 8, dtype=torch.float64).expand(2, 5, 2, 8)
    for views in (projected.unbind(2), (projected[:, :, 1], heads_first, one)):
        results = []
        for b in (backend, "reference"):
            leaves = [x.detach().requires_grad_() for x in (*views, *case.tensors.values())]
            leaves = [*leaves[:3], *leaves[6:]]
            out = case.attention(*leaves, backend=b)
            first = torch.autograd.grad(out.sum(), leaves, create_graph=True)
            second = torch.autograd.grad(
                first[3].sum() + first[0].sum(), leaves, allow_unused=True
            )
            second = [
                torch.zeros_like(x) if dx is None else dx
                for dx, x in zip(second, leaves, strict=True)
            ]
            with torch.no_grad():
                weights = case.weights(*leaves, backend=b)
            results.append(dict(enumerate((out, weights, *first, *second))))
        assert largest_difference(*results)[1] <= 100 * EXACT


def test_views_of_a_packed_projection(backend):
    results = []
    projected = torch.randn(9, 3, 2, 8, dtype=torch.float64)
    for b in (backend, "reference"):
        case = exact_case(layout="packed", sizes=(5, 0, 4), channels=8)
        leaves = [x.detach().requires_grad_() for x in projected.unbind(1)]
        leaves += list(case.tensors.values())[3:]
        out = case.attention(*leaves, backend=b)
        results.append(dict(enumerate((out, *torch.autograd.grad(out.sum(), leaves)))))
    assert largest_difference(*results)[1] <= 100 * EXACT


@pytest.mark.parametrize("max_atoms", [None, 6, 40])
@pytest.mark.parametrize("policy", POLICIES[:3:2], ids=" ".join)
def test_max_atoms_may_be_given_unknown_or_too_large(policy, max_atoms, backend):
    case = exact_case(*policy, layout="packed", sizes=(6, 0, 2), heads=1)
    expected = passes(case, "reference")
    case.options["max_atoms"] = max_atoms
    assert_equal(passes(case, backend), expected, OF_CUDA)
    if max_atoms:
        with torch.no_grad():
            got, expected = (case.weights(backend=b) for b in (backend, "reference"))
        assert got.shape == (3, 1, max_atoms, max_atoms)
        assert largest_difference({"": got}, {"": expected})[1] <= EXACT


def test_the_scale_and_the_range_reach_the_kernels(backend):
    case = make_case("bias", "softmax", "table", sizes=(4, 3))
    case.options["scale"], case.r_min, case.r_max = -1.5, -0.5, 1.5
    assert_passes_equal(case, backend)
