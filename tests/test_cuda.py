"""The CUDA backend: why it cannot run, what it passes to its operators, and their contracts."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from cases import VARIANTS, make_case
from fused import detached, exact_case
from host_cuda import NAMESPACE
from passes import passes
from test_cpu_robust import assert_same_bits
from test_ops import BY_DIFFERENCES, POLICIES, operator_arguments, operator_inputs

import geot_kernels as gk
from geot_kernels import backends
from geot_kernels.backends import cuda, native

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def a_gpu(monkeypatch):
    """A machine with a GPU, and a compiled library."""
    monkeypatch.setattr(cuda, "why_not_gpu", lambda device: None)
    monkeypatch.setattr(cuda, "load_library", lambda kind: None)
    monkeypatch.setattr(cuda, "_shared_memory", lambda device: 227)


def inputs(**options):
    return operator_inputs(make_case(**{"dtype": torch.float32} | options))


# Why not.


def test_other_devices_are_refused():
    assert cuda.why_not(CPU) == "its kernels run on 'cuda', not on 'cpu'"
    assert cuda.why_not(torch.device("mps")) == "its kernels run on 'cuda', not on 'mps'"
    assert backends.available_backends("cpu")["cuda"] == cuda.why_not(CPU)
    with pytest.raises(ValueError, match="got 'cuda': its kernels run on 'cuda', not on 'cpu'"):
        make_case(sizes=(2,)).attention(backend="cuda")


def test_a_library_that_is_not_compiled_is_a_reason(a_gpu, monkeypatch):
    monkeypatch.setattr(cuda, "load_library", native.load_library.__wrapped__)
    monkeypatch.setattr(native, "find_library", lambda kind: f"the {kind} kernels are missing")
    assert cuda.why_not(GPU) == "the cuda kernels are missing"
    assert cuda.why_not(GPU, inputs()) == "the cuda kernels are missing"


def test_a_library_that_does_not_load_is_a_reason(a_gpu, monkeypatch, tmp_path):
    library = tmp_path / "libgeot_cuda.so"
    library.write_bytes(b"not a library")
    monkeypatch.setattr(cuda, "load_library", native.load_library.__wrapped__)
    monkeypatch.setattr(native, "find_library", lambda kind: library)
    assert "libgeot_cuda.so cannot be loaded" in cuda.why_not(GPU)


def test_a_gpu_takes_all_dtypes_and_up_to_128_channels(a_gpu):
    assert cuda.why_not(GPU) is None
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for channels in (1, 3, 128):
            assert cuda.why_not(GPU, inputs(dtype=dtype, channels=channels)) is None
    assert "at most 128 channels a head, not 129" in cuda.why_not(GPU, inputs(channels=129))


@pytest.mark.parametrize(
    ("kib", "of_float64", "of_others"), [(228, 128, 128), (163, 64, 128), (99, 32, 64)]
)
def test_less_shared_memory_is_for_fewer_channels(a_gpu, monkeypatch, kib, of_float64, of_others):
    monkeypatch.setattr(cuda, "_shared_memory", lambda device: kib)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        most = of_float64 if dtype == torch.float64 else of_others
        assert cuda.why_not(GPU, inputs(dtype=dtype, channels=most)) is None
        reason = cuda.why_not(GPU, inputs(dtype=dtype, channels=most + 1))
        assert f"at most {most} channels a head" in reason
        assert (f"of {dtype} with {kib} KiB of shared memory" in reason) == (most < 128)


def test_the_kernels_say_how_much_shared_memory_there_is(emulated):
    assert cuda._shared_memory(CPU) == 227


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("score", ["bias", "filter"])
def test_what_is_no_number_in_a_table_shows_in_its_gradient(score, number, emulated):
    case = exact_case(score, "softmax", "table", sizes=(9, 5))
    with torch.no_grad():
        case.tensors["knots"][:, :, 0] = number
    results = passes(case, "cuda")
    for name in ("d knots", "dd knots"):
        assert bool(results[name].isnan().all()), name


def test_what_is_counted_with_32_bits_must_fit_them(a_gpu):
    few = inputs()
    for numbers in (2**31 - 4, 2**31):
        knots = torch.zeros(1, 1, 1, 1).expand(1, numbers // 4, 2, 2)
        reason = cuda.why_not(GPU, few._replace(radial=knots))
        assert reason is None if numbers < 2**31 else "fewer than 2^31 numbers" in reason
    for atoms in (2**31 - 1, 2**31):
        many = few._replace(q=torch.zeros(1, 1, 1, 1).expand(1, atoms, 2, 3))
        reason = cuda.why_not(GPU, many)
        assert reason is None if atoms < 2**31 else "fewer than 2^31 rows" in reason
    assert "2^31 rows" in cuda.why_not(GPU, inputs(layout="packed")._replace(max_atoms=2**31))


def test_the_cuda_kernels_are_asked_after_those_of_triton(monkeypatch):
    reasons = {"triton": None, "cuda": None}
    monkeypatch.setattr(backends, "why_not", lambda name, *_: reasons[name])
    some = SimpleNamespace(q=SimpleNamespace(device=GPU))
    monkeypatch.setattr(backends, "load", lambda name: name)
    assert backends.choose("", some) == "triton"
    assert backends.choose("cuda", some) == "cuda"
    reasons["triton"] = "no triton here"
    assert backends.choose("", some) == "cuda"


def test_emulated_kernels_are_only_there_while_they_are_asked_for(emulated):
    assert backends.available_backends("cpu")["cuda"] is None
    assert backends.choose("cuda", inputs()) is cuda
    assert backends.choose("", inputs(sizes=(2,))) is not cuda
    with pytest.raises(ValueError, match="at most 128 channels"):
        make_case(channels=129).attention(backend="cuda")


# Errors.


def test_an_error_of_a_launch_is_an_exception(emulated):
    q = torch.randn(1, 2, 1, 4)
    gaussians = gk.GaussianSum(*torch.randn(2, 60000), torch.randn(1, 60000))
    with pytest.raises(RuntimeError, match="a block needs more shared memory than this device"):
        gk.geo_attention(q, q, q, torch.randn(1, 2, 3), gaussians, backend="cuda")


# What the operators are given.


def to(dtype, args):
    floats = (torch.float16, torch.bfloat16, torch.float32)
    return [x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype in floats else x for x in args]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("variant", "names"),
    [
        (("bias", "softmax", "gaussians"), ["attention", "attention_bwd", "attention_bwd_bwd"]),
        (("filter", "linear", "affine"), ["attention", "attention_bwd", "attention_bwd_bwd"]),
        (("bias", "softmax", "affine"), ["attention_bwd_bwd"]),
        (("bias", "linear", "table"), ["attention_bwd_bwd"]),
    ],
    ids=str,
)
def test_where_there_are_no_tensor_cores_16_bits_are_computed_in_32(
    variant, names, dtype, emulated
):
    case = make_case(*variant, sizes=(7, 20), channels=8, dtype=torch.float32)
    with torch.no_grad():
        for name in "qkv":
            case.tensors[name] = case.tensors[name].to(dtype)
    arguments = operator_arguments(case)
    for name in names:
        op = getattr(torch.ops.geot, name).default
        args = detached(arguments[name][:-1])
        got, exact = op(*args, "cuda"), op(*to(torch.float32, args), "cuda")
        assert any(x.dtype == dtype for x in got)
        for a, b in zip(got, exact, strict=True):
            assert torch.equal(a, b.to(a.dtype)), name


@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_an_absent_cotangent_is_one_of_zeros(policy, emulated):
    arguments = operator_arguments(exact_case(*policy, "affine", sizes=(5, 20)))
    for name, first in (("attention_bwd", 0), ("attention_bwd_bwd", 6)):
        op = getattr(torch.ops.geot, name).default
        args = detached(arguments[name][:-1])
        for at in (first, first + 1):
            if args[at] is None:
                continue
            zeros = [torch.zeros_like(x) if i == at else x for i, x in enumerate(args)]
            absent = [None if i == at else x for i, x in enumerate(args)]
            for a, b in zip(op(*absent, "cuda"), op(*zeros, "cuda"), strict=True):
                assert torch.equal(a, b), (name, at)


def test_inputs_are_left_as_they_were(emulated):
    arguments = operator_arguments(exact_case("filter", "linear", "affine"))
    for name, args in arguments.items():
        args = detached(args[:-1])
        before = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        getattr(torch.ops.geot, name).default(*args, "cuda")
        for a, b in zip(args, before, strict=True):
            assert not isinstance(a, torch.Tensor) or torch.equal(a, b), name


# Contracts.


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_opcheck_finds_nothing(variant, emulated):
    for name, args in operator_arguments(make_case(*variant)).items():
        op = getattr(torch.ops.geot, name).default
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        torch.library.opcheck(op, (*args[:-1], "cuda"), test_utils=checks)


@pytest.mark.parametrize("variant", BY_DIFFERENCES, ids=" ".join)
def test_derivatives_are_those_of_differences(variant, emulated):
    case = make_case(*variant, attention_scale=True, coincident=False)
    function = functools.partial(case.attention, backend="cuda")
    tensors = tuple(case.tensors.values())
    assert torch.autograd.gradcheck(function, tensors, atol=1e-7, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, atol=1e-6, fast_mode=True)


def test_results_are_contiguous_whatever_the_strides_of_inputs(emulated):
    case = make_case("filter", "linear", "affine", layout="full")
    case.tensors = {
        n: x.detach().movedim(0, 1).contiguous().movedim(0, 1).requires_grad_()
        for n, x in case.tensors.items()
    }
    for name, args in operator_arguments(case).items():
        op = getattr(torch.ops.geot, name).default
        torch.library.opcheck(op, (*args[:-1], "cuda"), test_utils=["test_faketensor"])


def test_the_operators_of_the_library_are_those_that_the_backend_calls(emulated):
    operators = getattr(torch.ops, NAMESPACE)
    for name in (
        "attention",
        "attention_bwd",
        "attention_bwd_bwd",
        "bounds",
        "chunks",
        "shared_memory",
    ):
        assert getattr(operators, name).default is not None


def test_results_do_not_depend_on_who_asks_for_gradients(emulated):
    case = exact_case("bias", "softmax", "affine", sizes=(9, 40))
    with torch.no_grad():
        without = case.attention(backend="cuda")
    assert_same_bits({"out": without}, {"out": passes(case, "cuda")["out"]})
