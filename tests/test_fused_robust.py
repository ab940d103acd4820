"""The fused kernels where things get rough: NaN, masks, memory, repetition."""

from __future__ import annotations

import pytest
import torch
from cases import SCORES, VARIANTS, make_case
from fused import assert_passes_equal, detached, exact_case, holed, on
from passes import passes
from test_cpu_robust import ATOMS, assert_garbage_shows, assert_same_bits
from test_ops import POLICIES, operator_arguments
from torch.utils._python_dispatch import TorchDispatchMode

from geot_kernels import backends
from geot_kernels.backends.inputs import Inputs, Tangent

PASSES = ("attention", "attention_bwd", "attention_bwd_bwd")
HOLED = [(*policy, radial) for policy in POLICIES for radial in ("pair tables", "affine")]
HOLED += [("bias", normalizer, "gaussians") for normalizer in ("softmax", "linear")]
# Of the CUDA kernels: whole molecules of one warp, two and four, and sweeps.
FEW = [(9, 3, 6), (3, 0)]
MANY = [(20, 0, 17), (40, 33), (70, 5)]

# What must not be read, and what must be written.


@pytest.mark.parametrize(
    ("backend", "variant", "sizes"),
    [
        *on("triton", [(v, s) for v in HOLED for s in FEW]),
        *on("cuda", [(v, s) for v in HOLED for s in FEW + MANY]),
    ],
    indirect=["backend"],
    ids=str,
)
def test_masks_with_holes_equal_the_reference(backend, variant, sizes):
    assert_passes_equal(holed(variant, sizes), backend)


@pytest.mark.parametrize(
    ("backend", "variant", "sizes"),
    [
        *on("triton", [(v, (6, 4)) for v in HOLED]),
        *on("cuda", [(v, (6, 4)) for v in HOLED]),
        *on("cuda", [(v, s) for v in HOLED[1::2] for s in MANY]),
    ],
    indirect=["backend"],
    ids=str,
)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_garbage_in_padded_rows_of_any_input_reaches_nothing(
    backend, variant, sizes, garbage, nan_in_new_memory
):
    case = holed(variant, sizes)
    padding = ~case.real
    for name, args in operator_arguments(case).items():
        op = getattr(torch.ops.geot, name).default
        args = detached(args[:-1])
        clean = op(*args, backend)
        dirty = []
        for x in args:
            if isinstance(x, torch.Tensor) and x.shape[:2] == padding.shape and x.ndim > 2:
                x = x.clone()
                x[padding] = garbage
            elif x is not None and x is case.options.get("atom_types"):
                x = x.masked_fill(padding, -1 << 40)
            dirty.append(x)
        got = op(*dirty, backend)
        if name == "attention_weights":
            clean, got = (clean,), (got,)
        for a, b in zip(got, clean, strict=True):
            assert torch.equal(a, b), name
            assert bool(b.isfinite().all()), name
            if name != "attention_weights" and b.shape[:2] == padding.shape:
                assert not bool(b[padding].any()), name


@pytest.mark.parametrize("score", SCORES)
def test_garbage_in_the_holes_of_a_large_molecule_reaches_nothing(score, backend):
    size = 70 if score == "bias" or backend == "cuda" else 20
    case = holed((score, "softmax", "affine"), (size, 5), heads=1, channels=2)
    clean = passes(case, backend)
    with torch.no_grad():
        for name in ATOMS:
            case.tensors[name][~case.real] = torch.nan
    assert_same_bits(passes(case, backend), clean)


def test_molecules_of_padding_alone_give_zeros(backend):
    case = exact_case("bias", "softmax", "affine", sizes=(3, 4))
    case.options["mask"] = case.real = torch.zeros(2, 4, dtype=torch.bool)
    assert not any(bool(x.any()) for x in passes(case, backend).values())
    with torch.no_grad():
        assert not bool(case.weights(backend=backend).any())


@pytest.mark.parametrize("variant", HOLED, ids=" ".join)
def test_everything_is_written_and_repeats_bit_for_bit(variant, backend, nan_in_new_memory):
    shape = {"heads": 1, "channels": 2, "dtype": torch.float32}
    for sizes in (
        FEW + MANY if backend == "cuda" else [(66, 0) if variant[0] == "bias" else (5, 0, 2)]
    ):
        case = make_case(*variant, "packed", sizes=sizes, **shape)
        first = passes(case, backend)
        assert all(bool(x.isfinite().all()) for x in first.values())
        assert_same_bits(passes(case, backend), first)


# What must be seen.


@pytest.mark.parametrize(
    ("backend", "variant", "sizes"),
    [
        x
        for v in VARIANTS
        if v[2:] == ("affine", "masked")
        for x in [
            *on("triton", [(v, (5, 4))]),
            *on("cuda", [(v, s) for s in ((5, 4), (20, 9), (70, 3))]),
        ]
    ],
    indirect=["backend"],
    ids=str,
)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_garbage_of_a_real_atom_shows_in_its_molecule_and_nowhere_else(
    backend, variant, sizes, garbage
):
    for name in ATOMS if garbage != garbage else ("q", "positions"):
        case = make_case(*variant, sizes=sizes, dtype=torch.float32, coincident=False)
        assert_garbage_shows(case, name, garbage, backend)


@pytest.mark.parametrize("score", SCORES)
def test_large_scores_do_not_overflow_a_softmax(score, backend):
    case = make_case(score, sizes=(5, 0, 20), channels=5, dtype=torch.float32)
    with torch.no_grad():
        case.tensors["knots"] *= 1e4
    for x in passes(case, backend).values():
        assert bool(x.isfinite().all())
    case = make_case(score, sizes=(150,), heads=1, channels=2, dtype=torch.float32)
    with torch.no_grad():
        case.tensors["knots"] *= 1e4
        assert bool(case.attention(backend=backend).isfinite().all())


# Memory.


class Largest(TorchDispatchMode):
    """Records how large a tensor was, at most, in units of a float64."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else (result,):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel() * x.dtype.itemsize // 8)
        return result


@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_no_pass_makes_a_tensor_of_size_atoms_squared(policy, backend):
    atoms = 150 if policy[0] == "bias" else 70
    case = exact_case(*policy, "affine", "full", sizes=(atoms,), heads=1, channels=1)
    arguments = operator_arguments(case)
    kernels = backends.load(backend)
    with Largest() as largest:
        for name in PASSES:
            args = detached(arguments[name][:-1])
            if name == "attention":
                kernels.attention(Inputs(*args))
                continue
            dots = args[:6] if name == "attention_bwd_bwd" else []
            pulled, inputs = args[len(dots) :][:4], args[len(dots) + 4 :]
            needs = inputs.pop(6)
            before = (Tangent(*dots),) if dots else ()
            getattr(kernels, name)(Inputs(*inputs), *before, *pulled, needs)
    assert 0 < largest.numbers < 35 * atoms  # of an affine map, 16 types' sums of two numbers
    with Largest() as largest, torch.no_grad():
        kernels.attention_weights(Inputs(*detached(arguments["attention"][:-1])))
    assert largest.numbers >= atoms**2, "or this test sees nothing"
