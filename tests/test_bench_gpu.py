"""The benchmark for GPUs as far as it goes without one: `python -m bench.gpu --tiny` on a CPU."""

from __future__ import annotations

import csv
import time

import pytest
import torch

from bench import gpu, timing
from bench.problems import BiasProblem
from bench.ways import BUDGET, errors, gaussian_score_mod, table_score_mod

TINY = ["--device", "cpu", "--backend", "eager", "--tiny", "--rounds", "1"]
CORE = ["--case", "bias", "--group", "core", "--dtype", "float32", "--pass", "forward"]
PLAIN = ["core", "plain", "filter", "one molecule"]  # groups that compile nothing


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(path, *arguments):
    return gpu.main([*TINY, "--out", str(path), *arguments])


def test_every_way_is_checked_and_timed(tmp_path, capsys):
    assert run(tmp_path / "gpu.csv", "--group", *PLAIN) == 0
    rows = read(tmp_path / "gpu.csv")
    assert tuple(rows[0]) == gpu.COLUMNS
    assert {row["case"] for row in rows} == {"bias", "filter", "flex", "memory"}
    assert {row["dtype"] for row in rows} == {"bfloat16", "float32"}
    names = {row["function"] for row in rows}
    assert names == {name for group in PLAIN for name in gpu.GROUPS[group]}
    for row in rows:
        assert not row["reason"]
        assert all(float(row[name]) > 0 for name in timing.NUMBERS)
        assert 0 <= float(row["relative_error"]) <= float(row["error_budget"])
        assert row["torch"] == torch.__version__ and row["backend"] == "eager"
        assert bool(row["extra_memory_mb"]) == (row["case"] in ("flex", "memory"))
    printed = capsys.readouterr().out
    assert "x the time of ours with table" in printed and printed.endswith("done\n")


def test_a_second_run_does_what_is_missing(tmp_path):
    path = tmp_path / "gpu.csv"
    run(path, *CORE)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * len(gpu.GROUPS["core"])
    run(path, *CORE)
    assert path.read_text() == "".join(lines)
    path.write_text("".join(lines[:5]))
    run(path, *CORE)
    assert [row["atoms"] for row in read(path)] == 4 * ["4"] + 4 * ["6"]


def test_a_file_of_another_kind_is_left_alone(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("case,function\n")
    with pytest.raises(ValueError, match="other columns"):
        run(path, *CORE)
    assert path.read_text() == "case,function\n"


def test_what_flex_attention_cannot_do_is_a_row_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    arguments = ["--case", "flex", "--group", "flex", "--pass", "forward", "backward+table"]
    assert run(tmp_path / "gpu.csv", *arguments) == 0
    for row in read(tmp_path / "gpu.csv"):
        fails = row["function"].startswith("Flex") and row["pass"] != "forward"
        assert ("does not support backward on CPU" in row["reason"]) == fails
        assert bool(row["median_ms"]) != fails


def test_a_way_that_runs_out_of_memory_is_a_row_with_its_reason(tmp_path, monkeypatch):
    def hungry(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB. GPU 0 ...")

    def replaced(problem):
        way = problem.plain()
        way.function = hungry
        return way

    monkeypatch.setattr(BiasProblem, "bias_given", replaced)
    assert run(tmp_path / "gpu.csv", *CORE) == 0
    rows = read(tmp_path / "gpu.csv")
    reasons = {row["function"]: row["reason"] for row in rows}
    assert reasons[gpu.GIVEN] == "out of memory, for 64.00 GiB more"
    assert not any(reason for name, reason in reasons.items() if name != gpu.GIVEN)
    assert run(tmp_path / "gpu.csv", *CORE) == 0
    assert read(tmp_path / "gpu.csv") == rows
    run(tmp_path / "gpu.csv", *CORE, "--retry")
    assert len(read(tmp_path / "gpu.csv")) == 2 * len(rows)


def test_a_wrong_result_is_not_timed_and_said_loudly(tmp_path, monkeypatch, capsys):
    right = BiasProblem.ours

    def mistaken(problem, backend):
        way = right(problem, backend)
        function, way.function = way.function, lambda *inputs: 1.01 * function(*inputs)
        return way

    monkeypatch.setattr(BiasProblem, "ours", mistaken)
    assert run(tmp_path / "gpu.csv", *CORE) == 1
    row = read(tmp_path / "gpu.csv")[0]
    assert row["function"] == "ours" and "out is off by 0.01" in row["reason"]
    assert not row["median_ms"]
    assert "OURS FAILED: bias" in capsys.readouterr().out


def test_a_way_that_fails_while_it_is_timed_does_not_stop_the_others(tmp_path, monkeypatch):
    calls = []

    def replaced(problem):
        way = problem.plain()
        function = way.function

        def tired(*inputs):
            calls.append(None)
            if len(calls) % 3 == 0:
                raise RuntimeError("tired")
            return function(*inputs)

        way.function = tired
        return way

    monkeypatch.setattr(BiasProblem, "bias_given", replaced)
    monkeypatch.setitem(gpu.RADIAL, gpu.GIVEN, "none")
    assert run(tmp_path / "gpu.csv", *CORE) == 0
    found = {row["function"]: row for row in read(tmp_path / "gpu.csv")}
    assert found[gpu.GIVEN]["reason"] == "RuntimeError: tired"
    assert all(row["median_ms"] for name, row in found.items() if name != gpu.GIVEN)


def test_a_broken_device_ends_the_run(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(BiasProblem, "plain", broken)
    assert run(tmp_path / "gpu.csv", *CORE) == 1
    assert [row["function"] for row in read(tmp_path / "gpu.csv")] == [gpu.PLAIN]
    assert "the device is unusable now" in capsys.readouterr().out


def test_time_is_limited_for_a_way_and_for_all(tmp_path, monkeypatch, capsys):
    def slow(problem, *_):
        time.sleep(30)

    monkeypatch.setattr(BiasProblem, "bias_given", slow)
    assert run(tmp_path / "way.csv", *CORE, "--way-seconds", "0.5") == 0
    reasons = {row["function"]: row["reason"] for row in read(tmp_path / "way.csv")}
    assert reasons[gpu.GIVEN].startswith("not ready after")
    start = time.monotonic()
    assert run(tmp_path / "all.csv", *CORE, "--seconds", "1") == 0
    assert time.monotonic() - start < 10
    assert read(tmp_path / "all.csv") == []  # the unit was not done: the next run starts with it
    assert "out of time" in capsys.readouterr().out


def test_the_most_valuable_rows_come_first_and_none_comes_twice():
    cases = ("bias", "filter", "flex", "memory")
    dtypes = ("bfloat16", "float32")
    units = gpu.plan(gpu.Sizes(), cases, dtypes, gpu.PASSES, "cuda")
    assert len(set(units)) == len(units)
    assert units[0].shape == gpu.Shape("bias", 512, 64, 8, 32) and units[0].group == "core"
    order = list(dict.fromkeys(u.shape.atoms for u in units if u.shape.case == "bias"))
    assert order == [64, 16, 32, 128, 2048, 512, 256, 1024]
    flex = [u for u in units if u.shape.case == "bias" and u.group == "flex"]
    assert [u.shape.atoms for u in flex[:8:2]] == [64, 16, 32, 128]
    assert {(u.shape.heads, u.dtype) for u in flex[:8]} == {(8, "bfloat16")}
    replayed = {u.shape.atoms for u in units if u.mode == "graph"}
    assert replayed == {16, 32}
    assert not any(u.mode == "graph" for u in gpu.plan(gpu.TINY, cases, dtypes, gpu.PASSES, "cpu"))


@pytest.mark.parametrize("name", ["weights", "knots"])
def test_score_mods_have_the_right_gradients(name):
    problem = BiasProblem(2, 5, heads=2, dim=4, num_gaussians=3)
    way = problem.eager() if name == "weights" else problem.eager_table()
    way.prepare("backward+table")
    parameter = way.parameters[0] if name == "weights" else way.parameters[0].detach()[0]
    parameter = parameter.detach().clone().requires_grad_()
    positions = way.inputs[3].detach().clone().requires_grad_()
    if name == "weights":
        sums = problem.sum.centers.tolist(), problem.sum.gammas.tolist()
        mod = gaussian_score_mod(positions, *sums, parameter)
    else:
        mod = table_score_mod(positions, parameter, problem.table.r_max)
    q, k, v = (x.detach() for x in way.inputs[:3])
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    grid = torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij")
    out = mod(scores, *grid).softmax(-1) @ v
    got = torch.autograd.grad(out, (positions, parameter), way.cotangent)
    expected = way.named("backward+table", way.backward())
    found = errors({"d positions": got[0], f"d {name}": got[1]}, expected)
    assert max(found.values()) <= BUDGET["gradient"]


def test_budgets_of_16_bits_come_from_what_eager_pytorch_loses():
    problem = BiasProblem(4, 9, heads=2, dim=16, dtype=torch.bfloat16)
    lost = problem.losses("backward+table", "gaussians")
    assert set(lost) == {f"d {n}" for n in ("q", "k", "v", "positions", "weights", "knots")}
    assert all(2**-10 < loss < 0.05 for loss in lost.values())
    way = problem.bias_given().prepare("backward")
    _, error, budget = problem.verify(way, "backward", way.backward(), "gaussians", False)
    assert error <= budget < 0.1
    way.inputs[2].data *= 1.2
    _, error, budget = problem.verify(way, "backward", way.backward(), "gaussians", False)
    assert error > budget
