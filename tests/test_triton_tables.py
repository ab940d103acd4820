"""The Triton kernels, interpreted: the forms in which they read a table."""

from __future__ import annotations

import pytest
import torch
from cases import NORMALIZERS, SCORES, VARIANTS, make_case
from fused import EXACT, assert_equal, assert_passes_equal, at_its_ends, exact_case
from fused import triton_module as module
from passes import in_float64, passes
from test_ops import POLICIES

import geot_kernels as gk

pytestmark = pytest.mark.interpreted
TABLES = [v for v in VARIANTS if v[0] == "bias" and v[2] != "gaussians" and v[3] != "full"]


@pytest.fixture
def form(monkeypatch):
    """Chooses rows (and words) or knots; counts what is made of a table."""
    made = []

    def choose(name):
        made.clear()
        pairs = {"rows": 0, "knots": 1 << 60}[name]
        monkeypatch.setattr(module("launch"), "_PAIRS_FOR_ROWS", pairs)
        monkeypatch.setattr(module("launch"), "_ATOMS_FOR_WORDS", 0)
        return made

    launch, second = module("launch"), module("second_backward")
    for place, name in ((launch, "rows_of"), (launch, "words_of"), (second, "rows_of")):
        make = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, m=make, n=name: (made.append(n), m(*a))[1])
    return choose


@pytest.mark.parametrize("variant", TABLES, ids=" ".join)
def test_all_passes_equal_the_reference_with_rows(variant, form):
    made = form("rows")
    assert_passes_equal(exact_case(*variant, attention_scale=True), "triton")
    assert set(made) == {"rows_of"} and len(made) >= 4  # of each pass, and the tangent of knots


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("tangent", ["knots", "positions", "affine"])
def test_the_second_order_of_a_single_gradient_equals_the_reference_with_rows(
    normalizer, tangent, form
):
    made = form("rows")
    case = exact_case("bias", normalizer, "affine", sizes=(66,), heads=1, channels=2)
    assert_passes_equal(case, "triton", tangent=[tangent])
    assert len(made) == 3 + (tangent == "knots")


@pytest.mark.parametrize("score", SCORES)
def test_a_filter_and_a_small_problem_read_knots(score, form):
    made = form("rows" if score == "filter" else "knots")
    assert_passes_equal(exact_case(score), "triton")
    assert not made


@pytest.mark.parametrize("knots", [2, 3, 300])
def test_tables_of_any_number_of_knots_become_rows(knots, form):
    form("rows")
    case = exact_case("bias", "softmax", "pair tables", sizes=(4, 3))
    pairs = case.tensors["knots"].shape[0]
    case.tensors["knots"] = torch.randn(pairs, knots, 2, 2, dtype=torch.float64)
    case.tensors["knots"].requires_grad_()
    case.r_max = 0.25 + (knots - 1) / 64
    assert_passes_equal(case, "triton")


# The ends of a table.


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_distances_at_the_ends_of_rows(normalizer, form):
    form("rows")
    for tangent in (None, ["positions"], ["knots"]):
        assert_passes_equal(
            at_its_ends("bias", normalizer, "table", "full", far=4.0625),
            "triton",
            tangent=tangent,
        )
    # At exactly r_max f'' jumps, and so does f' unless it is 0, as `tabulate` makes it.
    case = at_its_ends("bias", normalizer, "table", "full", slope=0.0)
    got, expected = (passes(case, b) for b in ("triton", "reference"))
    first = [n for n in got if not n.startswith("dd")]
    assert_equal({n: got[n] for n in first}, {n: expected[n] for n in first})
    assert all(bool(x.isfinite().all()) for x in got.values())


@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_affine_maps_may_lead_below_and_beyond_rows(policy, form):
    form("rows")
    case = exact_case(*policy, "affine", sizes=(4, 3), coincident=False)
    affine = torch.tensor([[1, 0], [-2, 1], [1, -1.5], [0, 2], [4, 0.5], [0.5, -30]]).double()
    case.tensors["affine"] = affine.requires_grad_()
    assert_passes_equal(case, "triton")


@pytest.mark.parametrize("score", SCORES)
def test_two_atoms_at_one_point_have_no_force_on_each_other_with_rows(score, form):
    form("rows")
    case = exact_case(score, "linear", layout="full", sizes=(2,))
    with torch.no_grad():
        case.tensors["positions"][0, 1] = case.tensors["positions"][0, 0]
    got = passes(case, "triton")
    assert not bool(got["d positions"].any()) and not bool(got["dd positions"].any())
    assert_equal(got, passes(case, "reference"))


# Words: a forward pass in 16 bits of which nobody wants a gradient.


def smooth(g, knots, channels):
    """A table of a smooth function, as networks are; its range is [0.25, 4.25]."""
    a, b = torch.randn(2, channels, generator=g).double()
    if knots < 16:
        return torch.randn(1, knots, 2, channels, generator=g).double()
    z = torch.linspace(0.25, 4.25, knots).double()[:, None]
    slope = a * b * (b * z).cos() * 4 / (knots - 1)
    return torch.stack((a * (b * z).sin(), slope), 1)[None]


def forward_cases(normalizer, knots, draws, **options):
    options = {"sizes": (9, 0, 5), "channels": 8} | options
    for seed in range(draws):
        case = exact_case("bias", normalizer, "table", seed=seed, **options)
        case.tensors["knots"] = smooth(torch.Generator().manual_seed(seed), knots, 2)
        case.tensors = {
            n: x.detach().to(torch.float16 if n in "qkv" else torch.float32)
            for n, x in case.tensors.items()
        }
        yield case


def lost(case, backend):
    """The error of an output of 16 bits, in units of its rounding."""
    exact = case.attention(*in_float64(case).values(), backend="reference")
    unit = torch.finfo(torch.float16).eps * exact.abs().max()
    return (case.attention(backend=backend).double() - exact).square().mean().sqrt() / unit


@pytest.mark.parametrize("knots", [2, 5, 9, 300, 1024, 2049, 2050, 4097, 4098])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_words_lose_no_more_than_16_bits_do(normalizer, knots, form):
    made = form("rows")
    errors = [
        [float(lost(case, b)) for b in ("triton", "reference")]
        for case in forward_cases(normalizer, knots, 3)
    ]
    assert set(made) == {"words_of" if knots <= 4097 else "rows_of"}
    got, expected = torch.tensor(errors).add(0.1).log().mean(0).exp() - 0.1
    assert got <= 2 * expected + 1, (got, expected)


def test_words_serve_large_molecules_and_the_ends_of_the_table(form):
    made = form("rows")
    for case in (
        *forward_cases("softmax", 9, 1, sizes=(140,), channels=2),
        *forward_cases("linear", 9, 1, sizes=(8,)),
    ):
        if case.normalizer == "linear":
            ends = at_its_ends("bias", "linear", "table", "full")
            case.tensors["positions"] = ends.tensors["positions"].detach().float()
            case.options.pop("mask", None)
        assert lost(case, "triton") <= 2 * lost(case, "reference") + 1
    assert made == ["words_of"] * 2


def test_a_constant_table_is_exact_in_words(form):
    made = form("rows")
    (case,) = forward_cases("linear", 9, 1)
    case.tensors["knots"] = torch.zeros_like(case.tensors["knots"])
    case.tensors["knots"][:, :, 0] = 0.375
    case.tensors["q"] = torch.zeros_like(case.tensors["q"])
    case.tensors["v"] = torch.ones_like(case.tensors["v"])
    out, expected = (case.attention(backend=b) for b in ("triton", "reference"))
    assert torch.equal(out, expected) and made == ["words_of"]


def test_words_serve_gradients_only_where_rows_are_normalised_again(form):
    made = form("rows")
    (case,) = forward_cases("softmax", 9, 1)
    case.tensors["v"].requires_grad_()
    case.attention(backend="triton")
    assert made == ["words_of"]
    (case,) = forward_cases("softmax", 9, 1, sizes=(130,))
    case.tensors["v"].requires_grad_()
    made.clear()
    case.attention(backend="triton")
    assert made == ["rows_of"]
    made.clear()
    (case,) = forward_cases("linear", 9, 1)
    without = case.attention(backend="triton")
    assert made == ["words_of"]
    made.clear()
    before = None
    for name, x in case.tensors.items():
        x.requires_grad_()
        exact = case.attention(backend="triton")
        assert made == ["rows_of"], name
        made.clear()
        assert before is None or torch.equal(exact, before), name
        before = exact.detach()
        x.requires_grad_(False)
    form("knots")
    other = case.attention(backend="triton")
    unit = torch.finfo(torch.float16).eps * float(other.abs().max())
    assert float((before - other).abs().max()) <= unit  # float32 inside: rounded alike, or nearly
    assert not torch.equal(before, without)  # or this test sees nothing


def test_nothing_but_one_table_in_16_bits_becomes_words(form):
    made = form("rows")
    for radial, dtype in (("pair tables", torch.float16), ("table", torch.float32)):
        case = make_case("bias", "softmax", radial, sizes=(3,))
        case.tensors = {
            n: x.detach().to(dtype if n in "qkv" else torch.float32)
            for n, x in case.tensors.items()
        }
        got = case.attention(backend="triton")
        assert made == ["rows_of"]
        made.clear()
        expected = case.attention(backend="reference")
        assert float((got - expected).abs().max()) <= 4 * torch.finfo(dtype).eps * 2
    case = exact_case("bias", "softmax", sizes=(3,))
    with torch.no_grad():
        got, expected = (case.attention(backend=b) for b in ("triton", "reference"))
    assert made == ["rows_of"] and float((got - expected).abs().max()) <= EXACT


def test_a_table_of_a_network_gives_what_the_network_gives(form):
    form("rows")
    torch.manual_seed(1)
    radial = gk.radial.RadialMLP(gk.radial.GaussianBasis(8, r_max=20.0), hidden=8, num_channels=2)
    table = gk.tabulate(radial.double(), r_max=20.0, num_knots=1024)
    case = exact_case(sizes=(5, 3), coincident=False)
    q, k, v, positions = (case.tensors[n].detach() for n in ("q", "k", "v", "positions"))
    options = {"mask": case.options["mask"], "scale": 0.75}
    exact = gk.geo_attention(q, k, v, positions, radial, backend="reference", **options)
    got = gk.geo_attention(q, k, v, positions, table, backend="triton", **options)
    assert float((got - exact).detach().abs().max()) <= 1e-5  # of the table
