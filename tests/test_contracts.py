"""Contracts that mutants of the other tests outlived: dtypes, autocast, vmap, single gradients."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, NORMALIZERS, VARIANTS, make_case, relative_error
from test_ops import EXACT, POLICIES, operator_arguments, second_order
from torch.fx.experimental.proxy_tensor import make_fx

import geot_kernels as gk
from geot_kernels import ops
from geot_kernels.backends import eager


def lowered(case, dtype):
    """The case's tensors as users mix them: q, k, v in `dtype`, the rest in float32."""
    case.tensors = {
        n: x.detach().to(dtype if n in "qkv" else torch.float32).requires_grad_()
        for n, x in case.tensors.items()
    }
    return case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_fakes_have_the_shapes_and_dtypes_of_results(policy, layout, dtype):
    case = lowered(make_case(*policy, "affine", layout), dtype)
    for name, args in operator_arguments(case).items():
        # detached: gradients of attention_weights are the reference's, which has no fake
        args = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)
        op = getattr(torch.ops.geot, name).default
        torch.library.opcheck(op, args, test_utils=["test_faketensor"])


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v[3] == "masked"], ids=" ".join)
def test_autocast_rounds_inputs_and_nothing_else(variant, backend):
    case = lowered(make_case(*variant, attention_scale=True), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, weights = case.attention(backend=backend), case.weights(backend=backend)
    rounded = lowered(case, torch.bfloat16)
    assert out.dtype == weights.dtype == torch.bfloat16
    assert torch.equal(out, rounded.attention(backend=backend))
    assert torch.equal(weights, rounded.weights(backend=backend))


def test_autocast_leaves_float64_alone():
    case = make_case(attention_scale=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = case.attention(), case.attention(backend="reference")
    assert got.dtype == expected.dtype == torch.float64
    assert relative_error(got, expected) <= EXACT


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_attention_scale_in_16_bits_stays_within_twice_the_error_of_the_reference(policy, layout):
    case = lowered(
        make_case(*policy, layout=layout, sizes=(9, 0, 7), attention_scale=True), torch.bfloat16
    )
    exact = case.attention(*(x.double() for x in case.tensors.values()), backend="reference")
    got, by_reference = case.attention(), case.attention(backend="reference")
    assert got.dtype == torch.bfloat16
    error, allowed = (float((x.double() - exact).abs().max()) for x in (got, by_reference))
    assert error <= 2 * allowed + 4 * torch.finfo(torch.bfloat16).eps * float(exact.abs().max())


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_each_tensor_may_be_the_only_one_with_a_gradient(variant):
    case = make_case(*variant, attention_scale=True)
    for alone, x in case.tensors.items():
        for other in case.tensors.values():
            other.requires_grad_(other is x)
        for f in (case.attention, case.weights):
            if f == case.weights and alone == "v":
                continue
            got, expected = (
                torch.autograd.grad(f(backend=b).square().sum(), x, create_graph=True)[0]
                for b in ("eager", "reference")
            )
            assert relative_error(got, expected) <= EXACT, alone
            if got.requires_grad:
                a, b = (torch.autograd.grad(g.square().sum(), x)[0] for g in (got, expected))
                assert relative_error(a, b) <= EXACT, alone


def test_what_of_the_gradients_a_loss_leaves_out_costs_nothing(monkeypatch):
    seen = {}

    class Counting:
        def __getattr__(self, name):
            return lambda *args: seen.setdefault(name, args) and getattr(eager, name)(*args)

    monkeypatch.setattr(ops, "choose", lambda *_: Counting())
    case = make_case("filter", "linear", "affine")
    tensors = list(case.tensors.values())
    grads = torch.autograd.grad(case.attention().square().sum(), tensors, create_graph=True)
    grads[3].square().sum().backward()
    assert seen["attention_bwd"][2] is None, "d_row, of which nothing was made"
    assert [t is not None for t in seen["attention_bwd_bwd"][1]] == [n == 3 for n in range(6)]


def test_the_log_of_the_sum_has_no_gradient_and_the_sum_has_one():
    for normalizer in NORMALIZERS:
        inputs = operator_arguments(make_case(normalizer=normalizer))["attention"]
        assert ops._attention(*inputs)[1].requires_grad == (normalizer == "linear")


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_tangent_on_the_way_back_is_refused_not_lost(create_graph):
    case = make_case()
    out = case.attention()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
            torch.autograd.grad(out, case.tensors["v"], dual, create_graph=create_graph)


def test_vmap_of_every_pass_over_any_dimension_equals_a_loop():
    case = make_case("filter", "softmax", "affine", attention_scale=True)
    tensors = list(case.tensors.values())
    several = torch.stack((tensors[0], 0.9 * tensors[0]), -2)
    for f in (case.attention, case.weights):
        got = torch.vmap(lambda q, f=f: f(q, *tensors[1:]), in_dims=-2)(several)
        expected = [f(q, *tensors[1:]) for q in several.unbind(-2)]
        assert relative_error(got, torch.stack(expected)) <= EXACT
    with torch.no_grad():
        got = torch.vmap(lambda q: case.weights(q, *tensors[1:]), in_dims=-2)(several)
        loop = [case.weights(q, *tensors[1:]) for q in several.unbind(-2)]
        assert relative_error(got, torch.stack(loop)) <= EXACT
    out = case.attention()
    first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
    for outputs in ((out,), first):
        cotangents = [torch.randn(2, *x.shape, dtype=x.dtype) for x in outputs]

        def pull(*c, outputs=outputs):
            return torch.autograd.grad(outputs, tensors, c, retain_graph=True)

        expected = zip(*(pull(*(c[i] for c in cotangents)) for i in range(2)), strict=True)
        for a, b in zip(torch.vmap(pull)(*cotangents), expected, strict=True):
            assert relative_error(a, torch.stack(b)) <= EXACT


def test_a_callable_gets_the_type_of_the_query_atom_first():
    case = make_case(radial="pair tables", layout="full")
    types = case.options["atom_types"]
    args = [case.tensors[n].detach() for n in ("q", "k", "v", "positions")]
    got = gk.attention_weights(
        *(args[n] for n in (0, 1, 3)),
        lambda d, i, j: (i + 10.0 * j).double()[:, None].expand(-1, 2),
        atom_types=types,
        scale=0.0,
        normalizer="linear",
        backend="reference",
    )
    assert torch.equal(got[:, 0], types[:, :, None] + 10.0 * types[:, None])


@pytest.mark.parametrize("name", ["positions", "knots", "affine"])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)]
)
def test_geometry_may_have_another_dtype_than_the_features(name, dtypes):
    case = make_case("filter", "linear", "affine", dtype=dtypes[0])
    case.tensors[name] = case.tensors[name].detach().to(dtypes[1]).requires_grad_()
    for a, b in zip(
        second_order(case, "eager", [name]), second_order(case, "reference", [name]), strict=True
    ):
        assert a.dtype == b.dtype
        assert relative_error(a, b) <= (EXACT if dtypes[0] == torch.float64 else 1e-4)


def test_weights_come_from_the_backend_that_is_named(monkeypatch):
    case = make_case()
    with pytest.raises(ValueError, match="triton"), torch.no_grad():
        case.weights(backend="triton")
    with pytest.raises(ValueError, match="triton"):
        case.weights(backend="triton")


def test_weights_of_no_molecule():
    q = torch.randn(0, 2, 3)
    table = gk.RadialTable(torch.randn(1, 9, 2, 2), 0.0, 5.0)
    for backend in ("eager", "reference"):
        w = gk.attention_weights(
            q, q, torch.randn(0, 3), table, ptr=torch.tensor([0]), backend=backend
        )
        assert w.shape == (0, 2, 0, 0)


@pytest.mark.parametrize("name", ["mask", "atom_types"])
def test_what_is_written_into_an_input_after_the_call_is_noticed(name):
    case = make_case(radial="pair tables")
    out = case.attention()
    case.options[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), case.tensors["q"])


@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_blocks_give_the_same_gradients(policy, layout, monkeypatch):
    case = make_case(*policy, "affine", layout)
    tensors = list(case.tensors.values())
    whole = torch.autograd.grad(case.attention().square().sum(), tensors)
    for elements in (1, 40, 400):
        monkeypatch.setattr(eager.pair, "_BLOCK_ELEMENTS", elements)
        split = torch.autograd.grad(case.attention().square().sum(), tensors)
        assert all(relative_error(a, b) <= EXACT for a, b in zip(split, whole, strict=True))


def test_on_the_first_knot_the_function_has_its_slope():
    case = make_case(radial="affine", layout="full")
    case.r_min = 0.0  # the diagonal, at d = 0, is on it
    with torch.no_grad():
        case.tensors["affine"].copy_(torch.tensor([1.0, 0.0]))
    got, expected = (
        torch.autograd.grad(case.attention(backend=b).square().sum(), case.tensors["affine"])[0]
        for b in ("eager", "reference")
    )
    assert relative_error(got, expected) <= EXACT


def test_an_affine_map_without_types_and_a_short_pair_index():
    case = make_case("filter", "linear", "affine", layout="full")
    for index in (case.pair_index.int(), None):
        case.pair_index = index
        if index is None:
            case.tensors["affine"] = case.tensors["affine"].detach()[:1].requires_grad_()
        both = (second_order(case, b, ["positions", "affine"]) for b in ("eager", "reference"))
        assert all(relative_error(a, b) <= EXACT for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
def test_softmax_rows_sum_to_one_whatever_the_size_of_the_scores(backend, offset):
    case = make_case(layout="full", dtype=torch.float32, sizes=(20, 20))
    with torch.no_grad():
        case.tensors["knots"][:, :, 0] += offset
        sums = case.weights(backend=backend).sum(-1)
    assert float((sums - 1).abs().max()) <= 4 * torch.finfo(torch.float32).eps


def test_gaussians_far_away_give_zero_not_nan():
    case = make_case(radial="gaussians", layout="full", dtype=torch.float32)
    with torch.no_grad():
        case.tensors["positions"][0, 3] = 1e10
    for x in second_order(case, "eager", list(case.tensors)):
        assert bool(x.isfinite().all())


def test_packed_molecules_of_any_size_go_out_with_dynamic_shapes():
    case = make_case("filter", "linear", layout="packed", attention_scale=True)

    class Attention(torch.nn.Module):
        def forward(self, q, k, v, positions, ptr):
            tensors = [q, k, v, positions, *list(case.tensors.values())[4:]]
            return case.attention(*(x.detach() for x in tensors), ptr=ptr, max_atoms=4)

    def inputs(*sizes):
        rows = [torch.randn(sum(sizes), 2, 3, dtype=torch.float64) for _ in range(3)]
        positions = torch.randn(sum(sizes), 3, dtype=torch.float64)
        return *rows, positions, torch.tensor([0, *sizes]).cumsum(0)

    atoms, molecules = torch.export.Dim("T", min=3), torch.export.Dim("P", min=3)
    shapes = (*({0: atoms} for _ in range(4)), {0: molecules})
    program = torch.export.export(Attention(), inputs(4, 0, 3), dynamic_shapes=shapes)
    for other in (inputs(4, 0, 3), inputs(2, 4, 1, 3)):
        assert relative_error(program.module()(*other), Attention()(*other)) <= EXACT


def test_blocks_end_at_their_largest_molecule(monkeypatch):
    pairs = []
    make_block = eager.pair.Block.__init__

    def counted(self, *args):
        make_block(self, *args)
        pairs.append(self.dist.numel())

    monkeypatch.setattr(eager.pair.Block, "__init__", counted)
    monkeypatch.setattr(eager.pair, "_BLOCK_ELEMENTS", 3 * 40**2)
    sizes = (40, *[3] * 30)
    for layout in ("packed", "masked"):
        case = make_case(layout="packed", sizes=sizes)
        if layout == "masked":
            case = make_case(layout="full", sizes=sizes)
            case.options["mask"] = torch.arange(40) < torch.tensor(sizes)[:, None]
        pairs.clear()
        case.attention()
        assert sum(pairs) == 40**2 + 30 * 3**2


@pytest.fixture
def warm_layer():
    """A layer in `eval()` that has kept its table, and its inputs."""
    layer = gk.FusedGeoAttention(8, 2, r_max=5.0, num_knots=64, backend="eager").eval()
    x, positions = torch.randn(2, 5, 8), torch.randn(2, 5, 3)
    with torch.no_grad():
        layer(x, positions)
    return layer, x, positions


def test_a_fused_optimizer_step_in_eval_leaves_no_old_table(warm_layer):
    layer, x, positions = warm_layer
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    layer(x, positions)[0].square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        got, _ = layer(x, positions)
        layer.refresh()
        assert torch.equal(got, layer(x, positions)[0])


def test_tracers_and_ensembles_never_meet_a_kept_table(warm_layer):
    layer, x, positions = warm_layer

    def call(parameters):
        return torch.func.functional_call(layer, parameters, (x, positions))[0]

    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    others = {n: 1.5 * p for n, p in parameters.items()}
    both = {n: torch.stack((parameters[n], others[n])) for n in parameters}
    with torch.no_grad():
        expected = [call(p) for p in (parameters, others)]
        for mode in ("real", "fake", "symbolic"):
            traced = make_fx(call, tracing_mode=mode, _allow_non_fake_inputs=True)(parameters)
            assert relative_error(traced(others), expected[1]) <= 1e-6
        assert relative_error(torch.vmap(call)(both), torch.stack(expected)) <= 1e-6
