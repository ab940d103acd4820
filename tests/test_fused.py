"""The fused kernels in float64 against the reference: every pass and variant."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from cases import VARIANTS
from fused import (
    EXACT,
    OF_CUDA,
    QUANTIZED,
    assert_equal,
    assert_passes_equal,
    detached,
    exact_case,
    on,
)
from passes import largest_difference
from test_ops import POLICIES, operator_arguments

PARTS = ("positions", "q", "k", "v", "radial")
RADIAL_NAMES = {"table": ["knots"], "pair tables": ["knots"], "affine": ["affine"]}


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_all_passes_equal_the_reference(variant, backend):
    assert_passes_equal(exact_case(*variant, attention_scale=True), backend)


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_the_second_order_of_a_single_gradient_equals_the_reference(variant, backend):
    part = PARTS[VARIANTS.index(variant) % len(PARTS)]
    tangent = [part]
    if part == "radial":
        tangent = RADIAL_NAMES.get(variant[2], ["centers", "gammas", "weights"])
    assert_passes_equal(exact_case(*variant, sizes=(3, 4)), backend, tangent=tangent)


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v[2:] == ("affine", "masked")], ids=" ".join
)
def test_a_force_step_equals_the_reference(variant, backend):
    assert_passes_equal(exact_case(*variant, sizes=(5, 2)), backend, tangent=["positions"])


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_weights_equal_the_reference(variant, backend):
    for sizes in ((4, 0, 3), (2, 70) if variant[2] == "table" else (17,)):
        case = exact_case(*variant, sizes=sizes, channels=2, attention_scale=True)
        with torch.no_grad():
            got, expected = (case.weights(backend=b) for b in (backend, "reference"))
        assert got.shape == expected.shape
        assert float((got - expected).abs().max()) <= EXACT * float(expected.abs().max())
        assert bool((got[expected == 0] == 0).all())


@functools.cache
def all_of_them(backend, policy, sizes):
    """The arguments of the operators and what they give where everything is needed."""
    arguments = operator_arguments(exact_case(*policy, "affine", sizes=sizes))
    arguments = {name: detached(args[:-1]) for name, args in arguments.items()}
    return arguments, {
        name: getattr(torch.ops.geot, name).default(*arguments[name], backend)
        for name in ("attention_bwd", "attention_bwd_bwd")
    }


# Atoms of a bias and of a filter: in one tile, and in several. Those of the CUDA kernels: in one
# warp, in two and four that share a molecule, and swept by rows and by keys.
LARGER = [("triton", (66, 18)), *(("cuda", (n, n)) for n in (18, 33, 66))]
NEEDS = [(p, b, (5, 3)) for b in ("triton", "cuda") for p in POLICIES]
NEEDS += [(p, b, (n[p[0] == "filter"],)) for b, n in LARGER for p in POLICIES]


@pytest.mark.parametrize(
    ("backend", "policy", "sizes"),
    [x for p, b, s in NEEDS for x in on(b, [(p, s)])],
    indirect=["backend"],
    ids=str,
)
def test_a_gradient_needed_alone_is_the_same(backend, policy, sizes):
    arguments, whole = all_of_them(backend, policy, sizes)
    chance = random.Random(0)
    for name, expected in whole.items():
        args = list(arguments[name])
        at = next(i for i, x in enumerate(args) if isinstance(x, list))
        wanted = [i for i, n in enumerate(args[at]) if n]
        results = dict(zip(wanted, expected, strict=True))
        some = {i for i in wanted if chance.random() < 0.5}
        choices = [] if sizes == (5, 3) else [some]
        if sizes == (5, 3) or backend == "cuda":
            choices += [{i} for i in wanted]
        for chosen in choices:
            args[at] = [i in chosen for i in range(len(args[at]))]
            got = getattr(torch.ops.geot, name).default(*args, backend)
            alone = dict(zip(sorted(chosen), got, strict=True))
            _, error = largest_difference(alone, {i: results[i] for i in alone})
            assert error <= QUANTIZED["d knots"], (name, chosen)


@pytest.mark.parametrize(
    ("backend", "policy", "sizes"),
    [x for p, b, s in NEEDS if b == "cuda" or s == (5, 3) for x in on(b, [(p, s)])],
    indirect=["backend"],
    ids=str,
)
def test_any_cotangent_may_be_absent(backend, policy, sizes):
    arguments, _ = all_of_them(backend, policy, sizes)
    chance = random.Random(1)
    budget = OF_CUDA["dd affine"] if backend == "cuda" else QUANTIZED["d knots"]
    for name, tangents in (("attention_bwd", 0), ("attention_bwd_bwd", 6)):
        args = arguments[name]
        op = getattr(torch.ops.geot, name).default
        optional = [i for i in range(tangents + 2) if args[i] is not None]
        for _ in range(4):
            missing = chance.sample(optional, chance.randrange(1, len(optional) + 1))
            fewer = [None if i in missing else x for i, x in enumerate(args)]
            got, expected = (dict(enumerate(op(*fewer, b))) for b in (backend, "eager"))
            # A cotangent that is not there makes gradients of one that is there, and zeros.
            _, error = largest_difference(got, expected)
            assert error <= budget, (name, missing)


@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_a_loss_of_forces_trains_all_parameters(policy, backend):
    results = []
    for b in (backend, "reference"):
        case = exact_case(*policy, "affine", sizes=(5, 3), coincident=False)
        out = case.attention(backend=b)
        energy = out.square().sum()
        positions = case.tensors["positions"]
        (forces,) = torch.autograd.grad(-energy, positions, create_graph=True)
        ((forces - 1).square().sum() + energy).backward()
        results.append({f"d {n}": x.grad for n, x in case.tensors.items()})
    # The gradients of both orders, added up.
    assert_equal(*results, OF_CUDA | {"d affine": OF_CUDA["dd affine"]})


def test_the_third_derivative_raises(backend):
    case = exact_case(sizes=(3,))
    x = case.tensors["positions"]
    out = case.attention(backend=backend).square().sum()
    for _ in range(2):
        (dx,) = torch.autograd.grad(out, x, create_graph=True)
        out = dx.square().sum()
    with pytest.raises(NotImplementedError, match="third derivative"):
        torch.autograd.grad(out, x)
