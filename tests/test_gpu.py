"""On a GPU: what the other tests say on the CPU, with nothing skipped (`make test-gpu`)."""

from __future__ import annotations

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_module_trains_under_autocast(dtype):
    torch.manual_seed(0)
    layer = gk.FusedGeoAttention(64, 4, backend="eager", device=DEVICE)
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
