"""The benchmark checks before it times; what cannot run, or is wrong, is a row with its reason."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from bench import engine, rows, timing
from bench.cases import all_cases
from bench.engine import BrokenDevice, Deadline, Engine, OutOfTime, Settings, TooSlow, Unit
from bench.peers import OURS, PEERS, functions
from bench.ways import MEASURED

GIVEN, PLAIN = "SDPA, bias given", "plain"
FEW = (OURS, PLAIN, GIVEN)


def unit(name="forward", case="grid-1x512", dtype="float32"):
    return Unit(all_cases("cpu")[case].of_size("check"), name, dtype)


def make(**options):
    options = {"rounds": 1, "unit_s": 0.0, "compile": False, **options}
    return Engine(Settings("cpu", "eager", **options))


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("case", ["torchmd-et-md17", "transformer-m"])
def test_every_way_is_checked_and_timed_or_says_why_not(name, case):
    names = functions(name, "cpu")
    found = make().measure(unit(name, case), names)
    assert list(found) == names
    for function, outcome in found.items():
        row = outcome.row
        assert set(row) <= set(rows.COLUMNS)
        assert row["function"] == function and row["torch"] == torch.__version__
        assert row["case"] == case and row["pass"] == name and row["backend"] == "eager"
        assert bool(row["reason"]) != ("median_ms" in row)
        if not row["reason"]:
            assert 0 < float(row["min_ms"]) <= float(row["median_ms"]) == float(row["wall_ms"])
            assert 0 <= float(row["relative_error"]) <= float(row["error_budget"])
            assert "extra_memory_mb" in row
        assert ("gflop" in row) == (function in (OURS, "ours with table"))
    assert any("compiled" in o.reason for o in found.values())


def test_a_unit_knows_its_real_atoms():
    row = make().check(unit(case="transformer-m"), OURS).row
    assert row["molecules"] == "2" and 5 < float(row["mean_atoms"]) < float(row["atoms"])
    row = make().check(unit(), OURS).row
    assert row["mean_atoms"] == row["atoms"]


def test_16_bits_are_held_against_what_eager_pytorch_loses():
    for function in FEW:
        row = make().check(unit(dtype="bfloat16"), function).row
        assert not row["reason"] and float(row["error_budget"]) > 2**-8


@pytest.fixture(autouse=True)
def _not_frozen(monkeypatch):
    """Lets a test put another way in the place of one: for it alone."""
    monkeypatch.setattr(engine, "PEERS", dict(PEERS))


def put(monkeypatch, change, name=GIVEN):
    right = PEERS[name].make

    def made(problem, pass_name, backend):
        way = right(problem, pass_name, backend)
        way.function = change(way.function)
        return way

    monkeypatch.setitem(engine.PEERS, name, replace(PEERS[name], make=made))


def test_a_wrong_result_is_not_timed(monkeypatch):
    put(monkeypatch, lambda right: lambda *inputs: 1.01 * right(*inputs), OURS)
    found = make().measure(unit(), FEW)
    assert "out is off by 0.01" in found[OURS].reason
    assert not found[OURS].times and found[PLAIN].times


def test_a_way_that_runs_out_of_memory_says_so(monkeypatch):
    def hungry(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB. GPU 0 ...")

    put(monkeypatch, lambda _: hungry)
    found = make().measure(unit(), FEW)
    assert found[GIVEN].reason == "out of memory, for 64.00 GiB more"
    assert found[OURS].times and found[PLAIN].times


def test_a_way_that_fails_while_it_is_timed_does_not_stop_the_others(monkeypatch):
    calls = []

    def tire(right):
        def tired(*inputs):
            calls.append(None)
            if len(calls) > 3:
                raise RuntimeError("tired")
            return right(*inputs)

        return tired

    put(monkeypatch, tire)
    found = make().measure(unit(), FEW)
    assert found[GIVEN].reason == "RuntimeError: tired" and not found[GIVEN].times
    assert found[OURS].times and found[PLAIN].times


def test_a_broken_device_ends_the_run(monkeypatch):
    def broken(*_):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    put(monkeypatch, lambda _: broken)
    with pytest.raises(BrokenDevice, match="illegal memory") as raised:
        make().measure(unit(), FEW)
    assert raised.value.function == GIVEN


def test_time_is_limited_for_a_way(monkeypatch):
    put(monkeypatch, lambda right: lambda *inputs: signal.raise_signal(signal.SIGALRM))
    found = make(way_s=600).measure(unit(), FEW)
    assert found[GIVEN].reason == "not ready after 600 s" and found[OURS].times


def test_time_is_limited_for_all(monkeypatch):
    put(monkeypatch, lambda right: lambda *inputs: time.sleep(60))
    start = time.monotonic()
    with pytest.raises(OutOfTime):
        Engine(Settings("cpu", "eager"), Deadline(0.5)).measure(unit(), FEW)
    assert time.monotonic() - start < 50
    with pytest.raises(TooSlow), Deadline().limit(0.01):
        time.sleep(60)


def test_an_end_that_is_overheard_comes_again(monkeypatch):
    monkeypatch.setattr(engine, "AGAIN_S", 0.05)
    with pytest.raises(TooSlow), Deadline().limit(0.01):
        with contextlib.suppress(TooSlow):
            time.sleep(60)
        time.sleep(60)


def test_compiled_ways_are_left_out_where_nobody_waits_for_them():
    names = ["compiled eager", "FlexAttention, table"]
    assert all(make().check(unit(), n).reason == engine.COLD for n in names)
    patient = make(compile=True, quick=True)
    assert all(patient.check(unit(), n).reason == engine.QUICK for n in names)


def test_problems_are_made_once_for_a_case():
    made = make()
    first = made._make(unit())
    assert made._make(unit("force_step")) is first
    assert made._make(unit(dtype="float64")) is not first


def test_functions_are_timed_in_turn():
    order: list[str] = []
    functions = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = timing.interleaved(functions, 3, calls=1)
    assert "".join(order).endswith("aabb" * 3)
    assert [len(values) for values in times.values()] == [3, 3]


def test_rounds_end_when_medians_are_known():
    times = iter([10.0] * 1000)
    steady = timing.interleaved({"a": int}, 50, measure=lambda *_: next(times), stable=0.01)
    assert len(steady["a"]) == timing.FEWEST
    swinging = (100.0 * (1 + n % 3) for n in range(1000))
    noisy = timing.interleaved({"a": int}, 50, measure=lambda *_: next(swinging), stable=0.01)
    assert len(noisy["a"]) == 50
    assert timing.uncertainty([1.0] * 4) == float("inf") and timing.uncertainty([1.0] * 5) == 0


def test_rows_of_a_run_take_the_place_of_older_ones(tmp_path):
    path = tmp_path / "case.csv"
    like = dict.fromkeys(rows.KEY, "x")
    first = rows.Rows(path)
    first.add([{**like, "function": "a", "median_ms": "1"}, {**like, "function": "b"}])
    rows.Rows(path).add([{**like, "function": "a", "median_ms": "2"}])
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["function"], row["median_ms"]) for row in found] == [("a", "2"), ("b", "")]
    assert not list(tmp_path.glob("*.part"))


def test_a_file_of_another_kind_is_left_alone(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("case,function\n")
    with pytest.raises(ValueError, match="other columns"):
        rows.Rows(path)
    assert path.read_text() == "case,function\n"


def test_what_this_process_takes_is_not_taken_by_others(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "STAT", tmp_path / "stat")
    second = os.sysconf("SC_CLK_TCK")
    timing.STAT.write_text(f"cpu {3 * second} 0 {second} 999 999 0 {second} 0 0 0\ncpu0 ...\n")
    before, own = timing.elsewhere_s(), time.process_time()
    assert before == pytest.approx(5 - own, abs=0.1)
    while time.process_time() < own + 0.3:
        pass
    assert timing.elsewhere_s() - before == pytest.approx(-0.3, abs=0.1)
    timing.STAT.unlink()
    assert timing.elsewhere_s() == 0


@pytest.mark.skipif(not timing.STAT.exists(), reason="no /proc/stat here")
def test_other_processes_are_noticed():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        others = timing.watch()
        time.sleep(1.5)
        busy = float(others())
        other.kill()
    assert busy > 0.2


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("name", MEASURED)
def test_ways_are_checked_and_timed_on_a_gpu(name, mode):
    if (name, mode) == ("force_step", "graph"):
        pytest.skip("not measured")
    settings = Settings("cuda", "triton", rounds=2, unit_s=1.0, compile=False)
    one = Unit(all_cases("cuda")["drug-like"].of_size("check"), name, "float32", mode)
    names = functions(name, "cuda", "triton") if mode == "eager" else [OURS, PLAIN]
    for function, outcome in Engine(settings).measure(one, names).items():
        known = PEERS[function].compiles or PEERS[function].needs
        if known or function == "SDPA, bias recomputed":
            continue
        assert not outcome.reason, function
        assert float(outcome.row["median_ms"]) > 0 and float(outcome.row["wall_ms"]) > 0
        if mode == "eager":
            assert float(outcome.row["peak_memory_mb"]) > 0
