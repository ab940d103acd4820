"""Why the Triton kernels cannot run: reasons, given without a GPU and without the interpreter."""

from __future__ import annotations

import importlib

import pytest
import torch
from cases import make_case
from test_cpu_robust import run_python
from test_ops import operator_inputs

GPU = torch.device("cuda")


@pytest.fixture
def backend(monkeypatch):
    """The backend on a machine that has a GPU, and nothing is interpreted."""
    triton = pytest.importorskip("triton")
    backend = importlib.import_module("geot_kernels.backends.triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    real = backend.why_not_gpu
    monkeypatch.setattr(backend, "why_not_gpu", lambda x: None if x.type == "cuda" else real(x))
    return backend


def inputs(**options):
    return operator_inputs(make_case(**{"dtype": torch.float32} | options))


def test_a_gpu_takes_all_16_and_32_bit_dtypes_and_up_to_128_channels(backend):
    assert backend.why_not(GPU) is None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for channels in (1, 3, 128):
            assert backend.why_not(GPU, inputs(dtype=dtype, channels=channels)) is None


def test_float64_needs_the_interpreter(backend, monkeypatch):
    case = inputs(dtype=torch.float64)
    assert "float32, and q is float64" in backend.why_not(GPU, case)
    monkeypatch.setattr(importlib.import_module("triton").knobs.runtime, "interpret", True)
    assert backend.why_not(torch.device("cpu"), case) is None


def test_more_than_128_channels_are_too_many(backend):
    assert "at most 128 channels a head, not 129" in backend.why_not(GPU, inputs(channels=129))


def test_more_than_256_types_of_an_affine_map_are_too_many(backend):
    affine = inputs(radial="affine")
    for types in (256, 257):
        many = affine._replace(pair_index=torch.zeros(types, types, dtype=torch.int64))
        reason = backend.why_not(GPU, many)
        assert reason is None if types == 256 else "at most 256 types, not 257" in reason
        assert backend.why_not(GPU, many._replace(affine=None)) is None


def test_a_radial_function_must_fit_offsets_of_32_bits(backend):
    few = inputs()
    for numbers in (2**31 - 4, 2**31):
        knots = torch.zeros(1, 1, 1, 1).expand(1, numbers // 4, 2, 2)
        assert (backend.why_not(GPU, few._replace(radial=knots)) is None) == (numbers < 2**31)


def test_other_devices_are_refused(backend):
    assert "not on 'cpu' (TRITON_INTERPRET=1" in backend.why_not(torch.device("cpu"))
    assert "not on 'mps'" in backend.why_not(torch.device("mps"))


def test_old_gpus_and_those_of_others_are_refused(monkeypatch):
    pytest.importorskip("triton")
    backend = importlib.import_module("geot_kernels.backends.triton")
    reason = backend.why_not_gpu.__wrapped__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason(GPU) == "PyTorch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, fits in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert (reason(GPU) is None) == fits
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "AMD" in reason(GPU)


CALL = """
    import os
    os.environ.pop("TRITON_INTERPRET", None)
    {before}
    import torch
    import geot_kernels as gk

    print(gk.available_backends("cpu")["triton"])
    q = torch.randn(1, 2, 2, 4)
    table = gk.RadialTable(torch.randn(1, 9, 2, 2), 0.0, 5.0)
    print(gk.geo_attention(q, q, q, torch.randn(1, 2, 3), table).shape)
    try:
        gk.geo_attention(q, q, q, torch.randn(1, 2, 3), table, backend="triton")
    except ValueError as error:
        print(error)
"""


def test_without_the_interpreter_a_cpu_is_refused_and_said_why():
    pytest.importorskip("triton")
    available, shape, error = run_python(CALL.format(before="")).strip().splitlines()
    assert available in error
    assert "TRITON_INTERPRET=1" in error
    assert "got 'triton'" in error
    assert "2, 2, 4" in shape


def test_a_missing_triton_is_a_reason_and_nothing_else_breaks():
    before = "import sys; sys.modules['triton'] = None"
    available, shape, error = run_python(CALL.format(before=before)).strip().splitlines()
    assert "cannot be imported" in available and "triton" in available
    assert available in error
    assert "2, 2, 4" in shape
