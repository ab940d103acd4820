"""T3: what nvcc says of every CUDA kernel: registers, spills, on each architecture."""

from __future__ import annotations

import re

import pytest
from test_build import ROOT

from bench.resources import ptxas_report
from geot_kernels import build

LOGS = ROOT / "build" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# Bytes that a thread stores because registers ran out: only in float64, whose numbers take two.
ALLOWED = {
    "SecondBackward bias double 0, by rows": 200,
    "SecondBackward bias double 0, by keys": 52,
    "SecondBackward filter double, by rows": 344,
    "SecondBackward filter double, by keys": 168,
}


def name_of(kernel: str) -> str:
    """`Backward bias bfloat16 32, by keys` and the like; 0: any width, sums in shared memory."""
    found = re.search(
        r"(\w+)<geot::cuda::(Bias|Filter)<([\w:]+)(?:, (\d+), \d+)?>(?:, (\w+))?", kernel
    )
    if found is None:
        return re.sub(r"geot::cuda::|void kernel<|__nv_|__| >.*", "", kernel) + ">"
    name, score, dtype, width, by_keys = found.groups()
    dtype = dtype.replace("geot::cuda::", "").replace("__nv_", "").replace("__half", "half")
    sweep = {"true": ", by keys", "false": ", by rows", None: ""}[by_keys]
    return f"{name} {score.lower()} {dtype} {width or ''}".strip() + sweep


@pytest.fixture(scope="module")
def kernels():
    if reason := build.why_not("cuda"):
        pytest.skip(reason)
    logs = sorted(LOGS.glob("*.o.log"))
    assert logs, f"{LOGS} has no logs: `make kernels` compiles"
    return ptxas_report("".join(path.read_text() for path in logs))


@pytest.mark.shown
def test_every_kernel_is_compiled_for_every_architecture_and_none_spills(kernels):
    """Prints the table that CI shows."""
    found = {}
    for row in kernels:
        if row.registers:
            name = name_of(row.kernel)
            print(
                f"{row.arch:7} {name:44} {row.registers:3} registers {row.stack:4} B stack "
                f"{row.spill_stores:5} B spilled {row.spill_loads:5} B loaded again"
            )
            found.setdefault(row.arch, {})[name] = row
    assert set(found) == set(ARCHITECTURES)
    assert len({frozenset(rows) for rows in found.values()}) == 1
    assert len(found["sm_90"]) >= 40
    spilled = {
        name: max(rows[name].spill_stores for rows in found.values()) for name in found["sm_90"]
    }
    assert {name: n for name, n in spilled.items() if n > ALLOWED.get(name, 0)} == {}
    much_less = {name: spilled[name] for name, n in ALLOWED.items() if spilled[name] < 0.8 * n}
    assert much_less == {}, "allow less"


def test_nothing_is_called_that_was_not_inlined(kernels):
    assert [row.kernel for row in kernels if not row.registers] == []
