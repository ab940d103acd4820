"""The specification against loops that spell out the formulas, one pair at a time."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import LAYOUTS, NORMALIZERS, SCORES, VARIANTS, make_case, relative_error

import geot_kernels as gk

EXACT = 1e-13  # float64 sums of some 100 terms


def spline(knots, z, r_min, r_max):
    """Section 4 of docs/math.md at one number: `[C]` from `knots [G+1, 2, C]`."""
    intervals = len(knots) - 1
    h = (r_max - r_min) / intervals
    z = min(max(z, r_min), r_max)
    g = min(int((z - r_min) // h), intervals - 1)
    t = (z - r_min) / h - g
    (y0, s0), (y1, s1) = knots[g], knots[g + 1]
    return (
        (1 + 2 * t) * (1 - t) ** 2 * y0
        + t * (1 - t) ** 2 * s0
        + t**2 * (3 - 2 * t) * y1
        + t**2 * (t - 1) * s1
    )


def radial_function(case, dist, type_i, type_j):
    tensors = {n: x.detach() for n, x in case.tensors.items()}
    if case.radial == "gaussians":
        centers, gammas, weights = (tensors[n] for n in ("centers", "gammas", "weights"))
        return weights @ torch.exp(-gammas * (dist - centers) ** 2)
    pair = 0 if case.pair_index is None else int(case.pair_index[type_i, type_j])
    if "affine" in tensors:
        m, c = tensors["affine"][pair].tolist()
        dist, pair = m * dist + c, 0
    return spline(tensors["knots"][pair], dist, case.r_min, case.r_max)


def molecules(case):
    """The rows of each molecule's real atoms, as indices into the flattened rows."""
    if "ptr" in case.options:
        return [range(a, b) for a, b in itertools.pairwise(case.options["ptr"].tolist())]
    atoms = case.real.shape[1]
    return [
        [b * atoms + i for i in range(atoms) if bool(case.real[b, i])]
        for b in range(len(case.real))
    ]


def loops(case):
    """Output (flattened rows) and, for each molecule, its weights `[H, n, n]`."""
    packed = "ptr" in case.options
    rows = (case.tensors[n].detach() for n in ("q", "k", "v", "positions"))
    q, k, v, x = rows if packed else (x.flatten(0, 1) for x in rows)
    types = case.options.get("atom_types")
    types = torch.zeros(len(q), dtype=torch.int64) if types is None else types.flatten()
    out, weights = torch.zeros_like(q), []
    heads, channels = q.shape[1:]
    for rows in molecules(case):
        p = torch.zeros(heads, len(rows), len(rows), dtype=q.dtype)
        for (a, i), (b, j) in itertools.product(enumerate(rows), enumerate(rows)):
            f = radial_function(case, math.dist(x[i], x[j]), types[i], types[j])
            for head in range(heads):
                if case.score == "bias":
                    p[head, a, b] = 0.7 * float(q[i, head] @ k[j, head]) + f[head]
                else:
                    filters = f.view(heads, channels)[head]
                    p[head, a, b] = 0.7 * float((q[i, head] * k[j, head] * filters).sum())
        if case.normalizer == "softmax":
            p = p.softmax(-1)
        if "attention_scale" in case.tensors:
            mean = p.mean(-1, keepdim=True)
            p = (p - mean) * (1 + case.tensors["attention_scale"].detach()) + mean
        weights.append(p)
        for a, i in enumerate(rows):
            for b, j in enumerate(rows):
                out[i] += p[:, a, b, None] * v[j]
    return out, weights


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_output_and_weights_are_those_of_loops(variant, backend):
    for attention_scale in (False, True):
        case = make_case(*variant, attention_scale=attention_scale)
        expected, by_molecule = loops(case)
        with torch.no_grad():
            out, weights = case.attention(backend=backend), case.weights(backend=backend)
        assert relative_error(out.flatten(0, -3), expected) <= EXACT
        all_rows = case.real.nonzero()
        for b, p in enumerate(by_molecule):
            rows = all_rows[all_rows[:, 0] == b, 1]
            assert relative_error(weights[b][:, rows][:, :, rows], p) <= EXACT
        real = case.real[:, None, :, None] & case.real[:, None, None, :]
        assert bool((weights == 0).logical_or(real).all()), "padding is not exactly 0"


def test_the_scale_is_one_over_the_root_of_the_channels_unless_given():
    case = make_case(channels=5)
    del case.options["scale"]
    default = case.attention(backend="reference")
    assert torch.equal(default, case.attention(backend="reference", scale=5**-0.5))
    assert relative_error(case.attention(), default) <= EXACT


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_attention_scale_for_each_head_acts_on_its_head(layout):
    case = make_case("filter", "linear", layout=layout)
    scales = torch.tensor([0.3, -0.5], dtype=torch.float64)
    for backend in ("reference", "eager"):
        out = case.attention(backend=backend, attention_scale=scales)
        for head, s in enumerate(scales):
            alone = case.attention(backend=backend, attention_scale=s)
            assert relative_error(out[..., head, :], alone[..., head, :]) <= EXACT


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_any_callable_is_a_radial_function(score, normalizer):
    case = make_case(score, normalizer, "gaussians" if score == "bias" else "table")
    table = case.radial_function({n: x.detach() for n, x in case.tensors.items()})
    args = [case.tensors[n].detach() for n in ("q", "k", "v", "positions")]
    got = gk.geo_attention(*args, lambda d: table(d), backend="reference", **case.options)
    assert relative_error(got, case.attention(backend="reference")) <= EXACT


def test_a_callable_gets_types_where_they_are_given():
    case = make_case(radial="pair tables", layout="masked")
    table = case.radial_function({n: x.detach() for n, x in case.tensors.items()})
    args = [case.tensors[n].detach() for n in ("q", "k", "v", "positions")]
    got = gk.geo_attention(*args, lambda *a: table(*a), backend="reference", **case.options)
    assert relative_error(got, case.attention(backend="reference")) <= EXACT


def test_third_derivatives_of_the_reference_are_those_of_differences():
    case = make_case("filter", "softmax", "affine", coincident=False, sizes=(3, 2), channels=2)
    x = case.tensors["positions"]
    rest = {n: t.detach() for n, t in case.tensors.items()}

    def slope(positions):
        tensors = [positions if n == "positions" else rest[n] for n in case.tensors]
        energy = case.attention(*tensors, backend="reference").square().sum()
        return torch.autograd.grad(energy, positions, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(slope, (x,), atol=1e-5, fast_mode=True)
