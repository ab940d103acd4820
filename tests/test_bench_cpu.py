"""The benchmark of the C++ kernels runs, compares like with like, and refuses wrong results."""

from __future__ import annotations

import csv

import pytest
import torch

import geot_kernels as gk
from bench import cpu, memory
from bench.problems import (
    BiasProblem,
    FilterProblem,
    geot_filter,
    lattice_molecules,
    qm9_molecules,
)
from bench.timing import COLUMNS, NUMBERS, Goal, Report, interleaved
from bench.ways import check
from geot_kernels.reference import distances

PASSES = ("forward", "backward", "force_step")
MISSING = gk.available_backends("cpu")["cpu"]
compiled_kernels = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bias_problem() -> BiasProblem:
    return BiasProblem(2, 9, heads=2, dim=8)


def filter_problem() -> FilterProblem:
    return FilterProblem(*qm9_molecules(2, 24), 2, 4, geot_filter(8))


@compiled_kernels
@pytest.mark.usefixtures("_threads")
def test_smallest_cases_print_their_lines_and_write_their_rows(tmp_path, capsys):
    path = tmp_path / "cpu.csv"
    cpu.main(["--case", "small", "demo", "--rounds", "1", "--out", str(path)])
    printed = capsys.readouterr().out
    assert "goal <= 40" in printed and "no goal" in printed
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert {row["threads"] for row in rows} == {"1", "2"}
    for row in rows:
        assert all(float(row[name]) > 0 for name in NUMBERS)
        assert row["torch"] == torch.__version__ and row["geot_kernels"] == gk.__version__


@compiled_kernels
def test_memory_of_a_call_is_measured_in_a_process_of_its_own():
    assert -1 < memory.in_a_process(257) < cpu.EXTRA_MB


@compiled_kernels
def test_rows_of_a_large_molecule_are_checked():
    problem = BiasProblem(1, 65, heads=2, dim=8)
    cpu.check_rows(problem, rows=3)
    mistaken = problem.ours()
    function, mistaken.function = mistaken.function, lambda *inputs: 1.01 * function(*inputs)
    problem.ours = lambda: mistaken
    with pytest.raises(RuntimeError, match="result 0"):
        cpu.check_rows(problem, rows=3)


@pytest.mark.parametrize("name", ["eager", "math"])
def test_plain_pytorch_computes_the_same_bias(name):
    problem = bias_problem()
    ours = problem.ours_building_the_table("eager")
    check(ours, getattr(problem, name)(), PASSES)


def test_plain_pytorch_computes_the_same_filter():
    problem = filter_problem()
    check(problem.ours_building_the_table("eager"), problem.eager(), PASSES, problem.mask)


def test_a_wrong_result_is_not_timed():
    problem = bias_problem()
    ours, other = problem.ours_building_the_table("eager"), problem.eager()
    other.inputs[3] = (other.inputs[3] * 1.01).detach().requires_grad_()
    with pytest.raises(RuntimeError, match="relative error"):
        check(ours, other, ["forward"])


def test_atoms_are_as_far_apart_as_in_molecules():
    dist = distances(*2 * (lattice_molecules(3, 65),))
    apart = dist[dist > 0]
    assert len(apart) == 3 * 65 * 64
    assert apart.min() > 0.9 and dist.max() < 14
    nearest = (dist + 99 * torch.eye(65)).amin(-1)
    assert nearest.mean() < 2.2


def test_ratios_and_goals_come_from_medians():
    times = {"ours": [1.0, 2.0, 9.0], "other": [8.0, 8.0, 1.0]}
    assert Goal("ours", "other", at_least=4).value(times)[0] == 4
    assert Goal("ours", "other", at_most=0.3).value(times)[0] == 0.25
    assert "4x faster | goal >= 5: NOT MET" in Goal("ours", "other", at_least=5).line(times)
    assert "0.25x its time | goal <= 0.3: met" in Goal("ours", "other", at_most=0.3).line(times)
    assert "2.0 us | goal <= 2: met" in Goal("ours", at_most=2).line(times)


def test_functions_are_timed_in_turn():
    order: list[str] = []
    functions = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = interleaved(functions, 3, calls=1)
    assert "".join(order).endswith("aabb" * 3)
    assert [len(values) for values in times.values()] == [3, 3]


def test_a_report_holds_one_row_for_each_function(tmp_path):
    report = Report(2)
    report.measure("case", {"one": lambda: None, "two": lambda: None}, [Goal("one", "two")])
    report.memory("case", "three", 12.34, 20)
    report.write(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["function"] for row in rows] == ["one", "two", "three"]
    assert [row["extra_memory_mb"] for row in rows] == ["", "", "12.3"]
