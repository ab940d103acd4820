"""The CUDA kernels, emulated: all their ways through a problem, and memory of any alignment."""

from __future__ import annotations

import functools
import hashlib

import pytest
import torch
from cases import VARIANTS, make_case
from fused import assert_passes_equal, detached, exact_case
from passes import over_budget, passes, typical_errors
from test_cpu_robust import run_python
from test_ops import POLICIES, operator_arguments

from geot_kernels.backends import cuda

pytestmark = pytest.mark.usefixtures("emulated")
# Atoms of two warps and four; one tile of columns and several; whole molecules and sweeps.
ATOMS = [18, 33, 65]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("atoms", ATOMS)
@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_all_passes_equal_the_reference_with_any_number_of_warps(variant, atoms):
    sizes = (atoms, 3, 0, atoms - 1)
    assert_passes_equal(exact_case(*variant, sizes=sizes, heads=2, channels=2), "cuda")


@pytest.mark.parametrize("score", ["bias", "filter"])
def test_small_molecules_are_done_whole_and_large_ones_are_swept(score, monkeypatch):
    seen = {}
    tensors = cuda._Results.tensors

    def noted(results, parts, quantum):
        seen.setdefault(atoms, []).append(parts)
        return tensors(results, parts, quantum)

    monkeypatch.setattr(cuda._Results, "tensors", noted)
    for atoms in (1, 16, 17, 32, 33, 64, 65, 130):
        case = make_case(score, sizes=(atoms,), heads=1, channels=2, dtype=torch.float32)
        passes(case, "cuda")
    whole = 64 if score == "bias" else 32
    for atoms, (first, second) in seen.items():
        assert first == (1 if atoms <= whole else 2), atoms
        assert second == (1 if atoms <= 32 else 2), atoms


# Many molecules to a block, and many blocks.


@pytest.mark.parametrize("radial", ["pair tables", "gaussians"])
@pytest.mark.parametrize("normalizer", ["softmax", "linear"])
def test_a_block_goes_through_many_molecules(normalizer, radial):
    for layout in ("packed", "masked"):
        case = exact_case("bias", normalizer, radial, layout, sizes=(3, 0, 18, 1, 35) * 9)
        assert_passes_equal(case, "cuda")


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_block_goes_through_many_molecules_in_fewer_bits(dtype):
    cases = []
    for seed in range(3):
        case = make_case(
            "bias", "softmax", "affine", "packed", sizes=(3, 0, 18, 1, 35) * 8, seed=seed
        )
        case.tensors = {
            n: x.detach().to(dtype if n in "qkv" else torch.float32).requires_grad_()
            for n, x in case.tensors.items()
        }
        cases.append(case)
    assert not over_budget(typical_errors(cases, "cuda"))


# Radial functions of all sizes.


@pytest.mark.parametrize("centers", [1, 2, 7, 300, 1500])
@pytest.mark.parametrize("sizes", [(5, 3), (20,), (40, 2), (70,)], ids=str)
def test_any_number_of_gaussians(centers, sizes):
    if centers > 300 and sizes != (5, 3):
        sizes = (sizes[0] // 4,)
    case = exact_case("bias", "softmax", "gaussians", sizes=sizes)
    g = torch.Generator().manual_seed(0)
    for name, shape in (("centers", ()), ("gammas", ()), ("weights", (2,))):
        x = torch.rand(*shape, centers, generator=g, dtype=torch.float64)
        x = x - 0.5 if name == "weights" else x + 0.5
        case.tensors[name] = x.requires_grad_()
    assert_passes_equal(case, "cuda")


@pytest.mark.parametrize("score", ["bias", "filter"])
@pytest.mark.parametrize("types", [9, 25])
def test_tables_of_many_pairs_of_types(types, score):
    pairs = types * (types + 1) // 2
    case = exact_case(score, "softmax", "pair tables", sizes=(12, 40))
    i, j = torch.triu_indices(types, types)
    case.pair_index = torch.zeros(types, types, dtype=torch.int64)
    case.pair_index[i, j] = case.pair_index[j, i] = torch.arange(pairs)
    case.options["atom_types"] = torch.randint(types, (2, 40))
    channels = case.tensors["knots"].shape[-1]
    case.tensors["knots"] = torch.randn(pairs, 33, 2, channels, dtype=torch.float64)
    case.tensors["knots"].requires_grad_()
    assert_passes_equal(case, "cuda")


# Sums of integers: exact to the unit that a bound gives, and never beyond 63 bits.


def smooth(channels, knots):
    """A table of sines in [0.25, 4.25], whose knots are near each other, as networks' are."""
    a, b = torch.randn(2, channels, generator=torch.Generator().manual_seed(0)).double()
    z = torch.linspace(0.25, 4.25, knots).double()[:, None]
    return torch.stack((a * (b * z).sin(), a * b * (b * z).cos() * 4 / (knots - 1)), 1)[None]


@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_fine_tables_cost_sums_of_integers_no_digits(policy):
    case = exact_case(*policy, "affine", "packed", sizes=(18,) * 16, channels=8)
    case.tensors["knots"] = smooth(case.tensors["knots"].shape[-1], 1024).requires_grad_()
    assert_passes_equal(case, "cuda")


@pytest.mark.parametrize("which", range(8))
@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_sums_of_integers_hold_numbers_of_any_size(policy, which):
    case = exact_case(*policy, "affine", "packed", sizes=(5, 3), coincident=False)
    if policy[1] == "softmax":  # scores stay small, so that weights do not become 0 and 1
        for name in ("q", "k", "knots"):
            case.tensors[name] = (case.tensors[name].detach() * 1e-2).requires_grad_()
    for name, args in operator_arguments(case).items():
        if name not in ("attention_bwd", "attention_bwd_bwd"):
            continue
        args = detached(args[:-1])
        # Cotangents of the first order (dO, dr); the tangent, then these, of the second.
        if which >= (2 if name == "attention_bwd" else 8) or args[which] is None:
            continue
        args[which] = args[which] * 1e15
        op = getattr(torch.ops.geot, name).default
        got, expected = op(*args, "cuda"), op(*args, "eager")
        for at in (-2, -1):
            error = (got[at] - expected[at]).abs().max() / expected[at].abs().max()
            assert error <= 1e-7, (name, at)


# Memory of any alignment.


def moved(x, numbers, gap):
    """The same tensor `numbers` behind an aligned address, with gaps between atoms."""
    strides = [x[0].numel() + gap, *torch.empty(x.shape[1:]).stride()]
    memory = torch.full((numbers + x.shape[0] * strides[0],), torch.nan).to(x.dtype)
    return memory.as_strided(x.shape, strides, numbers).copy_(x)


@pytest.mark.parametrize(("numbers", "gap"), [(1, 0), (4, 0), (0, 2), (3, 5)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_addresses_and_strides_of_any_alignment(policy, dtype, numbers, gap):
    case = make_case(*policy, "affine", "packed", sizes=(5, 18), channels=8, dtype=torch.float32)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    case.tensors = {
        n: x.detach().to(dtype if n in "qkv" else compute).requires_grad_()
        for n, x in case.tensors.items()
    }
    for name, args in operator_arguments(case).items():
        if name == "attention_weights":
            continue
        op = getattr(torch.ops.geot, name).default
        args = detached(args[:-1])
        rows = [isinstance(x, torch.Tensor) and x.is_floating_point() for x in args]
        other = [
            x if not r else moved(x, numbers, gap if x.ndim == 3 else 0)
            for x, r in zip(args, rows, strict=True)
        ]
        for a, b in zip(op(*args, "cuda"), op(*other, "cuda"), strict=True):
            assert torch.equal(a, b), name


# Schedules: threads of a block, and blocks, one after the other in any order.

SCHEDULED = """
    import sys
    sys.path[:0] = ["python"]
    import host_cuda
    from test_cuda_kernels import fingerprint
    with host_cuda.emulated():
        print(fingerprint())
"""


@functools.cache
def fingerprint():
    """A hash of all bits of some problems' passes."""
    torch.set_num_threads(1)
    known = hashlib.sha256()
    for variant in (
        ("bias", "softmax", "pair tables"),
        ("bias", "linear", "gaussians"),
        ("filter", "softmax", "affine"),
    ):
        for sizes in ((5, 3) * 40, (40,), (70,)):
            for dtype in (torch.float64, torch.bfloat16):
                case = make_case(*variant, "packed", sizes=sizes, channels=5)
                case.tensors = {
                    n: x.detach().to(dtype if n in "qkv" or dtype.itemsize > 2 else torch.float32)
                    for n, x in case.tensors.items()
                }
                for x in passes(case, "cuda").values():
                    known.update(x.double().numpy().tobytes())
    return known.hexdigest()


@pytest.mark.parametrize("schedule", ["reverse", "1"])
def test_results_are_the_same_bit_for_bit_whichever_thread_comes_first(schedule, monkeypatch):
    expected = fingerprint()
    monkeypatch.setenv("GEOT_SCHEDULE", schedule)
    assert run_python(SCHEDULED).strip() == expected
