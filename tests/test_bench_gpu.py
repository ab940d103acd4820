"""The command for a GPU machine, as far as it goes on a CPU, and the suite as a user calls it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import engine, gpu, rows, static_times
from bench.engine import BrokenDevice, Engine, Outcome, Settings, Unit
from bench.peers import OURS, functions

ROOT = Path(__file__).parents[1]
DTYPES = ("bfloat16", "float32")
SETTINGS = Settings("cpu", "eager", rounds=1, unit_s=0.0, compile=False, commit="this")


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_most_telling_units_come_first_and_none_comes_twice():
    tasks = gpu.plan("cuda", "triton", DTYPES)
    assert len({(t.unit, t.functions) for t in tasks}) == len(tasks)
    assert tasks[0].unit.case.atoms == 64 and tasks[0].unit.dtype == "bfloat16"
    names = list(dict.fromkeys(task.unit.case.name for task in tasks))
    assert names[4:12] == list(gpu.CASES)
    late = [gpu.compiles(task) for task in tasks]
    assert late == sorted(late)  # what takes compiling comes last
    replayed = {t.unit.case.atoms for t in tasks if t.unit.mode == "graph"}
    assert replayed == {16, 32}
    assert not any(t.unit.mode == "graph" for t in gpu.plan("cpu", "cpu", DTYPES))
    every = {name for task in tasks for name in task.functions}
    assert every == {n for p in gpu.MAIN for n in functions(p, "cuda", "triton")}


@pytest.fixture
def _one_task(monkeypatch):
    """Leaves one unit of the plan, and nothing beside the cases."""
    right = gpu.plan

    def short(*arguments):
        task = next(t for t in right(*arguments) if t.unit.case.name == "torchmd-et-md17")
        return [task]

    monkeypatch.setattr(gpu, "plan", short)
    monkeypatch.setattr(gpu, "machine", lambda *_: None)
    monkeypatch.setattr(gpu, "others", lambda *_: None)


@pytest.mark.usefixtures("_one_task")
def test_a_second_run_does_what_is_missing(tmp_path, monkeypatch):
    path = tmp_path / "torchmd-et-md17.csv"
    assert gpu.measure(SETTINGS, tmp_path, 60, ["float32"], "check") == 0
    found = read(path)
    assert {row["commit"] for row in found} == {"this"}
    measured = []
    right = Engine.measure
    monkeypatch.setattr(Engine, "measure", lambda *a: measured.append(a) or right(*a))
    gpu.measure(SETTINGS, tmp_path, 60, ["float32"], "check")
    assert not measured and read(path) == found
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    gpu.measure(SETTINGS, tmp_path, 60, ["float32"], "check")
    assert len(measured) == 1 and len(read(path)) == len(found)


@pytest.mark.usefixtures("_one_task")
def test_a_broken_device_is_a_row_and_an_exit_status(tmp_path, monkeypatch):
    def broken(*_):
        raise BrokenDevice("an illegal memory access")

    monkeypatch.setattr(Engine, "measure", broken)
    assert gpu.measure(SETTINGS, tmp_path, 60, ["float32"], "check") == gpu.BROKEN
    found = read(tmp_path / "torchmd-et-md17.csv")
    assert all("broke the device" in row["reason"] for row in found)
    assert gpu.measure(SETTINGS, tmp_path, 60, ["float32"], "check") == 0  # it is not tried again
    assert len(gpu.failures(tmp_path, "this")) == 2 and not gpu.failures(tmp_path, "other")


def test_nothing_is_begun_when_time_is_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "machine", lambda *_: pytest.fail("begun"))
    assert gpu.measure(SETTINGS, tmp_path, 0, ["float32"], "check") == 0
    assert "out of time" in capsys.readouterr().out


def test_failures_of_ours_are_found_and_those_of_others_are_not(tmp_path):
    like = {**rows.where("cpu", "eager", "this"), "case": "x", "pass": "forward"}
    bad = {**like, "function": OURS, "reason": "wrong: out is off by 1"}
    other = {**like, "function": "eager", "reason": "out of memory"}
    rows.Rows(tmp_path / "grid.csv").add([bad, other])
    (line,) = gpu.failures(tmp_path, "this")
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
    unit = Unit(gpu.grid("cuda")["grid-512x64-8"], "forward", "bfloat16")
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


def pytest_of(*arguments, **variables):
    """The suite in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "bench/", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", **variables},
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
    done = pytest_of(*arguments)
    assert done.returncode == 4 and text in done.stdout + done.stderr


def test_an_outcome_of_ours_that_failed_fails_its_test():
    from bench.conftest import conclude

    with pytest.raises(pytest.fail.Exception, match="wrong"):
        conclude(Outcome(reason="wrong: out"), OURS, SimpleNamespace())
    with pytest.raises(pytest.skip.Exception, match="not installed"):
        conclude(Outcome(reason="it is not installed"), "cuEquivariance", None)
