"""Radial functions: values against formulas in NumPy, derivatives, dtypes, states and errors."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from geot_kernels.radial import (
    BesselBasis,
    CosineCutoff,
    ExponentialNormalBasis,
    GaussianBasis,
    GaussianSum,
    PhysNetBasis,
    PolynomialCutoff,
    RadialMLP,
    ShiftedSoftplus,
    shifted_softplus,
)

R_MAX = 4.0
BUDGET = 1e-13  # of float64 values of size 1 to 10, by a formula in another order

BASES = {
    "gaussian": lambda: GaussianBasis(7, R_MAX),
    "gaussian from r_min": lambda: GaussianBasis(7, R_MAX, r_min=1.0, gamma=3.0),
    "gaussian trainable": lambda: GaussianBasis(7, R_MAX, trainable=True),
    "gaussian with cutoff": lambda: GaussianBasis(7, R_MAX, cutoff=CosineCutoff(R_MAX)),
    "geot": GaussianBasis.geot,
    "exponential-normal": lambda: ExponentialNormalBasis(6, R_MAX),
    "exponential-normal with cutoff": lambda: ExponentialNormalBasis(
        6, R_MAX, cutoff=CosineCutoff(R_MAX)
    ),
    "physnet": lambda: PhysNetBasis(6, R_MAX),
    "bessel": lambda: BesselBasis(8, R_MAX),
    "bessel with cutoff": lambda: BesselBasis(8, R_MAX, cutoff=PolynomialCutoff(R_MAX)),
}
CUTOFFS = {
    "cosine": lambda: CosineCutoff(R_MAX),
    "polynomial": lambda: PolynomialCutoff(R_MAX),
    "polynomial p=3": lambda: PolynomialCutoff(R_MAX, p=3),
    "polynomial p=9": lambda: PolynomialCutoff(R_MAX, 9),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def distances(dtype=torch.float64):
    """Zero, near zero, inside, on both sides of `R_MAX`, and far beyond."""
    near_end = [R_MAX - 0.01, R_MAX + 0.01]
    return torch.tensor([0.0, 1e-9, 1e-3, 0.4, 1.1, 2.7, 3.9, *near_end, 7.3, 12.0], dtype=dtype)


def assert_close(actual, expected, budget=BUDGET):
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=budget, atol=budget)


def gaussians(d, centers, gamma):
    return np.array([[math.exp(-gamma * (x - mu) ** 2) for mu in centers] for x in d.tolist()])


def cosine_cutoff(d, r_max):
    return np.array(
        [0.5 * (math.cos(math.pi * x / r_max) + 1) if x < r_max else 0.0 for x in d.tolist()]
    )


def polynomial_cutoff(d, r_max, p):
    x = d.numpy() / r_max
    a, b, c = (p + 1) * (p + 2) / 2, p * (p + 2), p * (p + 1) / 2
    return np.where(x < 1, 1 - a * x**p + b * x ** (p + 1) - c * x ** (p + 2), 0.0)


def exponential_normal(d, num_basis, r_max, alpha):
    low = math.exp(-r_max)
    beta = 1 / (2 / num_basis * (1 - low)) ** 2
    centers = [low + k * (1 - low) / (num_basis - 1) for k in range(num_basis)]
    return gaussians((-alpha * d).exp(), centers, beta)


def ssp(x):
    return np.log1p(np.exp(x)) - math.log(2)


def test_gaussian_basis_has_evenly_spaced_centers_a_spacing_wide():
    d = distances()
    centers, spacing = [0.0, 1.0, 2.0, 3.0, 4.0], 1.0
    assert_close(GaussianBasis(5, R_MAX)(d), gaussians(d, centers, 1 / (2 * spacing**2)))
    centers, spacing = [1.0, 2.5, 4.0], 1.5
    assert_close(GaussianBasis(3, R_MAX, r_min=1)(d), gaussians(d, centers, 1 / (2 * spacing**2)))
    assert_close(GaussianBasis(3, R_MAX, r_min=1, gamma=0.7)(d), gaussians(d, centers, 0.7))


def test_one_gaussian_stands_at_r_min():
    d = distances()
    assert_close(GaussianBasis(1, R_MAX, r_min=1.0)(d), gaussians(d, [1.0], 1 / (2 * 3.0**2)))


def test_geot_basis_has_300_centers_every_tenth_of_an_angstrom():
    d = torch.cat((distances(), torch.tensor([29.9], dtype=torch.float64)))
    basis = GaussianBasis.geot()
    assert basis.num_basis == 300
    assert_close(basis(d), gaussians(d, [k / 10 for k in range(300)], 10.0))


def test_trainable_gaussians_start_as_the_fixed_ones():
    d = distances()
    trainable = GaussianBasis(7, R_MAX, trainable=True).double()
    assert {name for name, _ in trainable.named_parameters()} == {"centers", "gammas"}
    assert_close(trainable(d), GaussianBasis(7, R_MAX)(d), 1e-6)


def test_exponential_normal_basis_is_torchmd_nets():
    d = distances()
    expected = exponential_normal(d, 6, R_MAX, alpha=5 / R_MAX)
    assert_close(ExponentialNormalBasis(6, R_MAX)(d), expected)
    published = ExponentialNormalBasis(6, R_MAX, cutoff=CosineCutoff(R_MAX))
    assert_close(published(d), expected * cosine_cutoff(d, R_MAX)[:, None])
    steep = ExponentialNormalBasis(6, R_MAX, alpha=2.5)
    assert_close(steep(d), exponential_normal(d, 6, R_MAX, alpha=2.5))


def test_physnet_basis_includes_its_cutoff():
    d = distances()
    x = d.numpy() / R_MAX
    cutoff = np.where(x < 1, 1 - 6 * x**5 + 15 * x**4 - 10 * x**3, 0.0)
    expected = exponential_normal(d, 6, R_MAX, alpha=1.0) * cutoff[:, None]
    assert_close(PhysNetBasis(6, R_MAX)(d), expected)


def test_bessel_basis_follows_the_formula_on_both_sides_of_r_max():
    d = distances()[1:]
    expected = [
        [math.sqrt(2 / R_MAX) * math.sin(k * math.pi * x / R_MAX) / x for k in range(1, 9)]
        for x in d.tolist()
    ]
    assert_close(BesselBasis(8, R_MAX)(d), np.array(expected))
    cut = BesselBasis(8, R_MAX, cutoff=PolynomialCutoff(R_MAX))
    assert_close(cut(d), np.array(expected) * polynomial_cutoff(d, R_MAX, 6)[:, None])


def test_bessel_value_and_derivatives_are_right_at_zero_and_near_it():
    # sin(a d)/d = sum_n (-1)^n a^(2n+1) d^(2n) / (2n+1)!, differentiated term by term
    k_max, points = 4, [0.0, 1e-12, 1e-6, 1e-3, 0.2, 0.39, 0.41, 0.7]
    d = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    for k in range(1, k_max + 1):
        a = k * math.pi / R_MAX
        value = BesselBasis(k_max, R_MAX)(d)[:, k - 1]
        for order in range(5):
            expected = [
                math.sqrt(2 / R_MAX)
                * sum(
                    (-1) ** n
                    * a ** (2 * n + 1)
                    * math.prod(range(2 * n - order + 1, 2 * n + 1))
                    * (x ** (2 * n - order))
                    / math.factorial(2 * n + 1)
                    for n in range((order + 1) // 2, 30)
                )
                for x in points
            ]
            assert_close(value, expected, 1e-11)
            (value,) = torch.autograd.grad(value.sum(), d, create_graph=True)


def test_bessel_second_derivative_at_zero_is_minus_a_third_of_the_frequency_squared():
    basis = BesselBasis(3, R_MAX)
    d = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for k in range(3):
        a = (k + 1) * math.pi / R_MAX
        value = basis(d)[k]
        (slope,) = torch.autograd.grad(value, d, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, d)
        assert value.item() == pytest.approx(math.sqrt(2 / R_MAX) * a, rel=1e-14)
        assert slope.item() == 0
        assert curvature.item() == pytest.approx(-math.sqrt(2 / R_MAX) * a**3 / 3, rel=1e-14)


def test_bessel_derivatives_stay_finite_far_away_in_float32():
    d = torch.tensor([0.0, 1e-20, 0.1, 100.0, 1e4], requires_grad=True)
    (slope,) = torch.autograd.grad(BesselBasis(64, R_MAX)(d).sum(), d, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), d)
    assert slope.isfinite().all()
    assert curvature.isfinite().all()


@pytest.mark.parametrize("name", BASES)
def test_basis_adds_one_dimension_to_any_shape(name):
    basis = BASES[name]()
    for d in (torch.rand(()), torch.rand(0), torch.rand(3, 4, 5).transpose(0, 2)):
        out = basis(d)
        assert out.shape == (*d.shape, basis.num_basis)
        torch.testing.assert_close(out.reshape(-1, basis.num_basis), basis(d.reshape(-1)))


def test_cutoffs_follow_their_formulas():
    d = distances()
    assert_close(CosineCutoff(R_MAX)(d), cosine_cutoff(d, R_MAX))
    assert_close(PolynomialCutoff(R_MAX)(d), polynomial_cutoff(d, R_MAX, 6))
    assert_close(PolynomialCutoff(R_MAX, 3)(d), polynomial_cutoff(d, R_MAX, 3))
    assert_close(PolynomialCutoff(R_MAX, p=9)(d), polynomial_cutoff(d, R_MAX, 9))


@pytest.mark.parametrize("name", CUTOFFS)
def test_cutoff_falls_from_one_to_exactly_zero(name):
    cutoff = CUTOFFS[name]()
    values = cutoff(torch.linspace(0, R_MAX, 5001))
    assert values[0] == 1
    assert values.min() >= 0
    assert (values[1:] <= values[:-1] * (1 + 8 * 2**-23)).all()  # down to the tail, to 8 roundings
    beyond = torch.tensor([R_MAX, R_MAX + 1e-6, 50.0, 1e30, math.inf], requires_grad=True)
    out = cutoff(beyond)
    assert (out == 0).all()
    (slope,) = torch.autograd.grad(out.sum(), beyond)
    assert (slope == 0).all()


@pytest.mark.parametrize("name", CUTOFFS)
def test_cutoff_is_smooth_where_it_ends(name):
    step = 1e-6
    d = torch.tensor([R_MAX - step, R_MAX + step], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(CUTOFFS[name]()(d).sum(), d, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), d)
    assert slope.abs().max() < 1e-5
    jump = abs(curvature[0] - curvature[1]).item()
    if name == "cosine":
        assert jump == pytest.approx(math.pi**2 / (2 * R_MAX**2), rel=1e-6)
    else:
        assert jump < 1e-4


@pytest.mark.parametrize("name", [*BASES, *CUTOFFS])
def test_first_and_second_derivatives(name):
    module = {**BASES, **CUTOFFS}[name]().double()
    ends = [] if "cosine" in name or "with cutoff" in name else [R_MAX]
    d = torch.tensor([0.0, 0.3, 1.9, R_MAX - 0.01, *ends, R_MAX + 0.01, 7.0]).double()
    d.requires_grad_()
    inputs = (d, *module.parameters())
    assert gradcheck(lambda d, *_: module(d), inputs)
    assert gradgradcheck(lambda d, *_: module(d), inputs)


@pytest.mark.parametrize("basis", ["gaussian trainable", "bessel", "physnet"])
@pytest.mark.parametrize("activation", ["silu", "ssp", "gelu", "tanh"])
def test_network_derivatives(basis, activation):
    net = RadialMLP(
        BASES[basis](),
        5,
        3,
        activation=activation,
        final_activation="ssp",
        cutoff=PolynomialCutoff(R_MAX),
        num_types=3,
        type_dim=2,
    ).double()
    d = torch.tensor([0.0, 1.2, R_MAX - 0.01, R_MAX, 6.0]).double().requires_grad_()
    types = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([0, 2, 2, 0, 1])
    inputs = (d, *net.parameters())
    assert gradcheck(lambda d, *_: net(d, *types), inputs)
    assert gradgradcheck(lambda d, *_: net(d, *types), inputs)


@pytest.mark.parametrize("activation", ["relu", "elu"])
def test_network_derivatives_away_from_kinks(activation):
    net = RadialMLP(BASES["gaussian"](), 5, 3, activation=activation).double()
    d = torch.tensor([0.1, 1.2, 3.4]).double().requires_grad_()
    assert gradcheck(net, (d,))
    assert gradgradcheck(net, (d,))


def test_shifted_softplus_derivatives():
    x = torch.tensor([-50.0, -3.0, 0.0, 1.0, 19.9, 20.1, 39.0, 41.0]).double().requires_grad_()
    assert gradcheck(shifted_softplus, (x,))
    assert gradgradcheck(shifted_softplus, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*BASES, *CUTOFFS])
def test_dtype_is_that_of_the_distances(name, dtype):
    out = {**BASES, **CUTOFFS}[name]()(distances(dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()


@pytest.mark.parametrize("name", sorted({*BASES} - {"gaussian trainable"}))
def test_bfloat16_and_autocast_round_no_center(name):
    d = torch.linspace(0, 30, 301)
    expected = BASES[name]()(d)
    assert torch.equal(BASES[name]().bfloat16()(d), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(BASES[name]()(d), expected)


@pytest.mark.parametrize("name", [*BASES, *CUTOFFS])
def test_float32_is_as_good_as_its_distances(name):
    module = {**BASES, **CUTOFFS}[name]()
    d = torch.linspace(0, 12, 1001, dtype=torch.float64, requires_grad=True)
    exact = module(d)
    # a function of size a and slope b loses a few roundings of both, the slope's times 12 Å
    slope = torch.func.vmap(torch.func.jacrev(module))(d).abs().max().item()
    budget = 4 * 2**-24 * (exact.abs().max().item() + 12 * slope)
    assert (module(d.float()).double() - exact).abs().max() < budget


def test_network_computes_in_the_dtype_of_the_distances():
    net = RadialMLP(GaussianBasis.geot(), 8, 4, activation="ssp").bfloat16()
    wide = RadialMLP(GaussianBasis.geot(), 8, 4, activation="ssp")
    wide.load_state_dict(net.state_dict())
    d = torch.linspace(0, 12, 50)
    assert torch.equal(net(d), wide(d))
    out = net(d.double())
    assert out.dtype == torch.float64
    assert_close(out, wide.double()(d.double()).detach().numpy())


def test_shifted_softplus_is_exact_in_float64():
    x = torch.tensor([-700.0, -30.0, -1.0, 0.0, 1.0, 19.99, 20.01, 25.0, 39.9, 40.1, 1e4]).double()
    expected = [max(v, 0) + math.log1p(math.exp(-abs(v))) - math.log(2) for v in x.tolist()]
    assert_close(shifted_softplus(x), expected, 1e-15)
    assert torch.equal(ShiftedSoftplus()(x), shifted_softplus(x))
    assert shifted_softplus(torch.tensor([-1e4, 1e4])).isfinite().all()


def test_geot_filter():
    net = RadialMLP(
        GaussianBasis.geot(), 64, 2 * 16, activation="ssp", final_activation="ssp"
    ).double()
    assert net.num_channels == 32
    assert not net.takes_types
    (w_1, b_1), (w_2, b_2) = [
        (layer.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in net.layers
    ]
    d = distances()
    e = gaussians(d, [0.1 * k for k in range(300)], 10.0)
    assert_close(net(d), ssp(ssp(e @ w_1 + b_1) @ w_2 + b_2))


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("silu", lambda x: x / (1 + np.exp(-x))),
        ("ssp", ssp),
        ("relu", lambda x: np.maximum(x, 0)),
        ("gelu", lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))),
        ("tanh", np.tanh),
        ("elu", lambda x: np.where(x > 0, x, np.exp(x) - 1)),
    ],
)
def test_activations_by_name(name, formula):
    hidden = RadialMLP(GaussianBasis(4, R_MAX), (6, 5), 3, activation=name).double()
    final = RadialMLP(GaussianBasis(4, R_MAX), (), 3, final_activation=name).double()
    d = distances()
    y = hidden.basis(d).detach().numpy()
    for layer in hidden.layers[:-1]:
        y = formula(y @ layer.weight.detach().numpy().T + layer.bias.detach().numpy())
    last = hidden.layers[-1]
    assert_close(hidden(d), y @ last.weight.detach().numpy().T + last.bias.detach().numpy())
    (only,) = final.layers
    linear = final.basis(d) @ only.weight.T + only.bias
    assert_close(final(d), formula(linear.detach().numpy()))


def test_silu_is_the_default_and_the_last_layer_is_linear():
    d = distances().float()
    default = RadialMLP(GaussianBasis(4, R_MAX), 6, 3)
    named = RadialMLP(GaussianBasis(4, R_MAX), [6], 3, activation="silu")
    named.load_state_dict(default.state_dict())
    assert torch.equal(default(d), named(d))
    default.layers[-1].weight.data.zero_()
    default.layers[-1].bias.data.fill_(-1.0)
    assert (default(d) == -1).all()


def test_activation_can_be_a_function_or_a_module():
    d = distances().float()
    named = RadialMLP(GaussianBasis(4, R_MAX), 6, 3, activation="tanh", final_activation="ssp")
    given = RadialMLP(
        GaussianBasis(4, R_MAX), 6, 3, activation=torch.tanh, final_activation=ShiftedSoftplus()
    )
    given.load_state_dict(named.state_dict())
    assert torch.equal(named(d), given(d))
    learned = RadialMLP(GaussianBasis(4, R_MAX), 6, 3, activation=nn.PReLU())
    assert "activation.weight" in learned.state_dict()


def test_network_cutoff_multiplies_the_result():
    d = distances()
    free = RadialMLP(GaussianBasis(4, R_MAX), 6, 3, final_activation="ssp").double()
    cut = RadialMLP(
        GaussianBasis(4, R_MAX), 6, 3, final_activation="ssp", cutoff=CosineCutoff(R_MAX)
    ).double()
    cut.load_state_dict(free.state_dict())
    assert_close(cut(d), free(d).detach().numpy() * cosine_cutoff(d, R_MAX)[:, None])


def test_types_enter_as_the_sum_of_their_embeddings():
    net = RadialMLP(
        GaussianBasis(4, R_MAX), 6, 3, activation="ssp", num_types=5, type_dim=7
    ).double()
    assert net.takes_types
    d, i, j = torch.rand(11).double() * 6, torch.randint(5, (11,)), torch.randint(5, (11,))
    a = net.type_embedding.weight.detach().numpy()
    first, last = [
        (layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in net.layers
    ]
    assert a.shape == (5, 7)
    for m in range(11):
        e = [math.exp(-((d[m].item() - mu) ** 2) / (2 * (R_MAX / 3) ** 2)) for mu in
             (0, R_MAX / 3, 2 * R_MAX / 3, R_MAX)]  # fmt: skip
        x = np.concatenate((e, a[i[m]] + a[j[m]]))
        expected = last[0] @ ssp(first[0] @ x + first[1]) + last[1]
        assert_close(net(d, i, j)[m], expected)


def test_swapping_types_changes_nothing():
    net = RadialMLP(GaussianBasis.geot(), 16, 8, num_types=4)
    d, i, j = torch.rand(100) * 6, torch.randint(4, (100,)), torch.randint(4, (100,))
    assert torch.equal(net(d, i, j), net(d, j, i))
    assert not torch.allclose(net(d, i, j), net(d, i, i))


def test_state_dict_round_trip():
    def make():
        basis = GaussianBasis(9, R_MAX, trainable=True)
        return RadialMLP(basis, (8, 6), 4, num_types=3, type_dim=5)

    net, other = make(), make()
    with torch.no_grad():
        net.basis.centers += 0.1
    arguments = torch.rand(20) * 6, torch.randint(3, (20,)), torch.randint(3, (20,))
    assert not torch.equal(net(*arguments), other(*arguments))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(*arguments), other(*arguments))


@pytest.mark.parametrize("name", sorted({*BASES} - {"gaussian trainable"}))
def test_fixed_bases_have_no_state(name):
    basis = BASES[name]()
    assert not basis.state_dict()
    assert not list(basis.buffers())


def gaussian_sum(dtype=torch.float64):
    return GaussianSum(
        torch.tensor([0.0, 0.7, 1.9, 3.0], dtype=dtype),
        torch.tensor([0.3, 10.0, 2.0, 1.0], dtype=dtype),
        torch.randn(3, 4, dtype=dtype),
    )


def test_gaussian_sum_formula():
    radial, d = gaussian_sum(), distances().view(-1, 1)
    assert radial.num_channels == 3
    out = radial(d)
    assert out.shape == (len(d), 1, 3)
    for m, c in np.ndindex(len(d), 3):
        expected = sum(
            radial.weights[c, k].item()
            * math.exp(-radial.gammas[k].item() * (d[m].item() - radial.centers[k].item()) ** 2)
            for k in range(4)
        )
        assert_close(out[m, 0, c], expected)


def test_gaussian_sum_gradients_are_those_of_the_formulas():
    radial, d, g = gaussian_sum(), distances(), torch.randn(11, 3).double()
    leaves = [x.requires_grad_() for x in (radial.centers, radial.gammas, radial.weights)]
    grads = torch.autograd.grad((radial(d) * g).sum(), leaves)
    d_centers, d_gammas, d_weights = np.zeros(4), np.zeros(4), np.zeros((3, 4))
    for m, c, k in np.ndindex(11, 3, 4):
        delta = d[m].item() - radial.centers[k].item()
        gamma, w = radial.gammas[k].item(), radial.weights[c, k].item()
        phi = math.exp(-gamma * delta**2) * g[m, c].item()
        d_weights[c, k] += phi
        d_centers[k] += w * 2 * gamma * delta * phi
        d_gammas[k] -= w * delta**2 * phi
    for actual, expected in zip(grads, (d_centers, d_gammas, d_weights), strict=True):
        assert_close(actual, expected)


def test_gaussian_sum_derivatives():
    def evaluate(d, *tensors):
        return GaussianSum(*tensors)(d)

    radial = gaussian_sum()
    d = torch.tensor([0.0, 0.7, 2.5]).double()
    tensors = (d, radial.centers, radial.gammas, radial.weights)
    inputs = tuple(x.requires_grad_() for x in tensors)
    assert gradcheck(evaluate, inputs)
    assert gradgradcheck(evaluate, inputs)


def test_gaussian_sum_is_a_pytree():
    radial = gaussian_sum()
    shapes = pytree.tree_map(lambda x: list(x.shape), radial)
    assert isinstance(shapes, GaussianSum)
    assert (shapes.centers, shapes.gammas, shapes.weights) == ([4], [4], [3, 4])
    d = distances()
    graph = make_fx(lambda radial, d: radial(d))(radial, d)
    other = pytree.tree_map(lambda x: 2 * x, radial)
    assert torch.equal(graph(other, d), other(d))


def test_gaussian_sum_takes_distances_more_precise_than_itself():
    radial = gaussian_sum(torch.float32)
    exact = pytree.tree_map(torch.Tensor.double, radial)
    assert_close(radial(distances()), exact(distances()).numpy(), 1e-6)
    assert radial(distances()).dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianBasis(0, 5.0), "num_basis: expected an integer >= 1, got 0"),
        (lambda: BesselBasis(2.5, 5.0), "num_basis: expected an integer >= 1, got 2.5"),
        (lambda: GaussianBasis(4, -1.0), "r_max: expected a number > 0, got -1.0"),
        (lambda: ExponentialNormalBasis(4, 0), "r_max: expected a number > 0, got 0"),
        (lambda: PhysNetBasis(4, math.nan), "r_max: expected a number > 0, got nan"),
        (lambda: BesselBasis(4, math.inf), "r_max: expected a number > 0, got inf"),
        (lambda: CosineCutoff(-2), "r_max: expected a number > 0, got -2"),
        (lambda: PolynomialCutoff(0.0), "r_max: expected a number > 0, got 0.0"),
        (lambda: GaussianBasis(4, 5.0, r_min=5), "r_min: expected a number < r_max=5.0, got 5"),
        (lambda: GaussianBasis(4, 5.0, gamma=0.0), "gamma: expected a number > 0, got 0.0"),
        (lambda: ExponentialNormalBasis(4, 5.0, alpha=-1), "alpha: expected a number > 0, got -1"),
        (lambda: PolynomialCutoff(5.0, p=2), "p: expected an integer >= 3, got 2"),
        (lambda: RadialMLP(nn.ReLU(), 8, 4), "basis: expected a Module with num_basis, got ReLU"),
        (lambda: RadialMLP(BesselBasis(4, 5), 0, 4), "hidden: expected an integer >= 1, got 0"),
        (lambda: RadialMLP(BesselBasis(4, 5), (8, -1), 4), "hidden: .* got -1"),
        (lambda: RadialMLP(BesselBasis(4, 5), 8, 0), "num_channels: .* got 0"),
        (lambda: RadialMLP(BesselBasis(4, 5), 8, 4, num_types=0), "num_types: .* got 0"),
        (lambda: RadialMLP(BesselBasis(4, 5), 8, 4, num_types=3, type_dim=0), "type_dim: .* 0"),
        (
            lambda: RadialMLP(BesselBasis(4, 5), 8, 4, activation="swish"),
            "activation: expected one of silu, ssp, .* a Module or a function, got 'swish'",
        ),
        (
            lambda: RadialMLP(BesselBasis(4, 5), 8, 4, final_activation=nn.SiLU),
            "final_activation: expected one of .*SiLU",
        ),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match="^" + message):
        make()


def test_missing_and_superfluous_types_are_errors():
    d, types = torch.rand(3), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="types_i, types_j: expected atom types, got None"):
        RadialMLP(BesselBasis(4, 5), 8, 4, num_types=2)(d, types)
    with pytest.raises(ValueError, match="types_i, types_j: expected None"):
        RadialMLP(BesselBasis(4, 5), 8, 4)(d, types, types)
