"""T2: every Triton kernel compiled for GPUs that are not there: registers, spills, limits."""

from __future__ import annotations

import pytest
import torch

import geot_kernels as gk
from bench.offline import Launch, Resources, offline_gpu, resources
from geot_kernels.backends import load

KIB = {80: 163, 90: 227, 100: 227}  # shared memory of a program, at most
# Bytes that a thread spills although its molecules have at most 128 atoms; everything else: none.
ALLOWED: dict[tuple[str, str, int], int] = {
    ("backward", "bfloat16", 64): 8,  # two registers, before and after the loop over heads
    ("backward", "float32", 128): 4,
    ("scatter", "bfloat16", 128): 4,
    ("scatter", "float32", 64): 4,
    ("scatter", "float32", 128): 8,
    ("second backward", "float32", 64): 52,
}
NAMES = {"fwd_kernel": "forward", "bwd_kernel": "backward", "bwd_bwd_kernel": "second backward"}
PASSES = ("forward", "forward only", "backward", "scatter", "second backward", "second scatter")


pytestmark = pytest.mark.shown


@pytest.fixture(autouse=True)
def _runs_anywhere(monkeypatch):
    monkeypatch.setattr(load("triton"), "why_not", lambda *_: None)


def problem(atoms, dtype, *, score="bias", radial="table", heads=8, dim=32, layout="masked"):
    """Tensors and options of enough pairs for the table's rows."""
    batch = max((1 << 18) // (atoms * atoms * heads) + 1, 2)
    shape = (batch, atoms, heads, dim)
    q, k, v = (torch.zeros(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    positions = torch.zeros(batch, atoms, 3, requires_grad=True)
    channels = heads if score == "bias" else heads * dim
    options = {"score": score, "normalizer": "softmax" if score == "bias" else "linear"}
    if layout == "masked":
        options["mask"] = torch.ones(batch, atoms, dtype=torch.bool)
    pair_index = affine = None
    if radial in ("pair tables", "affine"):
        pair_index = torch.zeros(5, 5, dtype=torch.int64)
        options["atom_types"] = torch.zeros(batch, atoms, dtype=torch.int64)
    if radial == "affine":
        affine = torch.ones(15, 2, requires_grad=True)
    if radial == "gaussians":
        parameters = [torch.zeros(32), torch.zeros(32), torch.zeros(channels, 32)]
        function = gk.GaussianSum(*(x.requires_grad_() for x in parameters))
    else:
        tables = 15 if radial == "pair tables" else 1
        knots = torch.zeros(tables, 1024, 2, channels, requires_grad=True)
        function, parameters = gk.RadialTable(knots, 0.0, 12.0, pair_index, affine), [knots]
        if affine is not None:
            parameters.append(affine)
    return [q, k, v, positions], parameters, function, options


def compiled(capability, *args, **more) -> dict[str, list[tuple[Launch, Resources]]]:
    """The kernels of each pass with all gradients, the sums for a table apart."""
    tensors, parameters, function, options = problem(*args, **more)

    def attention():
        return gk.geo_attention(*tensors, function, backend="triton", **options)

    with offline_gpu(capability) as launches:
        with torch.no_grad():
            attention()
        in_forward_only = len(launches)
        out = attention()
        leaves = [*tensors, *parameters]
        first = torch.autograd.grad(out, leaves, torch.zeros_like(out), create_graph=True)
        torch.autograd.grad(first[3], leaves, torch.zeros_like(first[3]), allow_unused=True)
    kernels: dict[str, list[tuple[Launch, Resources]]] = {name: [] for name in (*PASSES, "others")}
    for n, launch in enumerate(launches):
        name = NAMES.get(launch.name.removeprefix("_attention_"), "others")
        if name == "forward" and n < in_forward_only:
            name = "forward only"
        if name.endswith("backward") and "d_radial_ptr" not in _absent(launch):
            name = name.replace("backward", "scatter")
        kernels[name].append((launch, resources(launch.compiled)))
    return kernels


def _absent(launch: Launch) -> set[str]:
    """Arguments that are None; a table's sums by one name."""
    names = {name for name, value in launch.constants.items() if value is None}
    return {name.replace("grad_radial", "d_radial") for name in names}


def report(capability, title, kernels):
    """Prints the table that CI shows, and holds shared memory to its limit."""
    for name, launches in kernels.items():
        for launch, r in launches:
            print(
                f"sm_{capability} {title:34} {name:16} {launch.name:28} {launch.num_warps} warps "
                f"{r.registers:3} registers {r.spill_stores:5} B spilled {r.shared:6} B shared"
            )
            assert r.shared <= KIB[capability] * 1024


@pytest.mark.parametrize("atoms", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_no_registers_spill_for_small_molecules_on_hopper(dtype, atoms):
    kernels = compiled(90, atoms, dtype)
    report(90, f"{dtype} N={atoms} H=8 D=32", kernels)
    name = str(dtype).removeprefix("torch.")
    for which in (*PASSES, "others"):
        assert kernels[which], which
        spilled = max(r.spill_stores for _, r in kernels[which])
        assert spilled <= ALLOWED.get((which, name, atoms), 0), which


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    "case",
    [
        (64, torch.float16, {"heads": 32, "dim": 16}),
        (512, torch.bfloat16, {}),
        (512, torch.float32, {}),
        (24, torch.bfloat16, {"dim": 12, "layout": "full"}),
        (100, torch.bfloat16, {"dim": 128, "heads": 4}),
        (24, torch.float32, {"score": "filter", "dim": 16}),
        (200, torch.float16, {"score": "filter", "dim": 24}),
        (40, torch.float32, {"radial": "pair tables"}),
        (40, torch.bfloat16, {"radial": "affine"}),
        (20, torch.float32, {"radial": "gaussians"}),
    ],
    ids=lambda case: f"N={case[0]} {case[1]} {' '.join(map(str, case[2].values()))}",
)
def test_all_kernels_compile_within_the_limits_of_every_gpu(case, capability):
    atoms, dtype, more = case
    kernels = compiled(capability, atoms, dtype, **more)
    report(capability, f"{dtype} N={atoms} {more}", kernels)
    names = {x.name for launches in kernels.values() for x, _ in launches}
    assert names >= {f"_attention_{name}" for name in NAMES}


@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_kernels_of_small_molecules_compile_for_other_gpus(dtype, capability):
    report(capability, f"{dtype} N=64 H=8 D=32", compiled(capability, 64, dtype))


@pytest.fixture
def tf32():
    """Allows products of float32 numbers in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_tf32_compiles_where_it_is_allowed(tf32):
    kernels = compiled(90, 64, torch.float32)
    assert kernels["forward"][0][0].constants["PRECISION"] == "tf32"
    report(90, "float32 as TF32 N=64 H=8 D=32", kernels)


def test_nothing_is_compiled_again_when_the_batch_or_the_molecules_grow():
    seen = set()
    for atoms, batch in ((33, 64), (40, 65), (63, 71), (64, 200)):
        q = torch.zeros(batch, atoms, 8, 32)
        table = gk.RadialTable(torch.zeros(1, 64, 2, 8), 0.0, 12.0)
        with offline_gpu(90) as launches, torch.no_grad():
            gk.geo_attention(q, q, q, torch.zeros(batch, atoms, 3), table, backend="triton")
        seen |= {x.compiled.hash for x in launches if x.name == "_attention_fwd_kernel"}
    assert len(seen) == 1
