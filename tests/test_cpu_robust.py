"""The C++ kernels where things get rough: NaN, strides, threads, forks, wrong numbers, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import NEEDS_CPU, SCORES, VARIANTS, make_case, relative_error
from passes import ROUNDING, largest_difference, passes
from test_ops import POLICIES, operator_arguments

pytestmark = NEEDS_CPU
ROOT = Path(__file__).parents[1]
MASKED = [v for v in VARIANTS if v[3] == "masked"]
ATOMS = ("q", "k", "v", "positions")


def assert_same_bits(got, expected):
    for name, x in expected.items():
        assert torch.equal(got[name].nan_to_num(7e7), x.nan_to_num(7e7)), name


# What must not be read.


@pytest.mark.parametrize("variant", MASKED, ids=" ".join)
def test_results_do_not_depend_on_what_memory_held_before(variant, nan_in_new_memory):
    case = make_case(*variant, sizes=(9, 2, 70), heads=9, channels=5, dtype=torch.float32)
    before = passes(case, "cpu")
    garbage = {n: torch.full_like(x, torch.nan) for n, x in case.tensors.items()}
    passes(case, "cpu", tensors=garbage)  # leaves NaN in the kernels' own memory
    assert_same_bits(passes(case, "cpu"), before)
    assert all(bool(x.isfinite().all()) for x in before.values())


@pytest.mark.parametrize("variant", MASKED, ids=" ".join)
def test_operators_write_zeros_into_every_padded_row(variant, nan_in_new_memory):
    case = make_case(*variant, sizes=(9, 2, 40), heads=3, channels=5)
    for name, args in operator_arguments(case).items():
        if name == "attention_weights":
            continue
        results = getattr(torch.ops.geot, name).default(*args[:-1], "cpu")
        of_atoms = [x for x in results if x.shape[:2] == case.real.shape]
        assert len(of_atoms) >= 2
        for x in of_atoms:
            assert not bool(x[~case.real].any()), name
            assert bool(x[case.real].isfinite().all()), name


@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_garbage_in_the_holes_of_a_large_molecule_reaches_nothing(policy):
    case = make_case(*policy, "affine", sizes=(150,), heads=2, channels=4)
    case.options["mask"] = case.real = torch.rand(1, 150) < 0.6
    clean = passes(case, "cpu")
    padding = ~case.real
    with torch.no_grad():
        for name in ATOMS:
            case.tensors[name][padding] = torch.nan
        case.options["atom_types"][padding] = -1 << 40
    assert_same_bits(passes(case, "cpu"), clean)
    for name in ("out", "d q", "d k", "d v", "d positions", "dd out", "dd q", "dd positions"):
        assert bool((clean[name][padding] == 0).all()), name


# What must be seen.


def assert_garbage_shows(case, name, garbage, backend):
    """In a real atom of the first molecule it shows there as in the reference, nowhere else."""
    with torch.no_grad():
        case.tensors[name][(0, 2, 1) if name == "positions" else (0, 2, 0, 1)] = garbage
    got, expected = passes(case, backend), passes(case, "reference")
    assert torch.equal(got["out"].isfinite(), expected["out"].isfinite()), name
    for result, x in got.items():
        if result.split()[-1] in ("out", *ATOMS):
            assert bool(x[1:].isfinite().all()), f"{name} reached {result} elsewhere"
        if garbage != garbage and bool(expected[result].isnan().any()):
            assert bool(x.isnan().any()), f"{name} is lost on the way to {result}"


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("variant", MASKED, ids=" ".join)
def test_garbage_of_a_real_atom_shows_where_it_does_in_the_reference(variant, garbage):
    for sizes in ((5, 0, 4), (70, 0, 40)):
        for name in ATOMS:
            case = make_case(
                *variant, sizes=sizes, heads=3, channels=5, dtype=torch.float32, coincident=False
            )
            assert_garbage_shows(case, name, garbage, "cpu")


@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize("score", SCORES)
def test_large_scores_do_not_overflow_a_softmax(score, size):
    case = make_case(score, sizes=(20, 0, 80), heads=3, channels=5, dtype=torch.float32)
    with torch.no_grad():
        case.tensors["knots"] *= size
    got, expected = (case.attention(backend=b) for b in ("cpu", "reference"))
    assert relative_error(got, expected) <= 1e-2 if size < 1e5 else bool(got.isfinite().all())
    grads = torch.autograd.grad(got.sum(), list(case.tensors.values()))
    if size < 1e5:
        assert all(bool(x.isfinite().all()) for x in grads)


# Layouts of memory.


def strided(x):
    """The same numbers with gaps between them and the axes in another order."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), torch.nan, dtype=x.dtype)
    turned = wide.movedim(0, -1).contiguous().movedim(-1, 0)
    turned[..., 1 : 2 * x.shape[-1] : 2] = x.detach()
    return turned[..., 1 : 2 * x.shape[-1] : 2].requires_grad_(x.requires_grad)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v[3] != "full"], ids=" ".join)
def test_strides_and_kinds_of_integers_do_not_matter(variant):
    case = make_case(*variant, sizes=(9, 0, 7), heads=3, channels=5)
    expected = passes(case, "cpu")
    arguments = operator_arguments(case)
    for name in ("attention_bwd", "attention_bwd_bwd"):
        op = getattr(torch.ops.geot, name).default
        args = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments[name][:-1]]
        floats = [isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in args]
        other = [strided(x) if f else x for x, f in zip(args, floats, strict=True)]
        for a, b in zip(op(*args, "cpu"), op(*other, "cpu"), strict=True):
            assert torch.equal(a, b), name
    case.tensors = {n: strided(x) for n, x in case.tensors.items()}
    for name in ("ptr", "atom_types"):
        if name in case.options:
            case.options[name] = case.options[name].int()
    if case.pair_index is not None:
        case.pair_index = case.pair_index.int()
    assert_same_bits(passes(case, "cpu"), expected)


def test_views_of_one_projection_and_expanded_cotangents():
    case = make_case("bias", "softmax", sizes=(9, 3), heads=4, channels=8)
    projected = torch.randn(2, 9, 3, 4, 8, dtype=torch.float64)
    heads_first = torch.randn(2, 4, 9, 8, dtype=torch.float64).transpose(1, 2)
    one = torch.randn(1, 1, 4, 8, dtype=torch.float64).expand(2, 9, 4, 8)
    for views in (projected.unbind(2), (projected[:, :, 1], heads_first, one), (one,) * 3):
        results = []
        for backend in ("cpu", "reference"):
            leaves = [x.detach().requires_grad_() for x in (*views, *case.tensors.values())]
            leaves = [*leaves[:3], *leaves[6:]]
            out = case.attention(*leaves, backend=backend)
            first = torch.autograd.grad(out.sum(), leaves, create_graph=True)
            second = torch.autograd.grad(first[3].sum() + first[0].sum(), leaves)
            results.append(dict(enumerate((out, *first, *second))))
        assert largest_difference(*results)[1] <= ROUNDING


# Threads, instruction sets, processes.


CUT = {  # sizes and heads of batches whose jobs are cut in different ways
    "affine": [((300,), 2), ((9,) * 40, 9), ((300, *(12,) * 12, 280), 1)],
    "gaussians": [((100, 70), 2), ((9,) * 10, 9)],
}


@pytest.mark.parametrize("variant", [v[:3] for v in MASKED if v[2] in CUT], ids=" ".join)
def test_any_number_of_threads_gives_the_same_bits(variant, threads):
    for sizes, heads in CUT[variant[2]]:
        shape = {"sizes": sizes, "heads": heads, "channels": 8}
        case = make_case(*variant, "packed", **shape, dtype=torch.float32)
        threads(1)
        expected = passes(case, "cpu")
        for number in (2, 3, 2):
            threads(number)
            assert_same_bits(passes(case, "cpu"), expected)


@pytest.mark.parametrize("isa", [0, 1, 2])
@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_all_instruction_sets_compute_the_same(variant, isa, instruction_set):
    case = make_case(*variant, sizes=(70, 0, 33), heads=9, channels=12)
    expected = passes(case, "cpu")
    instruction_set(isa)
    for name, x in passes(case, "cpu").items():
        assert float((x - expected[name]).abs().max()) <= 1e-11 * float(expected[name].abs().max())


def test_threads_of_python_call_all_passes_at_once(threads):
    threads(2)
    cases = [
        make_case(*POLICIES[n % 4], "affine", sizes=(n, 3, 300 // n), heads=1 + n % 9, seed=n)
        for n in (3, 70, 5, 40, 9, 130, 12, 33) * 2
    ]
    expected = [passes(case, "cpu") for case in cases]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda case: passes(case, "cpu"), cases))
    for got, x in zip(results, expected, strict=True):
        assert_same_bits(got, x)


def run_python(code, timeout=120):
    """Runs code in a process of its own, at the root of the repository; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_workers_forked_after_a_call_give_the_same_numbers():
    printed = run_python("""
        import torch
        from cases import make_case
        from passes import ROUNDING, largest_difference, passes

        case = make_case("filter", "softmax", "affine", sizes=(40,) * 20)

        class Molecules(torch.utils.data.Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, index):
                return torch.cat([x.flatten() for x in passes(case, "cpu").values()])

        torch.set_num_threads(2)
        expected = Molecules()[0]
        loader = torch.utils.data.DataLoader(
            Molecules(), num_workers=2, multiprocessing_context="fork", timeout=60
        )
        print([bool(torch.equal(x[0], expected)) for x in loader])
    """)
    assert printed.strip() == str([True] * 4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_with_one_thread_computes_after_its_parent_used_several():
    printed = run_python("""
        import os
        import torch
        from cases import make_case
        from passes import passes

        case = make_case("bias", "softmax", "affine", sizes=(300,), heads=9)
        torch.set_num_threads(2)
        expected = passes(case, "cpu")
        child = os.fork()
        if not child:
            torch.set_num_threads(1)
            got = passes(case, "cpu")
            os._exit(not all(torch.equal(got[n], x) for n, x in expected.items()))
        print(os.waitpid(child, 0)[1], torch.equal(passes(case, "cpu")["out"], expected["out"]))
    """)
    assert printed.strip() == "0 True"


# Wrong numbers.


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("atom_types", 1, 3, "atom_types: expected 0 to 2, got 3"),
        ("atom_types", 4, -1, "atom_types: expected 0 to 2, got -1"),
        ("pair_index", (0, 1), 6, "pair_index: expected 0 to 5, got 6"),
        ("pair_index", (2, 2), -1, "pair_index: expected 0 to 5, got -1"),
        ("ptr", 0, 1, "ptr: expected numbers rising from 0 to T=12"),
        ("ptr", 1, 9, "ptr: expected numbers rising from 0 to T=12"),
        ("ptr", 2, 1 << 40, "ptr: expected numbers rising from 0 to T=12"),
        ("ptr", 2, -5, "ptr: expected numbers rising from 0 to T=12"),
        ("ptr", 3, 11, "ptr: expected to end at T=12"),
        ("ptr", 3, 13, "ptr: expected numbers rising from 0 to T=12"),
    ],
)
@pytest.mark.parametrize("radial", ["pair tables", "affine"])
def test_numbers_out_of_range_raise_in_every_pass(radial, name, place, value, message):
    case = make_case("bias", "linear", radial, "packed", sizes=(4, 3, 5))
    arguments = operator_arguments(case)
    wrong = (case.pair_index if name == "pair_index" else case.options[name]).clone()
    good = wrong.clone()
    wrong[place] = value
    for launcher in ("attention", "attention_bwd", "attention_bwd_bwd"):
        args = [
            wrong if isinstance(x, torch.Tensor) and torch.equal(x, good) else x
            for x in (
                x.detach() if isinstance(x, torch.Tensor) else x for x in arguments[launcher][:-1]
            )
        ]
        with pytest.raises((ValueError, RuntimeError), match=message):
            getattr(torch.ops.geot, launcher).default(*args, "cpu")
    assert passes(case, "cpu")["out"].isfinite().all(), "and the next call works"


# Memory, tracers.


def test_a_step_of_2048_atoms_allocates_nothing_of_size_atoms_squared():
    printed = run_python("""
        import resource
        import torch
        import geot_kernels as gk

        def step(atoms):
            q, k, v = (torch.randn(1, atoms, 8, 32, requires_grad=True) for _ in range(3))
            positions = torch.randn(1, atoms, 3, requires_grad=True)
            knots = torch.randn(1, 512, 2, 8, requires_grad=True)
            table = gk.RadialTable(knots, 0.0, 5.0)
            gk.geo_attention(q, k, v, positions, table, backend="cpu").sum().backward()

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        torch.set_num_threads(2)
        step(64)
        before = peak()
        step(2048)
        print(peak() - before)
    """)
    kilobytes = int(printed) / (1024 if sys.platform == "darwin" else 1)
    one_matrix = 2048 * 2048 * 4 / 1024
    features = 2048 * 8 * 32 * 4 / 1024
    assert kilobytes <= 24 * features  # q, k, v, out, their gradients, and the kernels' copies
    assert kilobytes <= 4 * one_matrix  # of 8 heads
