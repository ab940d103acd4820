"""The operators' contracts: derivatives, tracing, vmap, autocast, dispatch."""

from __future__ import annotations

import functools
import itertools
import warnings

import pytest
import torch
from cases import NORMALIZERS, SCORES, VARIANTS, make_case, relative_error
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import geot_kernels as gk
from geot_kernels import backends, ops
from geot_kernels.backends import eager
from geot_kernels.checks import make_inputs

POLICIES = list(itertools.product(SCORES, NORMALIZERS))
BY_DIFFERENCES = [
    v
    for v in VARIANTS
    if v[2:] in {("affine", "masked"), ("pair tables", "packed"), ("gaussians", "full")}
]
EXACT = 1e-12  # float64 against float64 by other formulas: rounding of sums of some 100 terms


def operator_inputs(case):
    named = case.tensors
    options = dict.fromkeys(("mask", "ptr", "max_atoms", "atom_types")) | case.options
    return make_inputs(
        *(named[n] for n in ("q", "k", "v", "positions")),
        case.radial_function(named),
        **{n: options[n] for n in ("mask", "ptr", "max_atoms", "atom_types")},
        score=case.score,
        normalizer=case.normalizer,
        scale=case.options["scale"],
    )


def operator_arguments(case):
    """The arguments of each operator, with all cotangents there."""
    inputs = operator_inputs(case)
    out, row = ops._attention(*inputs, "eager")
    torch.manual_seed(1)
    pulled = (
        torch.randn_like(out).requires_grad_(),
        torch.randn_like(row).requires_grad_() if case.normalizer == "linear" else None,
        out.detach(),
        row.detach(),
    )
    present = [x is not None for x in inputs[:6]]
    dotted = [None if x is None else torch.randn_like(x).requires_grad_() for x in inputs[:6]]
    both = [True, case.normalizer == "linear", *present]
    weights_inputs = list(inputs)
    del weights_inputs[2]
    if inputs.ptr is not None:
        weights_inputs[9] = int(inputs.ptr.diff().max())
    return {
        "attention": (*inputs, "eager"),
        "attention_weights": (*weights_inputs, "eager"),
        "attention_bwd": (*pulled, *inputs[:6], present, *inputs[6:], "eager"),
        "attention_bwd_bwd": (*dotted, *pulled, *inputs[:6], both, *inputs[6:], "eager"),
    }


@pytest.mark.parametrize("variant", BY_DIFFERENCES, ids=" ".join)
def test_first_derivatives_are_those_of_differences(variant):
    case = make_case(*variant, attention_scale=True, coincident=False)
    tensors = tuple(case.tensors.values())
    assert torch.autograd.gradcheck(case.attention, tensors, atol=1e-7, fast_mode=True)


@pytest.mark.parametrize("variant", BY_DIFFERENCES, ids=" ".join)
def test_second_derivatives_are_those_of_differences(variant):
    case = make_case(*variant, attention_scale=True, coincident=False)
    tensors = tuple(case.tensors.values())
    assert torch.autograd.gradgradcheck(case.attention, tensors, atol=1e-6, fast_mode=True)


def second_order(case, backend, parts):
    """Gradients of a random function of the gradients of `parts`: all six of the tangent."""
    tensors = case.tensors
    out = case.attention(backend=backend)
    g = torch.Generator().manual_seed(5)
    cotangent = torch.randn(out.shape, generator=g, dtype=out.dtype).requires_grad_()
    first = torch.autograd.grad(out, [tensors[p] for p in parts], cotangent, create_graph=True)
    loss = sum((x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum() for x in first)
    second = torch.autograd.grad(loss, [cotangent, *tensors.values()], allow_unused=True)
    zeros = [cotangent, *tensors.values()]
    return [torch.zeros_like(z) if x is None else x for x, z in zip(second, zeros, strict=True)]


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_formulas_equal_autograd_of_the_reference_for_any_part_of_the_tangent(variant):
    case = make_case(*variant, attention_scale=True)
    parts = [n for n in case.tensors if n != "attention_scale"]
    for chosen in [parts, *([p] for p in parts)]:
        got = second_order(case, "eager", chosen)
        expected = second_order(case, "reference", chosen)
        scale = max(float(x.abs().max()) for x in expected)
        for name, a, b in zip(["cotangent", *case.tensors], got, expected, strict=True):
            assert float((a - b).abs().max()) <= EXACT * scale, (chosen, name)


def test_small_blocks_give_the_same_derivatives(monkeypatch):
    for score, normalizer in POLICIES:
        case = make_case(score, normalizer, "affine")
        parts = list(case.tensors)
        whole = second_order(case, "eager", parts)
        with monkeypatch.context() as patch:
            patch.setattr(eager.pair, "_BLOCK_ELEMENTS", 1)
            split = second_order(case, "eager", parts)
        for a, b in zip(split, whole, strict=True):
            assert relative_error(a, b) <= EXACT


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_opcheck_finds_nothing(variant):
    arguments = operator_arguments(make_case(*variant))
    for name, args in arguments.items():
        op = getattr(torch.ops.geot, name).default
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if variant == ("filter", "linear", "affine", "masked") and name != "attention_bwd_bwd":
            checks.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(op, args, test_utils=checks)


@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_results_are_contiguous_as_the_fakes_say(policy):
    case = make_case(*policy, layout="full")
    strided = {
        n: x.detach().movedim(0, 1).contiguous().movedim(0, 1).requires_grad_()
        for n, x in case.tensors.items()
    }
    case.tensors = strided
    for name, args in operator_arguments(case).items():
        torch.library.opcheck(
            getattr(torch.ops.geot, name).default, args, test_utils=["test_faketensor"]
        )


def test_nothing_that_is_not_needed_is_computed():
    seen = []

    class Counting:
        def __getattr__(self, name):
            def launch(*args):
                seen.append((name, args))
                return getattr(eager, name)(*args)

            return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "choose", lambda *_: Counting())
        case = make_case()
        x = case.tensors["positions"]
        out = case.attention(*(t if t is x else t.detach() for t in case.tensors.values()))
        (force,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        force.square().sum().backward()
    (_, _), (first, args), (second, more) = seen[:3]
    assert (first, second) == ("attention_bwd", "attention_bwd_bwd")
    assert list(args[-1]) == [False, False, False, True, False, False]
    assert [t is not None for t in more[1]] == [False, False, False, True, False, False]
    assert list(more[-1]) == [True, False, False, False, False, True, False, False]


def test_without_gradients_no_graph_is_made_and_one_operator_is_called():
    case = make_case()
    with torch.no_grad(), torch.profiler.profile() as profile:
        assert not case.attention().requires_grad
    calls = [e for e in profile.events() if e.name.startswith("geot::")]
    assert len({e.name for e in calls}) == 1


def force_training(case, energy_and_forces):
    """Gradients of a loss on energies and forces, as training takes them."""
    for x in case.tensors.values():
        x.grad = None
    energy, forces = energy_and_forces(*case.tensors.values())
    (energy.sin() + forces.square().sum()).backward()
    return [x.grad for n, x in case.tensors.items() if n != "positions"]


def energy_and_forces(case, backend):
    place = list(case.tensors).index("positions")

    def function(*tensors):
        energy = case.attention(*tensors, backend=backend).square().sum()
        return energy, -torch.autograd.grad(energy, tensors[place], create_graph=True)[0]

    return function


@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_make_fx_then_compile_of_energy_and_forces_gives_eager_gradients(policy):
    case = make_case(*policy, radial="affine", attention_scale=True)
    traced = make_fx(energy_and_forces(case, "eager"))(*case.tensors.values())
    targets = [str(n.target) for n in traced.graph.nodes]
    assert targets.count("geot.attention_bwd.default") == 1
    by_reference = force_training(case, energy_and_forces(case, "reference"))
    by_operators = force_training(case, energy_and_forces(case, "eager"))
    compiled = force_training(case, torch.compile(traced, fullgraph=True))
    for a, b, c in zip(compiled, by_operators, by_reference, strict=True):
        assert relative_error(a, b) <= EXACT
        assert relative_error(b, c) <= EXACT


@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_make_fx_of_a_whole_force_training_step_then_compile(policy):
    case = make_case(*policy, radial="affine")
    tensors = list(case.tensors.values())

    def step(*tensors):
        energy, forces = energy_and_forces(case, "eager")(*tensors)
        return torch.autograd.grad(energy.sin() + forces.square().sum(), tensors)

    traced = make_fx(step)(*tensors)
    assert "geot.attention_bwd_bwd.default" in [str(n.target) for n in traced.graph.nodes]
    with torch.no_grad():
        compiled = torch.compile(traced, fullgraph=True)(*tensors)
    for a, b in zip(compiled, step(*tensors), strict=True):
        assert relative_error(a, b) <= EXACT


def test_fullgraph_compile_of_a_training_step_gives_eager_gradients():
    case = make_case("filter", "linear", "affine", attention_scale=True)

    def step(backend, attention):
        for x in case.tensors.values():
            x.grad = None
        attention(*case.tensors.values(), backend=backend).square().sum().backward()
        return [x.grad for x in case.tensors.values()]

    compiled = torch.compile(case.attention, fullgraph=True)
    for a, b in zip(step("eager", compiled), step("reference", case.attention), strict=True):
        assert relative_error(a, b) <= EXACT


def test_compile_with_a_new_number_of_atoms_does_not_break():
    compiled = torch.compile(
        lambda *t: gk.geo_attention(*t[:4], gk.RadialTable(t[4], 0.0, 5.0), backend="eager"),
        fullgraph=True,
        dynamic=True,
    )
    for atoms in (3, 5, 8):
        case = make_case(layout="full", sizes=(atoms, atoms))
        tensors = tuple(case.tensors.values())
        expected = gk.geo_attention(
            *tensors[:4], gk.RadialTable(tensors[4], 0.0, 5.0), backend="reference"
        )
        assert relative_error(compiled(*tensors), expected) <= EXACT


@pytest.mark.parametrize("layout", ["masked", "packed"])
def test_export_gives_the_same_result(layout):
    case = make_case("filter", "linear", "affine", layout, attention_scale=True)

    class Attention(torch.nn.Module):
        def forward(self, *tensors):
            return case.attention(*tensors)

    tensors = tuple(x.detach() for x in case.tensors.values())
    program = torch.export.export(Attention(), tensors)
    assert "geot.attention.default" in str(program.graph)
    assert relative_error(program.module()(*tensors), case.attention()) <= EXACT


def test_export_takes_a_table_as_an_argument():
    case = make_case(layout="full")

    class Attention(torch.nn.Module):
        def forward(self, q, k, v, positions, table):
            return gk.geo_attention(q, k, v, positions, table, scale=0.7, backend="eager")

    *args, knots = (x.detach() for x in case.tensors.values())
    args = (*args, gk.RadialTable(knots, case.r_min, case.r_max))
    program = torch.export.export(Attention(), args)
    assert relative_error(program.module()(*args), case.attention()) <= EXACT


@pytest.mark.parametrize("vectorize", [True, False])
def test_hessian_equals_the_reference(vectorize):
    case = make_case("filter", "softmax", "pair tables", sizes=(3, 0, 2), channels=2)
    order = list(case.tensors)

    def energy(positions: Tensor, backend: str) -> Tensor:
        tensors = [positions if n == "positions" else case.tensors[n].detach() for n in order]
        return case.attention(*tensors, backend=backend).square().sum()

    x = case.tensors["positions"].detach()
    got, expected = (
        torch.autograd.functional.hessian(
            functools.partial(energy, backend=b), x, vectorize=vectorize
        )
        for b in ("eager", "reference")
    )
    assert relative_error(got, expected) <= EXACT


def test_vmap_over_the_forward_pass_equals_a_loop():
    case = make_case(layout="full")
    tensors = [x.detach() for x in case.tensors.values()]
    stacked = [torch.stack((x, 1.1 * x, 0.9 * x)) for x in tensors]
    got = torch.vmap(case.attention)(*stacked)
    expected = torch.stack([case.attention(*(s[i] for s in stacked)) for i in range(3)])
    assert relative_error(got, expected) <= EXACT


def test_third_order_raises_and_the_reference_does_it():
    case = make_case()
    x = case.tensors["positions"]

    def third(backend):
        y = case.attention(backend=backend).square().sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            y = g.square().sum()
        return y

    with pytest.raises(NotImplementedError, match="third derivative"):
        third("eager")
    assert third("reference").isfinite()


def test_forward_mode_is_refused_not_wrong():
    case = make_case()
    tensors = [x.detach() for x in case.tensors.values()]
    with torch.autograd.forward_ad.dual_level():
        tensors[0] = torch.autograd.forward_ad.make_dual(tensors[0], tensors[0])
        with pytest.raises(RuntimeError, match=r"jvp|forward"):
            case.attention(*tensors)


@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_backward_and_grad_agree(policy):
    case = make_case(*policy, radial="affine", attention_scale=True)
    tensors = list(case.tensors.values())
    case.attention().square().sum().backward()
    by_grad = torch.autograd.grad(case.attention().square().sum(), tensors)
    for x, g in zip(tensors, by_grad, strict=True):
        assert torch.equal(x.grad, g)


def test_a_constant_cotangent_still_gives_second_derivatives():
    case = make_case()
    x = case.tensors["positions"]

    def curvature(backend):
        (g,) = torch.autograd.grad(case.attention(backend=backend).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    assert relative_error(curvature("eager"), curvature("reference")) <= EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_scores_in_float32(dtype):
    case = make_case("filter", "softmax", dtype=torch.float32, sizes=(4, 0, 3))
    with torch.autocast("cpu", dtype=dtype):
        out = case.attention()
        assert out.dtype == dtype
        out.float().square().sum().backward()
    tensors = [x.detach().to(dtype) if n in "qkv" else x.detach() for n, x in case.tensors.items()]
    assert relative_error(out, case.attention(*tensors, backend="reference")) == 0
    assert all(x.grad is not None and x.grad.dtype == x.dtype for x in case.tensors.values())


def test_autocast_does_not_reach_into_the_backward_pass():
    case = make_case("bias", "softmax", dtype=torch.float32)
    outs = case.attention()
    plain = torch.autograd.grad(outs.sum(), case.tensors["q"], retain_graph=True)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = torch.autograd.grad(outs.sum(), case.tensors["q"])[0]
    assert torch.equal(plain, under)


def test_mixed_precision_gradients_have_the_dtype_of_what_they_belong_to():
    case = make_case("bias", "linear", "affine", dtype=torch.float32)
    tensors = [
        (x.detach().bfloat16() if n in "qkv" else x.detach()).requires_grad_()
        for n, x in case.tensors.items()
    ]
    out = case.attention(*tensors)
    grads = torch.autograd.grad(out.float().square().sum(), tensors, create_graph=True)
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [x.dtype for x in tensors]
    second = torch.autograd.grad(sum(g.float().square().sum() for g in grads), tensors)
    assert [g.dtype for g in second] == [x.dtype for x in tensors]


@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_weights_are_differentiable_and_equal_the_reference(policy):
    case = make_case(*policy, radial="affine", layout="packed", attention_scale=True)
    tensors = [x for n, x in case.tensors.items() if n != "v"]
    got, expected = case.weights(), case.weights(backend="reference")
    assert relative_error(got, expected) <= EXACT
    pairs = zip(
        torch.autograd.grad(got.square().sum(), tensors),
        torch.autograd.grad(expected.square().sum(), tensors),
        strict=True,
    )
    assert all(relative_error(a, b) <= EXACT for a, b in pairs)
    with torch.no_grad():
        assert relative_error(case.weights(), expected) <= EXACT


def test_weights_times_values_are_the_output():
    for score, normalizer in POLICIES:
        case = make_case(score, normalizer, attention_scale=True)
        with torch.no_grad():
            out = torch.einsum("bhij,bjhd->bihd", case.weights(), case.tensors["v"])
            assert relative_error(out, case.attention()) <= EXACT


def test_a_backend_is_a_module_and_its_reason_not_to_run(monkeypatch):
    class Small:
        def why_not(self, device, inputs=None):
            return "only two heads" if inputs is not None and inputs.q.shape[-2] != 2 else None

        attention = staticmethod(lambda inputs, *_: (inputs.q * 0 + 7, inputs.q[..., 0] * 0))

    monkeypatch.setattr(backends, "load", lambda n: Small() if n == "cpu" else eager)
    with torch.no_grad():
        assert (make_case().attention(backend="cpu") == 7).all()
        named = make_case(heads=3)
        with pytest.raises(ValueError, match="only two heads"):
            named.attention(backend="cpu")
        backends._warn_unfused.cache_clear()
        named.backend = None
        with pytest.warns(UserWarning, match="cpu: only two heads"):
            named.attention()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            named.attention()
