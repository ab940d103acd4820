"""What users count on at the edges: padding, empty and single molecules, sizes, dtypes, memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import CPU, NORMALIZERS, SCORES, VARIANTS, make_case, relative_error

import geot_kernels as gk
from geot_kernels.backends import eager
from geot_kernels.backends.eager import pair
from geot_kernels.backends.inputs import Tangent
from geot_kernels.checks import make_inputs

BACKENDS = ("reference", "eager", CPU)
POLICIES = list(itertools.product(SCORES, NORMALIZERS))


def problem(batch, atoms, heads, channels, score="bias", dtype=torch.float32, seed=0):
    """`q, k, v, positions` and a smooth table, all differentiable."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(batch, atoms, heads, channels, dtype=dtype) for _ in range(3))
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    positions = 2 * torch.randn(batch, atoms, 3, dtype=geometry)
    width = heads if score == "bias" else heads * channels
    weights = torch.randn(width, 8, dtype=geometry)
    gaussians = gk.GaussianSum(
        torch.linspace(0, 6, 8, dtype=geometry), torch.full((8,), 0.5).to(geometry), weights
    )
    table = gk.tabulate(gaussians, 8.0, 128)
    leaves = [x.requires_grad_() for x in (q, k, v, positions, table.knots)]
    return leaves, lambda knots: gk.RadialTable(knots, table.r_min, table.r_max)


def gradients(leaves, make_table, second=True, **options):
    """Output, gradients, and gradients of the squared forces."""
    out = gk.geo_attention(*leaves[:4], make_table(leaves[4]), **options)
    cotangent = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    loss = (out * cotangent).sum() + out.float().square().sum().to(out.dtype)
    first = torch.autograd.grad(loss, leaves, create_graph=second)
    if not second:
        return [x.detach() for x in (out, *first)]
    second_order = torch.autograd.grad(first[3].square().sum(), leaves)
    return [x.detach() for x in (out, *first, *second_order)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v[3] == "masked"], ids=" ".join)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_garbage_in_padded_rows_reaches_nothing(variant, backend, garbage):
    case = make_case(*variant, attention_scale=True)
    padding = ~case.real
    dirty = {}
    for name, x in case.tensors.items():
        dirty[name] = x.detach().clone()
        if name in ("q", "k", "v", "positions"):
            dirty[name][padding] = garbage
        dirty[name].requires_grad_()
    options = {}
    if "atom_types" in case.options:
        options["atom_types"] = case.options["atom_types"].masked_fill(padding, -1000)

    def results(tensors, cotangent_garbage, **options):
        out = case.attention(*tensors, backend=backend, **options)
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape).clone()
        cotangent[padding] = cotangent_garbage
        first = torch.autograd.grad(out, tensors, cotangent, create_graph=True)
        tangents = [torch.full_like(x, 0.3) for x in first]
        for name, tangent in zip(case.tensors, tangents, strict=True):
            if name in ("q", "k", "v", "positions"):
                tangent[padding] = cotangent_garbage
        second = torch.autograd.grad(first, tensors, tangents)
        return [out, *first, *second]

    clean = results(list(case.tensors.values()), 0.0)
    for a, b in zip(results(list(dirty.values()), garbage, **options), clean, strict=True):
        assert bool(a.isfinite().all())
        assert torch.equal(a, b)
    names = ["out", *case.tensors]
    for name, x in zip(names, clean, strict=False):
        if name in ("out", "q", "k", "v", "positions"):
            assert bool((x[padding] == 0).all()), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0), (3, 1), (1, 2)])
def test_empty_and_single_molecules_are_defined(policy, backend, shape):
    score, normalizer = policy
    leaves, make_table = problem(*shape, 2, 3, score)
    results = gradients(leaves, make_table, score=score, normalizer=normalizer, backend=backend)
    assert results[0].shape == (*shape, 2, 3)
    assert all(bool(x.isfinite().all()) for x in results)
    if normalizer == "softmax" and shape[1] == 1:
        assert torch.equal(results[0], leaves[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(), (0,), (0, 0), (1, 0, 3)])
def test_empty_packed_batches_are_defined(backend, sizes):
    (q, k, v, positions, knots), make_table = problem(1, sum(sizes), 2, 3)
    packed = [x.detach()[0].requires_grad_() for x in (q, k, v, positions)]
    ptr = torch.tensor([0, *itertools.accumulate(sizes)])
    results = gradients([*packed, knots], make_table, ptr=ptr, backend=backend)
    assert results[0].shape == (sum(sizes), 2, 3)
    assert all(bool(x.isfinite().all()) for x in results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_packed_equals_padded_and_ignores_what_max_atoms_is(policy, backend):
    score, normalizer = policy
    sizes = [5, 0, 2, 7]
    leaves, make_table = problem(4, 7, 2, 4, score, torch.float64)
    mask = torch.arange(7) < torch.tensor(sizes)[:, None]
    options = {"score": score, "normalizer": normalizer, "backend": backend}
    padded = gradients(leaves, make_table, mask=mask, **options, second=False)
    packed_leaves = [x.detach()[mask].requires_grad_() for x in leaves[:4]] + [leaves[4]]
    ptr = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    for max_atoms in (None, 7, 12):
        out = gk.geo_attention(
            *packed_leaves[:4],
            make_table(packed_leaves[4]),
            ptr=ptr,
            max_atoms=max_atoms,
            **options,
        )
        assert relative_error(out, padded[0][mask]) <= 1e-13
        weights = gk.attention_weights(
            *packed_leaves[:2],
            packed_leaves[3],
            make_table(leaves[4]),
            ptr=ptr,
            max_atoms=max_atoms,
            **options,
        )
        assert weights.shape == (4, 2, max_atoms or 7, max_atoms or 7)


@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
@pytest.mark.parametrize("channels", [2, 8, 12, 16, 24, 32, 48, 64, 80, 128])
def test_every_head_dimension_agrees_with_the_reference(policy, channels):
    score, normalizer = policy
    leaves, make_table = problem(2, 7, 2, channels, score, torch.float64)
    options = {"score": score, "normalizer": normalizer}
    got = gradients(leaves, make_table, backend="eager", **options)
    expected = gradients(leaves, make_table, backend="reference", **options)
    assert max(relative_error(a, b) for a, b in zip(got, expected, strict=True)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
@pytest.mark.parametrize("atoms", [1, 2, 17, 31, 33, 65])
def test_errors_stay_within_twice_those_of_the_reference(policy, dtype, atoms):
    score, normalizer = policy
    leaves, make_table = problem(2, atoms, 2, 16, score, dtype)
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    options = {"score": score, "normalizer": normalizer, "second": dtype == torch.float32}
    exact = gradients(exact_leaves, make_table, backend="reference", **options)
    by_reference = gradients(leaves, make_table, backend="reference", **options)
    got = gradients(leaves, make_table, backend="eager", **options)
    for index, (a, r, e) in enumerate(zip(got, by_reference, exact, strict=True)):
        largest = float(e.abs().max())
        rounding = torch.finfo(a.dtype).eps * largest
        error, allowed = (float((x.double() - e).abs().max()) for x in (a, r))
        assert error <= 2 * allowed + 4 * rounding, index


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend):
    leaves, make_table = problem(3, 5, 2, 4, "filter", torch.float64)
    options = {"score": "filter", "normalizer": "linear", "backend": backend}
    expected = gradients(leaves, make_table, **options)
    strided = [
        x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in leaves
    ]
    wide = torch.randn(3, 5, 3, 2, 4, dtype=torch.float64)
    wide[:, :, 0] = leaves[0].detach()
    strided[0] = wide[:, :, 0].detach().requires_grad_()
    for a, b in zip(gradients(strided, make_table, **options), expected, strict=True):
        assert relative_error(a, b) <= 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_that_are_not_finite_give_nan_not_a_crash(backend):
    leaves, make_table = problem(1, 4, 2, 3)
    with torch.no_grad():
        leaves[3][0, 1, 0] = float("nan")
        out = gk.geo_attention(*leaves[:4], make_table(leaves[4]), backend=backend)
    assert bool(out[0, 1].isnan().any())


def test_shapes_can_be_had_without_numbers():
    q = torch.empty(2, 5, 2, 8, dtype=torch.bfloat16, device="meta").requires_grad_()
    positions = torch.empty(2, 5, 3, device="meta").requires_grad_()
    table = gk.tabulate(gk.radial.RadialMLP(gk.radial.GaussianBasis(8, 5.0), 8, 2).to("meta"), 5.0)
    for backend in ("reference", "eager", None):
        out = gk.geo_attention(q, q, q, positions, table, backend=backend)
        assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
        (grad,) = torch.autograd.grad(out.float().sum(), positions)
        assert grad.shape == positions.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shift_and_a_rotation_change_nothing_and_forces_turn_along(backend):
    leaves, make_table = problem(2, 6, 2, 4, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    moved = [x.detach().requires_grad_() for x in leaves]
    moved[3] = (leaves[3].detach() @ rotation + 5).requires_grad_()
    a = gradients(leaves, make_table, backend=backend, second=False)
    b = gradients(moved, make_table, backend=backend, second=False)
    assert relative_error(b[0], a[0]) <= 1e-11
    assert relative_error(b[4], a[4] @ rotation) <= 1e-10
    assert float(a[4].sum(1).abs().max()) <= 1e-12, "forces do not sum to 0"


def test_results_repeat_bit_for_bit():
    leaves, make_table = problem(3, 20, 4, 8, "filter")
    runs = [
        gradients(leaves, make_table, score="filter", normalizer="linear", backend="eager")
        for _ in range(3)
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_no_pass_makes_anything_that_grows_with_the_square_of_the_atoms(policy, monkeypatch):
    monkeypatch.setattr(pair, "_BLOCK_ELEMENTS", 1 << 12)
    largest = []
    for atoms in (64, 128):
        (*tensors, knots), make_table = problem(1, atoms, 2, 4, policy[0])
        inputs = make_inputs(
            *(x.detach() for x in tensors),
            make_table(knots.detach()),
            **dict.fromkeys(("mask", "ptr", "max_atoms", "atom_types", "scale")),
            score=policy[0],
            normalizer=policy[1],
        )
        tangent = Tangent(*(None if x is None else torch.ones_like(x) for x in inputs[:6]))
        with LargestTensor() as seen:  # the launchers themselves: it does not see into operators
            out, row = eager.attention(inputs)
            d_row = row if policy[1] == "linear" else None
            needs = [True] * 5 + [False]
            eager.attention_bwd(inputs, out, d_row, out, row, needs)
            eager.attention_bwd_bwd(
                inputs, tangent, out, d_row, out, row, [True, d_row is not None, *needs]
            )
        largest.append(seen.elements)
    assert largest[0] > 1 << 12
    assert largest[1] <= 1.1 * largest[0]
