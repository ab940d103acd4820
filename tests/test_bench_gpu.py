"""The command for a GPU machine, as far as it goes on a CPU, and the suite as a user calls it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import cases, engine, gpu, plan, rows, static_times
from bench.engine import BrokenDevice, Engine, Outcome, Settings, Unit
from bench.peers import OURS, functions
from bench.ways import MEASURED

ROOT = Path(__file__).parents[1]
DTYPES = ("bfloat16", "float32")
SETTINGS = Settings("cpu", "eager", rounds=1, unit_s=0.0, compile=False, commit="this")
CASE = "torchmd-et-md17"


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_most_telling_units_come_first_and_none_comes_twice():
    tasks = plan.plan("cuda", "triton", DTYPES)
    assert len({(t.unit, t.functions) for t in tasks}) == len(tasks)
    assert tasks[0].unit.case.atoms == 64 and tasks[0].unit.dtype == "bfloat16"
    names = list(dict.fromkeys(task.unit.case.name for task in tasks))
    assert names[4:12] == list(plan.CASES)
    late = [plan.compiles(task) for task in tasks]
    assert late == sorted(late)  # what takes compiling comes last
    compiled = {t.unit.case.name for t in tasks if plan.compiles(t)}
    assert compiled == {*plan.CASES, "grid-512x64", "grid-1024x32"}
    replayed = {t.unit.case.atoms for t in tasks if t.unit.mode == "graph"}
    assert replayed == {16, 32}
    assert not any(t.unit.mode == "graph" for t in plan.plan("cpu", "cpu", DTYPES))
    every = {name for task in tasks for name in task.functions}
    assert every == {n for p in MEASURED for n in functions(p, "cuda", "triton")}


@pytest.fixture
def _few_tasks(monkeypatch):
    """Leaves the units of one case, and nothing beside the cases."""
    right = plan.plan

    def short(*arguments):
        return [t for t in right(*arguments) if t.unit.case.name == CASE][:2]

    monkeypatch.setattr(plan, "plan", short)
    monkeypatch.setattr(plan, "machine", lambda *_: None)
    monkeypatch.setattr(plan, "others", lambda *_: None)


def measure(folder, **settings):
    return plan.measure(replace(SETTINGS, **settings), folder, 60, ["float32"], "check")


@pytest.mark.usefixtures("_few_tasks")
def test_a_second_run_does_what_is_missing(tmp_path, monkeypatch):
    path = tmp_path / f"{CASE}.csv"
    assert measure(tmp_path) == 0
    found = read(path)
    assert {row["commit"] for row in found} == {"this"} and not (tmp_path / plan.MARKER).exists()
    measured = []
    right = Engine.measure
    monkeypatch.setattr(Engine, "measure", lambda *a: measured.append(a) or right(*a))
    measure(tmp_path)
    assert not measured and read(path) == found
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    measure(tmp_path)
    assert len(measured) == 1 and len(read(path)) == len(found)
    measure(tmp_path, commit="another")
    assert len(measured) == 3 and {row["commit"] for row in read(path)} == {"another"}


@pytest.mark.usefixtures("_few_tasks")
def test_what_breaks_the_device_is_a_row_and_is_not_tried_again(tmp_path, monkeypatch):
    right, tried = Engine.measure, []

    def broken(engine, unit, names):
        tried.append(names)
        if "eager" in names:
            raise BrokenDevice("an illegal memory access", "eager")
        return right(engine, unit, names)

    monkeypatch.setattr(Engine, "measure", broken)
    assert measure(tmp_path) == plan.BROKEN
    (row,) = read(tmp_path / f"{CASE}.csv")
    assert row["function"] == "eager" and "broke the device: an illegal" in row["reason"]
    assert measure(tmp_path) == plan.BROKEN  # the other unit
    assert measure(tmp_path) == 0
    assert "eager" not in tried[-1] and "ours" in tried[-1]
    found = read(tmp_path / f"{CASE}.csv")
    assert {r["function"] for r in found if r["reason"].startswith(plan.BROKE)} == {"eager"}
    assert not plan.failures(tmp_path, "this")


@pytest.mark.usefixtures("_few_tasks")
def test_a_way_that_breaks_twice_is_left_out_elsewhere(tmp_path, monkeypatch):
    like = {**rows.where("cpu", "eager", "this"), "pass": "forward", "dtype": "float32"}
    reason = {"function": "eager", "reason": f"{plan.BROKE}: illegal"}
    rows.Rows(tmp_path / "grid.csv").add({**like, **reason, "case": case} for case in "ab")
    assert measure(tmp_path) == 0
    found = {(r["pass"], r["function"]): r["reason"] for r in read(tmp_path / f"{CASE}.csv")}
    assert found["forward", "eager"] == f"{plan.BROKE} in other cases"
    assert found["backward+table", "eager"] == found["forward", "ours"] == ""


@pytest.mark.usefixtures("_few_tasks")
def test_a_process_that_died_leaves_rows_behind_and_the_next_one_goes_on(tmp_path, monkeypatch):
    right = Engine.measure

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path)
    assert (tmp_path / plan.MARKER).exists()
    monkeypatch.setattr(Engine, "measure", right)
    assert measure(tmp_path) == 0
    found = read(tmp_path / f"{CASE}.csv")
    ended = [r["pass"] for r in found if "it ended here" in r["reason"]]
    assert set(ended) == {"forward"} and len(plan.failures(tmp_path, "this")) == 2
    assert any(r["median_ms"] for r in found if r["pass"] == "backward+table")


@pytest.mark.usefixtures("_few_tasks")
def test_an_error_ends_a_unit_and_not_the_run(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("no such file")

    monkeypatch.setattr(Engine, "measure", fails)
    assert measure(tmp_path) == 0
    found = read(tmp_path / f"{CASE}.csv")
    assert {r["reason"] for r in found} == {"OSError: no such file"}
    assert {r["pass"] for r in found} == {"forward", "backward+table"}


def test_what_stands_beside_the_cases_is_measured_once(tmp_path, monkeypatch):
    asked = []

    def model(name, *_):
        asked.append(name)
        if name == "b":
            raise RuntimeError("no")
        return [{**rows.where("cpu"), "case": name, "function": OURS}]

    def size(self):
        asked.append((self.case, self.molecules, self.atoms))
        like = {"case": self.case, "molecules": str(self.molecules), "atoms": str(self.atoms)}
        for name in MEASURED:
            yield [{**rows.where("cpu"), **like, "pass": name, "function": OURS}]

    monkeypatch.setattr(plan.models, "MODELS", dict.fromkeys("abc"))
    monkeypatch.setattr(plan.models, "measure", model)
    monkeypatch.setattr(plan.scaling.Size, "measure", size)
    results = plan.Results(tmp_path, "this")
    plan.others(Engine(SETTINGS), results, quick=True)
    assert asked[:3] == ["a", "b", "c"] and ("scaling-n", 1, 2048) in asked
    assert {r["commit"] for r in read(tmp_path / "scaling-b.csv")} == {"this"}
    asked.clear()
    plan.others(Engine(SETTINGS), results, quick=True)
    assert asked == ["b"]  # which failed


def arguments(folder, **others):
    named = {"seconds": 300.0, "device": "cpu", "backend": "cpu", "dtype": ["float32"]}
    named |= {"rows": folder, "no_tests": True, "commit": "this", "tiny": True}
    return Namespace(**{**named, **others})


@pytest.mark.parametrize(
    ("statuses", "started", "expected"),
    [([0], 1, 0), ([124], 1, 0), ([plan.BROKEN, 0], 2, 1), ([-11, plan.BROKEN, 0], 3, 1)],
)
def test_a_process_that_ends_badly_is_started_again(
    statuses, started, expected, tmp_path, monkeypatch, capsys
):
    left, commands = iter(statuses), []

    class Fake:
        lines = ("text",)

        def __init__(self, title, command, *_):
            commands.append((title, command))

        def wait(self):
            return next(left)

    monkeypatch.setattr(gpu, "Stage", Fake)
    assert gpu.run(arguments(tmp_path), "cpu", tmp_path) == expected
    assert [title for title, _ in commands] == ["measure"] * started
    command = commands[0][1]
    assert command[command.index("--commit") + 1] == "this" and "--tiny" in command
    assert float(command[command.index("--seconds") + 1]) < 300 - gpu.SUMMARY_S
    printed = capsys.readouterr().out
    assert "== summary" in printed and "no rows" in printed


def test_nothing_is_begun_when_time_is_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "machine", lambda *_: pytest.fail("begun"))
    assert plan.measure(SETTINGS, tmp_path, 0, ["float32"], "check") == 0
    assert "out of time" in capsys.readouterr().out


def test_failures_of_ours_are_found_and_those_of_others_are_not(tmp_path):
    like = {**rows.where("cpu", "eager", "this"), "case": "x", "pass": "forward"}
    bad = {**like, "function": OURS, "reason": "wrong: out is off by 1"}
    other = {**like, "function": "eager", "reason": "out of memory"}
    rows.Rows(tmp_path / "grid.csv").add([bad, other])
    (line,) = plan.failures(tmp_path, "this")
    assert line == "OURS FAILED: grid: x, forward, , ours, wrong: out is off by 1"


def test_stages_end_in_time_and_keep_what_they_printed():
    command = [sys.executable, "-c", "print('first', flush=True); import time; time.sleep(60)"]
    stage = gpu.Stage("slow", command, 2.0, {})
    assert stage.wait() == 124 and stage.lines == ["first"]
    command = [sys.executable, "-c", "import geot_model, os; print(os.environ['A'])"]
    stage = gpu.Stage("imports", command, 60.0, {"A": "b"})
    assert stage.wait() == 0 and stage.lines == ["b"]


def test_the_static_report_stands_beside_measured_times(tmp_path):
    assert static_times.table(tmp_path, 132) == []
    unit = Unit(cases.grid("cuda")["grid-512x64-8"], "forward", "bfloat16")
    like = {"case": unit.case.name, "pass": "forward", "dtype": "bfloat16", "mode": "eager"}
    like |= {"molecules": "512", "atoms": "64", "heads": "8", "head_dim": "32"}
    rows.Rows(tmp_path / "grid.csv").add([{**like, "function": OURS, "median_ms": "0.1"}])
    _, line = static_times.table(tmp_path, 132)
    (known,) = [
        r
        for r in read(static_times.STATIC)
        if (r["pass"], r["dtype"], r["atoms"]) == ("forward", "bfloat16", "64")
    ]
    model = float(known["clocks"]) * 512 * 8 / 132 / 1.7e6
    assert f"model {model:.3g} ms, measured 0.1 ms" in line


def pytest_of(*arguments):
    """The suite in a process of its own, which knows nothing of pytest-xdist around it."""
    alone = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "bench/", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env={**alone, "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def test_the_suite_measures_writes_rows_and_ends_with_a_table(tmp_path):
    saved = tmp_path / "times.json"
    done = pytest_of(
        *("--benchmark", "--quick", "--case", "torchmd-et-md17", "--device", "cpu"),
        *("--backend", "eager", "--rows", str(tmp_path), f"--benchmark-json={saved}"),
        *("-k", "forward"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row["function"]: row for row in read(tmp_path / "torchmd-et-md17.csv")}
    assert float(found["ours"]["median_ms"]) > 0 and float(found["eager"]["median_ms"]) > 0
    assert found["compiled eager"]["reason"] == engine.QUICK
    assert "torchmd-et-md17" in done.stdout.rpartition("short test summary")[0]
    assert (tmp_path / "report.md").exists()
    times = {b["name"]: b["stats"] for b in json.loads(saved.read_text())["benchmarks"]}
    ours = times["test_case[torchmd-et-md17, forward, float32: ours]"]["median"]
    assert f"{ours * 1e3:.4g}" == found["ours"]["median_ms"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--case", "nothing"], "no case nothing; there are geot-qm9"),
        (["--dtype", "float3"], "no dtype of torch: float3"),
        (["--device", "cuda"], "sees no CUDA device"),
    ],
)
def test_wrong_options_are_refused_with_what_there_is(arguments, text):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = pytest_of(*arguments)
    assert done.returncode == 4 and text in done.stdout + done.stderr


def test_an_outcome_of_ours_that_failed_fails_its_test():
    from bench.conftest import conclude

    ends = (pytest.fail.Exception, pytest.skip.Exception)
    cases = {OURS: ("wrong: out", ends[0]), "cuEquivariance": ("it is not installed", ends[1])}
    for function, (reason, kind) in cases.items():
        with pytest.raises(ends, match=reason) as raised:
            conclude(Outcome(reason=reason), function, SimpleNamespace())
        assert isinstance(raised.value, kind)
