"""Growth with size: what is measured, that it is right, and that our memory grows as N."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

import geot_kernels as gk
from bench import scaling
from bench.rows import COLUMNS, NUMBERS, Rows
from bench.scaling import Size

MISSING = gk.available_backends("cpu")["cpu"]
compiled_kernels = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
PASSES = ("forward", "backward+table", "force_step")


def small(case: str = "scaling-n", molecules: int = 1, atoms: int = 20, **others) -> Size:
    return Size(case, molecules, atoms, "cpu", "eager", "float32", True, 0.01, **others)


def exponent(xs: list[int], ys: list[float]) -> float:
    return statistics.linear_regression(*([math.log(x) for x in v] for v in (xs, ys))).slope


def test_sizes_double_and_quick_ones_end_early():
    assert scaling.sizes_n("cpu") == [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
    assert scaling.sizes_n("cuda", quick=True) == [64, 128, 256, 512, 1024, 2048]
    assert scaling.sizes_b("cuda")[::5] == [1, 32, 1024]
    assert scaling.sizes_b("cpu", quick=True)[-1] == 64


@pytest.mark.parametrize(
    ("measure", "case"), [("measure_n", "scaling-n"), ("measure_b", "scaling-b")]
)
def test_rows_come_pass_by_pass(measure, case, monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "sizes_n", lambda *_: [8, 16])
    monkeypatch.setattr(scaling, "sizes_b", lambda *_: [1, 2])
    rows = Rows(tmp_path / "rows.csv")
    found = list(getattr(scaling, measure)("cpu", "eager", quick=True, seconds=0.01))
    for some in found:
        rows.add(some)
        assert all(set(row) == set(COLUMNS) for row in some)
    assert [some[0]["pass"] for some in found] == [*PASSES, *PASSES]
    assert [len(some) for some in found] == [3, 3, 2] * 2
    assert len(rows.rows) == 16  # none has the key of another
    sizes = {(row["molecules"], row["atoms"]) for row in rows.rows}
    assert sizes == (
        {("1", "8"), ("1", "16")} if case == "scaling-n" else {("1", "32"), ("2", "32")}
    )
    for row in rows.rows:
        assert row["case"] == case and not row["reason"]
        assert all(float(row[name]) > 0 for name in (*NUMBERS, "wall_ms"))
        assert bool(row["gflop"]) == bool(row["worst_result"]) == (row["function"] == "ours")


def test_what_eager_would_need_is_estimated_before_it_runs(monkeypatch):
    monkeypatch.setitem(scaling.EAGER_GB, True, 20**2 * 64 * 4 * 5.6 / 1e9)
    found = {name: rows for name, rows in zip(PASSES, small().measure(), strict=True)}
    reasons = {name: rows[-1]["reason"] for name, rows in found.items()}
    assert reasons == {**dict.fromkeys(PASSES, ""), "force_step": "would need about 0.000819 GB"}
    assert not found["force_step"][-1]["median_ms"] and found["force_step"][0]["median_ms"]
    assert Size("", 1, 4096, "cpu", "", "float32").too_large("forward").endswith("about 10.7 GB")
    assert not Size("", 1, 2048, "cpu", "", "float32").too_large("forward")


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_formula_agree_with_ours(name, dtype):
    problem = scaling.BiasProblem(2, 33, heads=2, dim=8, dtype=dtype)
    found, allowed = scaling.check_rows(problem, "eager", name, count=3)
    assert found.keys() == allowed.keys() and len(found) == {"forward": 1, "force_step": 4}.get(
        name, 5
    )
    assert all(found[result] <= allowed[result] for result in found)
    assert max(allowed.values()) < (1e-2 if dtype == torch.float32 else 0.5)


def wrong_by(factor: float, only: bool, monkeypatch) -> None:
    """Makes ours wrong: everywhere, or for the last query atom alone."""
    right = scaling.BiasProblem.ours

    def ours(self, backend):
        way = right(self, backend)
        function = way.function

        def mistaken(*inputs):
            out = function(*inputs)
            return torch.cat(
                [out[:, :-1] if only else factor * out[:, :-1], factor * out[:, -1:]], 1
            )

        way.function = mistaken
        return way

    monkeypatch.setattr(scaling.BiasProblem, "ours", ours)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
@pytest.mark.parametrize("only", [False, True])
def test_wrong_results_are_not_timed(factor, only, monkeypatch):
    wrong_by(factor, only, monkeypatch)
    for rows in small(atoms=40).measure():
        ours, *others = rows
        assert ours["reason"].startswith("ArithmeticError: wrong: ")
        assert not ours["median_ms"]
        assert all(row["median_ms"] for row in others)


def test_wrong_results_are_not_timed_where_eager_pytorch_does_not_fit(monkeypatch):
    wrong_by(1.01, False, monkeypatch)
    monkeypatch.setitem(scaling.EAGER_GB, True, 0.0)
    for rows in small(atoms=40).measure():
        assert rows[0]["reason"].startswith("ArithmeticError: wrong: ")
        assert rows[-1]["reason"].startswith("would need about ")


def test_slow_calls_are_timed_a_few_times_in_turn():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = {"a": {}, "b": {}}
    small()._time(calls, 5.0, found)
    assert "".join(order) == "ab" * scaling.FEW
    assert {row["rounds"] for row in found.values()} == {str(scaling.FEW)}


@compiled_kernels
def test_our_memory_grows_as_the_number_of_atoms():
    """Forward and backward, the table's gradient with them."""
    sizes = [2048, 4096, 8192]
    extra = [scaling.in_a_process(atoms, "backward+table") for atoms in sizes]
    assert extra[0] > 5  # well above what pages of a process differ by
    assert 0.5 < exponent(sizes, extra) < 1.2


@pytest.mark.slow
def test_memory_of_eager_pytorch_grows_as_its_square():
    sizes = [512, 1024]
    extra = [scaling.in_a_process(atoms, "forward", "eager") for atoms in sizes]
    assert 1.8 < exponent(sizes, extra) < 2.2
    needed = 1024**2 * scaling.GAUSSIANS * 4 / 1e6 * scaling.EAGER_ARRAYS["forward"]
    assert 0.6 * needed < extra[1] < needed
