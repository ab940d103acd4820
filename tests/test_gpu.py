"""On a GPU: what the other tests say on the CPU, with nothing skipped (`make test-gpu`)."""

from __future__ import annotations

import passes as orders
import pytest
import torch
from cases import VARIANTS, make_case, relative_error

import geot_kernels as gk

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
ROUNDING = 1e-11  # float64 sums in another order


def moved(case, device):
    """The same case with its tensors on another device."""
    case.tensors = {n: x.detach().to(device).requires_grad_() for n, x in case.tensors.items()}
    case.options = {
        n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in case.options.items()
    }
    if case.pair_index is not None:
        case.pair_index = case.pair_index.to(device)
    return case


def passes(case, backend):
    """Output, weights, gradients of both orders."""
    tensors = list(case.tensors.values())
    out = case.attention(backend=backend)
    cotangent = torch.linspace(-1, 1, out.numel()).to(out).view(out.shape)
    first = torch.autograd.grad(out, tensors, cotangent, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), tensors)
    return [x.detach().cpu() for x in (out, case.weights(backend=backend), *first, *second)]


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_all_passes_equal_the_reference_on_the_cpu(variant, backend):
    expected = passes(make_case(*variant, attention_scale=True), "reference")
    got = passes(moved(make_case(*variant, attention_scale=True), DEVICE), backend)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) <= ROUNDING


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v[3] == "masked"], ids=" ".join)
def test_results_repeat_bit_for_bit_with_deterministic_algorithms(variant):
    torch.use_deterministic_algorithms(True)
    try:
        runs = [passes(moved(make_case(*variant), DEVICE), "eager") for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


# The fused kernels.

KERNELS = ("triton", "cuda")
FUSED = [v for v in VARIANTS if v[3] != "full"]
SIZES = [(7, 0, 16), (31, 5), (64, 33), (128, 9), (300, 150)]  # every kind of tile and sweep


def draws(variant, dtype, sizes, count=4, **more):
    """Random cases on the device, features in `dtype`, the rest in float32."""
    for seed in range(count):
        case = make_case(*variant, sizes=sizes, heads=3, seed=seed, **({"channels": 16} | more))
        case.tensors = {
            n: x.detach().to(dtype if n in "qkv" else torch.float32)
            for n, x in case.tensors.items()
        }
        yield moved(case, DEVICE)


QUANTIZED = {"d knots": 1e-10, "dd knots": 2e-9, "d affine": 1e-10, "dd affine": 2e-8}


@pytest.mark.parametrize("variant", FUSED, ids=" ".join)
def test_cuda_equals_the_reference_in_float64(variant):
    case = moved(make_case(*variant, sizes=(18, 0, 33), attention_scale=True), DEVICE)
    got, expected = (orders.passes(case, b) for b in ("cuda", "reference"))
    for name in expected:
        _, error = orders.largest_difference({name: got[name]}, {name: expected[name]})
        assert error <= QUANTIZED.get(name, ROUNDING), (name, error)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", FUSED, ids=" ".join)
def test_passes_stay_within_twice_the_error_of_the_reference(variant, dtype, backend):
    cases = list(draws(variant, dtype, (17, 0, 9)))
    assert not orders.over_budget(orders.typical_errors(cases, backend))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("policy", [("bias", "softmax"), ("filter", "linear")], ids=" ".join)
def test_passes_stay_within_the_budget_with_every_tile(policy, sizes, backend):
    cases = list(draws((*policy, "table", "masked"), torch.float32, sizes, 2))
    assert not orders.over_budget(orders.typical_errors(cases, backend))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("channels", [2, 8, 12, 24, 32, 48, 64, 80, 128])
def test_passes_stay_within_the_budget_for_any_head_dimension(channels, backend):
    for score in ("bias", "filter"):
        variant = (score, "softmax", "table", "packed")
        cases = list(draws(variant, torch.float32, (12, 20), 2, channels=channels))
        assert not orders.over_budget(orders.typical_errors(cases, backend))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("variant", [v for v in FUSED if v[3] == "masked"], ids=" ".join)
def test_weights_are_those_of_the_reference(variant, backend):
    (case,) = draws(variant, torch.float32, (17, 0, 9), 1)
    with torch.no_grad():
        got, expected = (case.weights(backend=b) for b in (backend, "reference"))
    assert relative_error(got, expected) <= 1e-5


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("variant", [v for v in FUSED if v[3] == "masked"], ids=" ".join)
def test_results_repeat_bit_for_bit(variant, backend):
    (case,) = draws(variant, torch.float32, (64, 33), 1)
    runs = [orders.passes(case, backend) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(x, runs[0][n]) for n, x in other.items())


@pytest.mark.parametrize("backend", KERNELS)
def test_forward_passes_can_be_captured_in_a_graph(backend):
    (case,) = draws(("bias", "softmax", "table", "masked"), torch.bfloat16, (40, 64), 1)
    with torch.no_grad():
        expected = case.attention(backend=backend)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = case.attention(backend=backend)
        out.fill_(torch.nan)
        graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_they_compile_into_one_graph(backend):
    (case,) = draws(("bias", "softmax", "table", "masked"), torch.float32, (20, 9), 1)
    expected = case.attention(backend=backend)
    got = torch.compile(lambda: case.attention(backend=backend), fullgraph=True)()
    assert relative_error(got, expected) <= 1e-6


@pytest.mark.parametrize("backend", KERNELS)
def test_memory_grows_as_the_atoms_do(backend):
    peaks = []
    for atoms in (2048, 4096):
        q = torch.randn(1, atoms, 8, 32, device=DEVICE, requires_grad=True)
        positions = 10 * torch.randn(1, atoms, 3, device=DEVICE)
        positions.requires_grad_()
        table = gk.RadialTable(torch.randn(1, 256, 2, 8, device=DEVICE), 0.0, 12.0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = gk.geo_attention(q, q, q, positions, table, backend=backend)
        torch.autograd.grad(out.square().sum(), (q, positions))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 2.2 * peaks[0]


@pytest.mark.parametrize("backend", ["eager", *KERNELS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_module_trains_under_autocast(dtype, backend):
    torch.manual_seed(0)
    layer = gk.FusedGeoAttention(64, 4, backend=backend, device=DEVICE)
    x, positions = torch.randn(3, 9, 64, device=DEVICE), torch.randn(3, 9, 3, device=DEVICE)
    exact, _ = layer(x, positions)
    with torch.autocast(DEVICE, dtype=dtype):
        y, _ = layer(x, positions)
    y.float().square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())
    assert relative_error(y, exact) <= 8 * torch.finfo(dtype).eps


def test_tensors_on_different_devices_are_refused():
    q = torch.randn(1, 2, 1, 4, device=DEVICE)
    table = gk.RadialTable(torch.randn(1, 8, 2, 1, device=DEVICE), 0.0, 5.0)
    with pytest.raises(ValueError, match="positions: expected on cuda"):
        gk.geo_attention(q, q, q, torch.randn(1, 2, 3), table)


def test_the_report_names_the_device():
    from geot_kernels.__main__ import report

    assert torch.cuda.get_device_name(0) in report()
