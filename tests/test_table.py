"""Tables of radial functions: the spline, its derivatives, making of tables, and their errors."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicHermiteSpline
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from geot_kernels import GaussianSum, RadialTable, TableError, table_error, tabulate
from geot_kernels.radial import GaussianBasis, RadialMLP
from geot_kernels.table import (
    hermite,
    hermite_curvature,
    hermite_slope,
    spline_slopes,
)

SIZES = (5, 6, 17, 33, 64, 65, 100, 1024)
EPS = torch.finfo(torch.float64).eps
EPS_32 = torch.finfo(torch.float32).eps
# Of a few dozen float64 sums and products of numbers of size 1, in another order.
BUDGET = 100 * EPS


class TypedFunction(nn.Module):
    """Symmetric in the types and different for each pair."""

    def __init__(self, num_types=3, num_channels=2):
        super().__init__()
        self.width = nn.Parameter(torch.rand(num_types, num_types) + 1)
        self.num_channels = num_channels

    def forward(self, dist, types_i, types_j):
        width = (self.width + self.width.T)[types_i, types_j].to(dist.dtype)
        phase = torch.arange(self.num_channels, dtype=dist.dtype, device=dist.device)
        return torch.sin((dist / width).unsqueeze(-1) + phase)


def network(num_channels=3, num_basis=8, **options):
    return RadialMLP(GaussianBasis(num_basis, 5.0), 8, num_channels, **options)


def waves(dist):
    """Two channels, smooth, of size 1, in the dtype of the distances."""
    return torch.stack((torch.sin(2 * dist), torch.exp(-dist) * torch.cos(dist)), -1)


def waves_slope(dist):
    decay = torch.exp(-dist)
    return torch.stack((2 * torch.cos(2 * dist), -decay * (torch.cos(dist) + torch.sin(dist))), -1)


def waves_curvature(dist):
    return torch.stack((-4 * torch.sin(2 * dist), 2 * torch.exp(-dist) * torch.sin(dist)), -1)


def derivatives(fn, z):
    """`f`, `f'`, `f''` `[M, C]` by one reverse pass for each channel."""
    z = z.detach().requires_grad_()
    values = fn(z)
    slopes, curvatures = [], []
    for c in range(values.shape[-1]):
        (slope,) = torch.autograd.grad(values[:, c].sum(), z, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), z, retain_graph=True)
        slopes.append(slope.detach())
        curvatures.append(curvature)
    return values.detach(), torch.stack(slopes, -1), torch.stack(curvatures, -1)


def dense_slopes(values):
    """Solves the system of `docs/math.md`, section 4, with NumPy."""
    y = values.numpy()
    count = len(y)
    matrix, right = np.zeros((count, count)), np.zeros_like(y)
    matrix[0, 0] = matrix[-1, -1] = 1
    right[0] = (-25 * y[0] + 48 * y[1] - 36 * y[2] + 16 * y[3] - 3 * y[4]) / 12
    for g in range(1, count - 1):
        matrix[g, g - 1 : g + 2] = 1, 4, 1
        right[g] = 3 * (y[g + 1] - y[g - 1])
    return torch.from_numpy(np.linalg.solve(matrix, right))


# The spline.


@pytest.mark.parametrize("num_knots", SIZES)
def test_slopes_solve_the_banded_system(num_knots):
    values = torch.randn(num_knots, 3, dtype=torch.float64)
    slopes = spline_slopes(values)
    assert (slopes - dense_slopes(values)).abs().max() < BUDGET
    assert slopes[-1].abs().max() < BUDGET


@pytest.mark.parametrize("num_knots", SIZES)
def test_slopes_in_float32_round_as_float32_does(num_knots):
    values = torch.randn(num_knots, 3)
    exact = dense_slopes(values.double())
    # Sums of 33 terms, 3 (48/12 at the lower end) times the values.
    assert (spline_slopes(values) - exact).abs().max() < 32 * EPS_32 * values.abs().max()


def test_slopes_are_linear_and_mix_no_channels():
    values = torch.randn(40, 2, dtype=torch.float64)
    both = spline_slopes(values)
    for c in range(2):
        alone = spline_slopes(values[:, c : c + 1])
        assert (both[:, c : c + 1] - alone).abs().max() < BUDGET
    assert (spline_slopes(3 * values) - 3 * both).abs().max() < 3 * BUDGET


def test_lower_end_slope_is_exact_for_a_quartic():
    grid = torch.arange(20, dtype=torch.float64)
    values = torch.stack((grid**4, 3 * grid - 1), -1)
    # Rounding of sums of terms as large as 25/12 · 4^4.
    assert (spline_slopes(values)[0] - torch.tensor([0.0, 3.0])).abs().max() < 1e-11


@pytest.mark.parametrize("num_knots", SIZES)
def test_second_derivative_is_continuous_at_inner_knots(num_knots):
    values = torch.randn(num_knots, 2, dtype=torch.float64)
    knots = torch.stack((values, spline_slopes(values)), 1)  # [G+1, 2, C]
    rows = torch.cat((knots[:-1], knots[1:]), 1)  # [G, 4, C]
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for weights in (hermite(ends), hermite_slope(ends), hermite_curvature(ends)):
        left, right = weights @ rows[:-1], weights @ rows[1:]
        # f'' h² is a difference of terms six times the values.
        assert (left[:, 1] - right[:, 0]).abs().max() < 20 * BUDGET


def test_hermite_weights_are_those_of_the_formulas():
    t = torch.rand(50, dtype=torch.float64)
    value = ((1 + 2 * t) * (1 - t) ** 2, t * (1 - t) ** 2, t**2 * (3 - 2 * t), t**2 * (t - 1))
    slope = (6 * t**2 - 6 * t, 3 * t**2 - 4 * t + 1, 6 * t - 6 * t**2, 3 * t**2 - 2 * t)
    curvature = (12 * t - 6, 6 * t - 4, 6 - 12 * t, 6 * t - 2)
    weights = (hermite, hermite_slope, hermite_curvature)
    for fn, exact in zip(weights, (value, slope, curvature), strict=True):
        assert (fn(t) - torch.stack(exact, -1)).abs().max() < BUDGET


def test_hermite_slope_and_curvature_are_derivatives_of_hermite():
    t = torch.rand(50, dtype=torch.float64)
    _, slope, curvature = derivatives(hermite, t)
    assert (hermite_slope(t) - slope).abs().max() < BUDGET
    assert (hermite_curvature(t) - curvature).abs().max() < BUDGET


@pytest.mark.parametrize("num_knots", SIZES)
@pytest.mark.parametrize("r_min", [0.0, 1.25, -2.0])
def test_interpolation_equals_scipy(num_knots, r_min):
    table = tabulate(waves, 5.0, num_knots, r_min=r_min, dtype=torch.float64)
    grid = np.linspace(r_min, 5.0, num_knots)
    h = (5.0 - r_min) / (num_knots - 1)
    values, slopes = table.knots[0].unbind(1)
    spline = CubicHermiteSpline(grid, values.numpy(), slopes.numpy() / h)
    z = torch.from_numpy(np.random.default_rng(0).uniform(r_min, 5.0, 400))
    found = derivatives(table, z)
    # A knot's place is rounded to EPS |z|; divided by h that moves f'' by f''' EPS / h.
    for order, (budget, computed) in enumerate(zip((1, 1 / h, 1 / h**2), found, strict=True)):
        exact = torch.from_numpy(spline(z.numpy(), order))
        assert (computed - exact).abs().max() < 10 * BUDGET * max(budget, 1)


@pytest.mark.parametrize("num_knots", [5, 64])
def test_table_goes_through_the_function_at_the_knots(num_knots):
    table = tabulate(waves, 5.0, num_knots, r_min=0.5, dtype=torch.float64)
    z = torch.linspace(0.5, 5.0, num_knots, dtype=torch.float64)
    assert torch.equal(table.knots[0, :, 0], waves(z))
    assert (table(z) - waves(z)).abs().max() < BUDGET


@pytest.mark.parametrize("num_knots", [5, 64])
def test_table_is_constant_outside_its_range(num_knots):
    table = tabulate(waves, 5.0, num_knots, r_min=1.0, dtype=torch.float64)
    z = torch.tensor([-3.0, 0.0, 0.999, 5.001, 7.0, 1e9, torch.inf], dtype=torch.float64)
    ends = torch.tensor([1.0] * 3 + [5.0] * 4, dtype=torch.float64)
    values, slope, curvature = derivatives(table, z)
    assert (values - waves(ends)).abs().max() < BUDGET
    assert torch.equal(slope, torch.zeros_like(slope))
    assert torch.equal(curvature, torch.zeros_like(curvature))


def test_slope_dies_away_towards_r_max():
    table = tabulate(waves, 5.0, 64, dtype=torch.float64)
    z = torch.tensor([5.0 - 1e-9, 5.0 - 1e-12], dtype=torch.float64)
    _, slope, curvature = derivatives(table, z)
    assert (slope.abs() <= 2e-9 * curvature.abs() + 1e-10).all()


def test_first_and_second_derivative_follow_the_function():
    table = tabulate(waves, 12.0, 4096, dtype=torch.float64)
    z = torch.linspace(0.0, 10.0, 999, dtype=torch.float64)
    h = 12.0 / 4095
    values, slope, curvature = derivatives(table, z)
    # Spline theory: h⁴/384, h³/24, 3h²/8 times the largest fourth derivative, 16; EPS / h² rounds.
    assert (values - waves(z)).abs().max() < 16 * h**4 / 384 + BUDGET
    assert (slope - waves_slope(z)).abs().max() < 16 * h**3 / 24 + BUDGET
    assert (curvature - waves_curvature(z)).abs().max() < 16 * h**2 * 3 / 8


def test_distances_may_have_any_shape():
    table = tabulate(network(), 5.0, 64)
    dist = 6 * torch.rand(2, 3, 4)
    assert table(dist).shape == (2, 3, 4, 3)
    assert torch.equal(table(dist)[1, 2], table(dist[1, 2]))
    assert table(dist[:0]).shape == (0, 3, 4, 3)
    assert table(torch.tensor(1.0)).shape == (3,)


def test_a_distance_that_is_no_number_gives_no_number():
    table = tabulate(waves, 5.0, 64)
    values = table(torch.tensor([1.0, torch.nan]))
    assert values[0].isfinite().all()
    assert values[1].isnan().all()


# Gradients.


@pytest.mark.parametrize("num_types", [None, 2])
def test_tabulate_is_differentiable_twice_in_parameters_and_affine(num_types):
    fn = RadialMLP(GaussianBasis(3, 5.0), 2, 1).double()
    names = [name for name, _ in fn.named_parameters()]
    pairs = 1 if num_types is None else 3
    affine = torch.rand(pairs, 2, dtype=torch.float64, requires_grad=True)

    def knots(affine, *parameters):
        def radial(dist):
            state = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(fn, state, (dist,))

        table = tabulate(radial, 5.0, 7, num_types=num_types, affine=affine, dtype=torch.float64)
        return table.knots, table.affine

    inputs = (affine, *(p.detach().requires_grad_() for p in fn.parameters()))
    assert gradcheck(knots, inputs)
    assert gradgradcheck(knots, inputs)


def test_gradients_reach_the_parameters_of_a_module():
    fn = TypedFunction()
    table = tabulate(fn, 5.0, 32, num_types=3)
    table.knots.square().sum().backward()
    assert (fn.width.grad != 0).all()


@pytest.mark.parametrize("num_knots", [64, 1500])
def test_gradients_of_a_float32_module_are_float32_on_both_sides_of_1024_knots(num_knots):
    fn = network()
    tabulate(fn, 5.0, num_knots).knots.sum().backward()
    for p in fn.parameters():
        assert p.dtype == torch.float32
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()


def test_call_is_differentiable_twice_in_distances_knots_and_affine():
    table = tabulate(TypedFunction(2, 1).double(), 5.0, 6, num_types=2)
    affine = torch.tensor([[1.0, 0.1], [0.9, 0.2], [1.1, -0.1]], dtype=torch.float64)
    # Inside the intervals: the third derivative jumps at the knots.
    dist = torch.tensor([0.31, 1.55, 2.4, 3.7, 6.2], dtype=torch.float64)
    types_i, types_j = torch.tensor([0, 1, 0, 1, 1]), torch.tensor([1, 1, 0, 0, 1])

    def call(dist, knots, affine):
        return dataclasses.replace(table, knots=knots, affine=affine)(dist, types_i, types_j)

    inputs = tuple(x.detach().requires_grad_() for x in (dist, table.knots, affine))
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


# How well a table follows its function.


def relative_errors(fn, table, r_max, places=1000):
    """Largest errors of `f`, `f'`, `f''` at random places, relative to the largest of each."""
    h = r_max / (table.num_knots - 1)
    z = torch.rand(places, dtype=torch.float64) * (r_max - 16 * h)
    exact = derivatives(fn, z)
    table = dataclasses.replace(table, knots=table.knots.detach().double())
    pairs = zip(derivatives(table, z), exact, strict=True)
    return [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]


# `docs/math.md`, section 4: everything in float64. Weights are others here: room by a factor of 2.
PUBLISHED = {
    512: (5.7e-6, 3.9e-4, 8.2e-3),
    1024: (1.8e-7, 2.3e-5, 1.3e-3),
    2048: (1.1e-8, 1.6e-6, 3.2e-4),
}


def geot_filter():
    options = {"activation": "ssp", "final_activation": "ssp"}
    return RadialMLP(GaussianBasis.geot(), 64, 2, **options)


@pytest.mark.parametrize("intervals", PUBLISHED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_errors_of_a_geot_filter_are_those_published(dtype, intervals):
    fn = geot_filter().to(dtype)
    with torch.no_grad():
        table = tabulate(fn, 15.0, intervals + 1)  # more than 1024 knots: float64 inside
    errors = relative_errors(fn.double(), table, 15.0, 300)
    # A table stored in float32 rounds each of the values that f' and f'' are differences of,
    # f' h = 3/2 (y_1 - y_0) + ... and f'' h^2 = 6 (y_1 - y_0) + ...
    h, eps = 15.0 / intervals, 0.0 if dtype == torch.float64 else EPS_32 / 2
    size = table.knots[:, :, 0].abs().max() * eps
    _, slope, curvature = (x.abs().max() for x in derivatives(fn, torch.linspace(0, 15, 500)))
    rounding = (2 * eps, 2 * 2 * size / h / slope, 2 * 7 * size / h**2 / curvature)
    for error, published, stored in zip(errors, PUBLISHED[intervals], rounding, strict=True):
        assert error < 2 * published + stored


def test_float64_inside_keeps_the_second_derivative_of_many_knots():
    fn = geot_filter()
    with torch.no_grad():
        table = tabulate(fn, 15.0, 4097)
        values = fn(torch.linspace(0, 15.0, 4097))
        rounded = torch.stack((values, spline_slopes(values)), 1)[None]
    inside = dataclasses.replace(table, knots=rounded)
    fn = fn.double()
    better, worse = (relative_errors(fn, x, 15.0, 300)[2] for x in (table, inside))
    assert better < 0.4 * worse


def test_errors_shrink_as_the_fourth_third_and_second_power():
    errors = []
    # At fewer knots the one-sided slope at the lower end, of higher order, still shows.
    for num_knots in (513, 1025, 2049):
        table = tabulate(waves, 12.0, num_knots, dtype=torch.float64)
        errors.append(relative_errors(waves, table, 12.0))
    for coarse, fine in itertools.pairwise(errors):
        for order, (a, b) in enumerate(zip(coarse, fine, strict=True)):
            # Between the knots; 1000 random places meet the worst ones within 20 %.
            assert 0.8 * 2 ** (4 - order) < a / b < 1.25 * 2 ** (4 - order)


def test_float64_is_used_inside_beyond_1024_knots():
    seen = []

    def fn(dist):
        seen.append(dist.dtype)
        return waves(dist)

    for num_knots in (1024, 1025):
        assert tabulate(fn, 5.0, num_knots).knots.dtype == torch.float32
    assert seen == [torch.float32, torch.float64]
    table = tabulate(waves, 12.0, 4097)
    exact = tabulate(waves, 12.0, 4097, dtype=torch.float64)
    assert torch.equal(table.knots, exact.knots.float())


def test_autocast_is_off_inside():
    fn, seen = network(), []
    fn.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    expected = tabulate(fn, 5.0, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        table = tabulate(fn, 5.0, 64)
    assert seen == [False, False]
    assert torch.equal(table.knots, expected.knots)


# Dtypes, devices, kinds of functions.


@pytest.mark.parametrize(
    ("of_module", "of_table"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize("num_knots", [64, 1500])
def test_table_takes_the_dtype_of_the_module(of_module, of_table, num_knots):
    fn = network().to(of_module)
    table = tabulate(fn, 5.0, num_knots)
    assert table.knots.dtype == of_table
    assert next(fn.parameters()).dtype == of_module
    z = torch.linspace(0.0, 5.0, num_knots, dtype=of_table)
    if num_knots == 64:
        assert torch.equal(table.knots[0, :, 0], fn.to(of_table)(z))


def test_ordinary_module_in_bfloat16_is_evaluated_in_float32():
    fn = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4), nn.SiLU(), nn.Linear(4, 2))
    fn.bfloat16()
    table = tabulate(fn, 5.0, 64)
    z = torch.linspace(0.0, 5.0, 64)
    assert torch.equal(table.knots[0, :, 0], fn.float()(z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_may_be_chosen(dtype):
    table = tabulate(network(), 5.0, 64, dtype=dtype, affine=torch.ones(1, 2))
    assert table.knots.dtype == dtype
    assert table.affine.dtype == dtype


def test_function_without_parameters_takes_the_default_dtype():
    assert tabulate(waves, 5.0, 64).knots.dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert tabulate(waves, 5.0, 64).knots.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_table_goes_where_the_parameters_are():
    fn = network().to("meta")
    assert tabulate(fn, 5.0, 64).knots.device.type == "meta"
    table = tabulate(waves, 5.0, 64, num_types=2, affine=torch.ones(3, 2, device="meta"))
    assert table.knots.device.type == table.pair_index.device.type == "meta"
    assert tabulate(waves, 5.0, 64, device="meta").knots.device.type == "meta"


def test_gaussian_sum_can_be_tabulated():
    gaussians = GaussianSum(torch.linspace(0, 5, 6), torch.rand(6) + 0.5, torch.randn(2, 6))
    leaves = [x.requires_grad_() for x in pytree.tree_leaves(gaussians)]
    table = tabulate(gaussians, 5.0, 1500)
    assert table.knots.dtype == torch.float32
    double = pytree.tree_map(lambda x: x.detach().double(), gaussians)
    errors = relative_errors(double, table, 5.0)
    assert errors[0] < 2 * EPS_32  # the table's own error is below 1e-9
    table.knots.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)


def test_function_that_cannot_do_float64_says_what_to_do():
    linear = nn.Linear(1, 2)

    def fn(dist):
        return linear(dist.unsqueeze(-1))

    tabulate(fn, 5.0, 1024)
    with pytest.raises(ValueError, match=r"fn: .*float64.*1024 knots.*pass a Module") as caught:
        tabulate(fn, 5.0, 1025)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_error_inside_a_module_stays_as_it_is():
    fn = nn.Linear(3, 2)  # distances [M] do not fit
    with pytest.raises(RuntimeError, match="shapes"):
        tabulate(fn, 5.0, 2000)


def test_buffers_and_integer_state_survive_the_cast():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("center", torch.tensor([1.0, 2.0]))
            self.register_buffer("power", torch.tensor(2))

        def forward(self, dist):
            assert self.power.dtype == torch.int64
            assert self.center.dtype == dist.dtype
            return torch.exp(-((dist.unsqueeze(-1) - self.center) ** self.power))

    fn = Counted()
    assert tabulate(fn, 5.0, 2000).knots.dtype == torch.float32
    assert fn.center.dtype == torch.float32


# Types and affine maps.


def test_pairs_are_numbered_as_triu_indices():
    for num_types in (1, 2, 5):
        table = tabulate(TypedFunction(num_types), 5.0, 8, num_types=num_types)
        first, second = torch.triu_indices(num_types, num_types)
        pairs = torch.arange(len(first))
        assert torch.equal(table.pair_index[first, second], pairs)
        assert torch.equal(table.pair_index, table.pair_index.T)
        assert table.pair_index.dtype == torch.int64
        assert table.knots.shape == (len(first), 8, 2, 2)


def test_each_pair_of_types_has_the_table_of_its_function():
    fn = TypedFunction(3).double()
    table = tabulate(fn, 5.0, 64, num_types=3)
    dist = 6 * torch.rand(40, dtype=torch.float64)
    for i in range(3):
        for j in range(3):

            def alone(z, i=i, j=j):
                return fn(z, torch.full(z.shape, i), torch.full(z.shape, j))

            exact = tabulate(alone, 5.0, 64, dtype=torch.float64)(dist)
            ids = torch.full(dist.shape, i), torch.full(dist.shape, j)
            assert (table(dist, *ids) - exact).abs().max() < BUDGET


def test_affine_map_changes_the_coordinate_for_each_pair():
    affine = torch.tensor([[1.0, 0.0], [0.5, 1.0], [2.0, -1.0]], dtype=torch.float64)
    table = tabulate(waves, 5.0, 64, num_types=2, affine=affine, dtype=torch.float64)
    assert table.knots.shape == (1, 64, 2, 2)
    plain = tabulate(waves, 5.0, 64, dtype=torch.float64)
    dist = 4 * torch.rand(30, dtype=torch.float64)
    types_i, types_j = torch.randint(2, (30,)), torch.randint(2, (30,))
    m, c = affine[table.pair_index[types_i, types_j]].unbind(-1)
    assert torch.equal(table(dist, types_i, types_j), plain(m * dist + c))
    assert torch.equal(table(dist, types_j, types_i), table(dist, types_i, types_j))


def test_affine_map_needs_no_types():
    affine = torch.tensor([[0.5, 1.0]])
    table = tabulate(waves, 5.0, 64, affine=affine)
    assert table.pair_index is None
    dist = 4 * torch.rand(30)
    assert torch.equal(table(dist), tabulate(waves, 5.0, 64)(0.5 * dist + 1.0))


# Errors of arguments.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_max": -1.0}, r"r_max: expected .*> 0, got -1\.0"),
        ({"r_max": 0.0}, r"r_max: expected .*> 0, got 0\.0"),
        ({"r_max": math.nan}, r"r_max: expected .*got nan"),
        ({"r_max": math.inf}, r"r_m.*: expected .*finite.*inf"),
        ({"r_min": 5.0}, r"r_min: expected .*< r_max=5\.0, got 5\.0"),
        ({"r_min": 6.0}, r"r_min: expected .*< r_max=5\.0, got 6\.0"),
        ({"r_min": math.nan}, r"r_min: expected .*got nan"),
        ({"r_min": -math.inf}, r"r_min.*: expected .*finite.*-inf.*"),
        ({"num_knots": 4}, r"num_knots: expected at least 5, got 4"),
        ({"num_types": 0}, r"num_types: expected at least 1, got 0"),
        ({"affine": torch.ones(2, 2)}, r"affine: expected \[P=1, 2\], got \[2, 2\]"),
        ({"affine": torch.ones(3)}, r"affine: expected \[P=1, 2\], got \[3\]"),
        (
            {"num_types": 2, "affine": torch.ones(4, 2)},
            r"affine: expected \[P=3, 2\], got \[4, 2\]",
        ),
        ({"dtype": torch.bfloat16}, r"dtype: expected .*float32 or .*float64, got torch.bfloat16"),
        ({"dtype": torch.int64}, r"dtype: expected .*float32 or .*float64, got torch.int64"),
    ],
)
def test_wrong_argument_is_named(options, message):
    options = {"r_max": 5.0, "num_knots": 64} | options
    with pytest.raises(ValueError, match=f"^{message}$"):
        tabulate(waves, **options)


@pytest.mark.parametrize(
    ("fn", "got"),
    [
        (lambda d: d, r"\[64\]"),
        (lambda d: d[:-1, None], r"\[63, 1\]"),
        (lambda d: d[:, None, None], r"\[64, 1, 1\]"),
        (lambda d: None, "NoneType"),
        (lambda d: [d], "list"),
    ],
)
def test_wrong_result_of_the_function_is_named(fn, got):
    with pytest.raises(ValueError, match=rf"^fn: expected \[M=64, C\] .*got {got}$"):
        tabulate(fn, 5.0, 64)


def test_types_must_be_given_to_a_table_with_pairs():
    table = tabulate(TypedFunction(2), 5.0, 8, num_types=2)
    dist = torch.rand(3)
    for types in ((), (torch.zeros(3, dtype=torch.int64),)):
        with pytest.raises(ValueError, match="types_i, types_j: expected atom types, got None"):
            table(dist, *types)


# The measured error of a table.


@pytest.mark.parametrize(("dtype", "num_knots"), [(torch.float64, 48), (torch.float32, 400)])
def test_table_error_agrees_with_a_fine_grid(dtype, num_knots):
    table = tabulate(waves, 12.0, num_knots, dtype=dtype)
    measured = table_error(waves, table)
    h = 12.0 / (num_knots - 1)
    end = 12.0 - 16 * h
    z = torch.linspace(0, end, 16 * num_knots + 1, dtype=torch.float64)
    double = dataclasses.replace(table, knots=table.knots.double())
    exact = (waves(z), waves_slope(z), waves_curvature(z))
    pairs = zip(derivatives(double, z), exact, strict=True)
    errors = [float((a - b).abs().max()) for a, b in pairs]
    found = (measured.value, measured.slope, measured.curvature)
    # Eight points an interval miss no more than a tenth of a cubic's largest error.
    for mine, theirs in zip(errors, found, strict=True):
        assert 0.85 * mine < theirs < 1.05 * mine
    largest = (measured.max_value, measured.max_slope, measured.max_curvature)
    for mine, theirs in zip(exact, largest, strict=True):
        assert theirs == pytest.approx(float(mine.abs().max()), rel=0.01)
    ends = waves_slope(torch.tensor([12.0], dtype=torch.float64))
    assert measured.end_slope == pytest.approx(float(ends.abs().max()), rel=1e-9)


def test_table_error_covers_every_pair_of_types():
    fn = TypedFunction(2).double()
    table = tabulate(fn, 5.0, 64, num_types=2)
    good = table_error(fn, table)
    assert good.value < 1e-5
    knots = table.knots.detach().clone()
    knots[1, 30, 0] += 0.5
    bad = table_error(fn, dataclasses.replace(table, knots=knots))
    assert bad.value > 0.4


def test_table_error_takes_a_function_of_one_type():
    fn = TypedFunction(1).double()
    table = tabulate(fn, 5.0, 64, num_types=1)
    assert table_error(fn, table).value < 1e-5


def test_table_error_suggests_more_knots_for_a_bad_table_and_they_suffice():
    def sharp(dist):
        return torch.sin(20 * dist).unsqueeze(-1)

    bad = table_error(sharp, tabulate(sharp, 5.0, 128, dtype=torch.float64), tolerance=1e-4)
    assert bad.num_knots > 128
    better = tabulate(sharp, 5.0, bad.num_knots, dtype=torch.float64)
    assert table_error(sharp, better).slope < 1e-4 * bad.max_slope
    fewer = tabulate(sharp, 5.0, bad.num_knots // 4, dtype=torch.float64)
    assert table_error(sharp, fewer).slope > 1e-4 * bad.max_slope


def test_table_error_suggests_fewer_knots_for_a_needlessly_good_table():
    good = table_error(waves, tabulate(waves, 12.0, 1024), tolerance=1e-2)
    assert good.num_knots < 1024
    assert good.num_knots & (good.num_knots - 1) == 0
    fewer = table_error(waves, tabulate(waves, 12.0, good.num_knots), tolerance=1e-2)
    assert fewer.slope < 1e-2 * fewer.max_slope


# f and its largest value, slope and curvature on [0, 5].
PLAIN = {
    "zero": (lambda d: d.new_zeros(len(d), 2), (0, 0, 0)),
    "zero times d": (lambda d: 0 * d.unsqueeze(-1), (0, 0, 0)),
    "one": (lambda d: torch.ones_like(d).unsqueeze(-1), (1, 0, 0)),
    "linear": (lambda d: d.unsqueeze(-1), (5, 1, 0)),
    "kink": (lambda d: torch.relu(2 - d).unsqueeze(-1), (2, 1, 0)),
}


@pytest.mark.parametrize(("fn", "largest"), PLAIN.values(), ids=PLAIN)
def test_table_error_of_functions_without_higher_derivatives(fn, largest):
    error = table_error(fn, tabulate(fn, 5.0, 1024, dtype=torch.float64))
    found = (error.max_value, error.max_slope, error.max_curvature)
    # The last 16 intervals are left out.
    assert found == pytest.approx(largest, abs=17 * 5 / 1023)
    if fn is PLAIN["kink"][0]:
        return
    # What 16 knots leave of the slope 0 at the end, 0.27^16, is below 1e-9 slopes.
    assert error.value < 1e-9
    assert error.slope < 1e-8
    assert error.num_knots == 64


def test_table_error_names_a_wrong_number_of_channels():
    with pytest.raises(ValueError, match="fn: expected 3 channels, got 2"):
        table_error(waves, tabulate(network(3), 5.0, 64))


def test_table_error_reads_no_gradient_mode_and_leaves_none_behind():
    fn = network()
    with torch.no_grad():
        error = table_error(fn, tabulate(fn, 5.0, 64))
    assert isinstance(error, TableError)
    assert all(p.grad is None for p in fn.parameters())


def test_table_error_prints_its_numbers_and_its_advice():
    error = TableError(1e-6, 2e-5, 3e-3, 1.0, 2.0, 4.0, 0.0, 512)
    text = str(error)
    assert "1.0e-06" in text
    assert "try 512 knots" in text


# Tracing.


def same_table(a, b):
    assert (a.r_min, a.r_max) == (b.r_min, b.r_max)
    assert torch.equal(a.knots, b.knots)
    for x, y in ((a.pair_index, b.pair_index), (a.affine, b.affine)):
        assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.parametrize("num_types", [None, 2])
def test_table_is_a_pytree(num_types):
    affine = torch.ones(3, 2) if num_types else None
    table = tabulate(waves, 5.0, 64, r_min=0.5, num_types=num_types, affine=affine)
    leaves, spec = pytree.tree_flatten(table)
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, RadialTable)
    same_table(table, again)
    same_table(table, pytree.tree_map(lambda x: x, table))


def test_table_is_frozen():
    table = tabulate(waves, 5.0, 64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.r_max = 3.0


def test_table_can_be_an_argument_of_an_exported_function():
    class Call(nn.Module):
        def forward(self, table, dist):
            return table(dist)

    table, dist = tabulate(network(), 5.0, 64), torch.rand(7)
    with torch.no_grad():
        exported = torch.export.export(Call(), (table, dist)).module()
        other = tabulate(network(), 5.0, 64)
        assert torch.equal(exported(other, dist), other(dist))


def test_make_fx_goes_through_tabulate():
    fn = network().double()
    names = [name for name, _ in fn.named_parameters()]

    def loss(*parameters):
        def radial(dist):
            state = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(fn, state, (dist,))

        total = tabulate(radial, 5.0, 64, dtype=torch.float64).knots.square().sum()
        return torch.autograd.grad(total, parameters)

    first = [p.detach().requires_grad_() for p in fn.parameters()]
    second = [torch.randn_like(p).requires_grad_() for p in first]
    traced = make_fx(loss)(*first)
    for a, b in zip(traced(*second), loss(*second), strict=True):
        assert (a - b).abs().max() < BUDGET * b.abs().max()


@pytest.mark.parametrize("num_knots", [64, 1500])
def test_tabulate_compiles_into_one_graph(num_knots):
    fn = network()

    def total(fn):
        return tabulate(fn, 5.0, num_knots).knots.square().sum()

    # aot_eager: what is tested is the trace, and inductor takes a minute on two cores.
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(total(fn), list(fn.parameters()))
    found = torch.autograd.grad(compiled(fn), list(fn.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 16 * EPS_32 * b.abs().max()
