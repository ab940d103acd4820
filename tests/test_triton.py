"""The Triton kernels, interpreted, in float64 against the reference: every pass and variant.

What stands in this and the other `test_triton_*` files runs in a process of its own, under
`TRITON_INTERPRET=1` (`make test` does that): without it the backend refuses tensors on a CPU, and
every test marked `interpreted` fails.
"""

from __future__ import annotations

import functools
import importlib
import random

import pytest
import torch
from cases import VARIANTS, make_case
from passes import largest_difference, passes
from test_ops import POLICIES, operator_arguments

pytestmark = pytest.mark.interpreted
EXACT = 1e-12  # float64 sums of some hundred terms in another order
# Sums of integers, whose unit comes from a bound on what they could be: for the second order of a
# wide filter's softmax a rough one. Both are far below the rounding of float32, 6e-8.
QUANTIZED = {"d knots": 1e-10, "dd knots": 2e-9}
PARTS = ("positions", "q", "k", "v", "radial")
RADIAL_NAMES = {"table": ["knots"], "pair tables": ["knots"], "affine": ["affine"]}


def module(name=""):
    """A module of the backend; imported late, for triton is not everywhere."""
    return importlib.import_module(f"geot_kernels.backends.triton{name and '.'}{name}")


def exact_case(*variant, sizes=(4, 0, 3), **options):
    """A case whose scalar arguments are the same in float32 and in float64."""
    case = make_case(*variant, sizes=sizes, **options)
    case.options["scale"], case.r_min, case.r_max = 0.75, 0.25, 4.25
    return case


def assert_equal(got, expected):
    """Compares passes; sums of integers, a table's knots, by their own budget."""
    for name in expected:
        _, error = largest_difference({name: got[name]}, {name: expected[name]})
        assert error <= QUANTIZED.get(name, EXACT), (name, error)


def assert_passes_equal(case, **options):
    assert_equal(passes(case, "triton", **options), passes(case, "reference", **options))


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_all_passes_equal_the_reference(variant):
    assert_passes_equal(exact_case(*variant, attention_scale=True))


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_the_second_order_of_a_single_gradient_equals_the_reference(variant):
    part = PARTS[VARIANTS.index(variant) % len(PARTS)]
    tangent = [part]
    if part == "radial":
        tangent = RADIAL_NAMES.get(variant[2], ["centers", "gammas", "weights"])
    assert_passes_equal(exact_case(*variant, sizes=(3, 4)), tangent=tangent)


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v[2:] == ("affine", "masked")], ids=" ".join
)
def test_a_force_step_equals_the_reference(variant):
    assert_passes_equal(exact_case(*variant, sizes=(5, 2)), tangent=["positions"])


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_weights_equal_the_reference(variant):
    for sizes in ((4, 0, 3), (2, 70) if variant[2] == "table" else (17,)):
        case = exact_case(*variant, sizes=sizes, channels=2, attention_scale=True)
        with torch.no_grad():
            got, expected = (case.weights(backend=b) for b in ("triton", "reference"))
        assert got.shape == expected.shape
        assert float((got - expected).abs().max()) <= EXACT * float(expected.abs().max())
        assert bool((got[expected == 0] == 0).all())


NEEDED = ["q", "k", "v", "positions", "radial", "affine"]


@functools.cache
def all_of_them(policy, sizes):
    """The arguments of the operators and what they give where everything is needed."""
    arguments = operator_arguments(exact_case(*policy, "affine", sizes=sizes))
    detached = {
        name: [x.detach() if isinstance(x, torch.Tensor) else x for x in args[:-1]]
        for name, args in arguments.items()
    }
    return detached, {
        name: getattr(torch.ops.geot, name).default(*detached[name], "triton")
        for name in ("attention_bwd", "attention_bwd_bwd")
    }


@pytest.mark.parametrize("sizes", [(5, 3), None], ids=["in one tile", "in several"])
@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_a_gradient_needed_alone_is_the_same(policy, sizes):
    sizes = sizes or ((66,) if policy[0] == "bias" else (18,))
    arguments, whole = all_of_them(policy, sizes)
    chance = random.Random(0)
    for name, expected in whole.items():
        args = list(arguments[name])
        at = next(i for i, x in enumerate(args) if isinstance(x, list))
        wanted = [i for i, n in enumerate(args[at]) if n]
        results = dict(zip(wanted, expected, strict=True))
        some = {i for i in wanted if chance.random() < 0.5}
        for chosen in [{i} for i in wanted] if sizes == (5, 3) else [some]:
            args[at] = [i in chosen for i in range(len(args[at]))]
            got = getattr(torch.ops.geot, name).default(*args, "triton")
            alone = dict(zip(sorted(chosen), got, strict=True))
            _, error = largest_difference(alone, {i: results[i] for i in alone})
            assert error <= QUANTIZED["d knots"], (name, chosen)


@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_any_cotangent_may_be_absent(policy):
    arguments, _ = all_of_them(policy, (5, 3))
    chance = random.Random(1)
    for name, tangents in (("attention_bwd", 0), ("attention_bwd_bwd", 6)):
        args = arguments[name]
        op = getattr(torch.ops.geot, name).default
        optional = [i for i in range(tangents + 2) if args[i] is not None]
        for _ in range(4):
            missing = chance.sample(optional, chance.randrange(1, len(optional) + 1))
            fewer = [None if i in missing else x for i, x in enumerate(args)]
            got, expected = (dict(enumerate(op(*fewer, b))) for b in ("triton", "eager"))
            # A cotangent that is not there makes gradients of one that is there, and zeros.
            _, error = largest_difference(got, expected)
            assert error <= QUANTIZED["d knots"], (name, missing)


@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_a_loss_of_forces_trains_all_parameters(policy):
    results = []
    for backend in ("triton", "reference"):
        case = exact_case(*policy, "affine", sizes=(5, 3), coincident=False)
        out = case.attention(backend=backend)
        energy = out.square().sum()
        positions = case.tensors["positions"]
        (forces,) = torch.autograd.grad(-energy, positions, create_graph=True)
        ((forces - 1).square().sum() + energy).backward()
        results.append({f"d {n}": x.grad for n, x in case.tensors.items()})
    assert_equal(*results)


def test_the_third_derivative_raises():
    case = exact_case(sizes=(3,))
    x = case.tensors["positions"]
    out = case.attention(backend="triton").square().sum()
    for _ in range(2):
        (dx,) = torch.autograd.grad(out, x, create_graph=True)
        out = dx.square().sum()
    with pytest.raises(NotImplementedError, match="third derivative"):
        torch.autograd.grad(out, x)
