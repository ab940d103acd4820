"""Several processes that train together: the same loss as one, and no process left behind."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from rich.console import Console

from geot_model import distributed

TIMEOUT = 300  # seconds; the processes take some to import what they need


@pytest.fixture(autouse=True)
def _no_hang():
    """Ctrl-C, should it take too long."""
    timer = threading.Timer(TIMEOUT, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    yield
    timer.cancel()


@pytest.fixture
def processes(monkeypatch):
    """The processes that were started."""
    started = []
    original = distributed._start

    def start(*arguments):
        started.append(original(*arguments))
        return started[-1]

    monkeypatch.setattr(distributed, "_start", start)
    return started


def launch(function, console=None, **arguments):
    console = console or Console(file=io.StringIO())
    return distributed.launch(function, arguments, 2, backend="gloo", console=console)


def add_ranks(start, console):
    rank = torch.distributed.get_rank()
    console.print(f"[rank] {rank} prints", markup=False)
    total = torch.tensor([start + rank])
    torch.distributed.all_reduce(total)
    return total


def fail_in_the_second(console):
    if torch.distributed.get_rank() == 1:
        raise ValueError("something is broken")
    time.sleep(1000)


def wait(console):
    console.print("waiting")
    time.sleep(1000)


def test_processes_meet_and_the_first_one_answers(processes):
    console = Console(file=io.StringIO())
    assert launch(add_ranks, console, start=10).item() == 21
    assert console.file.getvalue() == "[rank] 0 prints\n"
    assert [process.returncode for process in processes] == [0, 0]


def test_a_process_that_fails_ends_all(processes):
    with pytest.raises(distributed.ProcessError, match=r"(?s)process 2 of 2 failed: .*is broken"):
        launch(fail_in_the_second)
    assert all(process.returncode for process in processes)


def test_interruption_ends_all(processes, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(distributed.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        launch(wait)
    assert len(processes) == 2
    assert all(process.returncode for process in processes)


def test_processes_end_with_the_one_that_started_them(tmp_path):
    code = """
from test_distributed import distributed, launch, wait
original = distributed._start
def start(*arguments):
    process = original(*arguments)
    print(process.pid, flush=True)
    return process
distributed._start = start
from rich.console import Console
launch(wait, Console())
"""
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        children = [int(parent.stdout.readline()) for _ in range(2)]
        assert parent.stdout.readline() == "waiting\n"
        parent.kill()
    deadline = time.monotonic() + TIMEOUT / 2
    while any(map(runs, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, children))


def runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_two_processes_have_the_losses_of_one(tmp_path):
    from test_training import TINY, load_split, rows_of, run

    # 45 molecules in batches of 11: one is left, and the second process has none of it. (With seed
    # 5 signs of the loss cancel in one bias' gradient, and Adam makes a step of the rounding.)
    settings = TINY.change(
        data={"molecules": 53}, training={"batch_size": 11, "seed": 1, "early_stopping": 9}
    )
    split, _ = load_split(settings)
    unknown = dict(split.train.targets)
    unknown["gap"] = np.where(np.arange(len(split.train)) % 3 == 0, np.nan, unknown["gap"])
    split = dataclasses.replace(split, train=dataclasses.replace(split.train, targets=unknown))
    assert len(split.train) % 11 == 1
    one = run(settings, tmp_path / "one", split=split)
    two = run(settings.change(training={"devices": 2}), tmp_path / "two", split=split)
    for alone, shared in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        for name in ("epoch", "step"):
            assert shared[name] == alone[name]
        for name in ("training", "validation", "mae/homo", "mae/gap", "learning_rate"):
            assert float(shared[name]) == pytest.approx(float(alone[name]), rel=1e-5), name
    for alone, shared in zip(one.errors, two.errors, strict=True):
        assert shared.geot == pytest.approx(alone.geot, rel=1e-4)
    assert two.epochs == 3
    files = [{file.name for file in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]
