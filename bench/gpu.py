"""Everything that a GPU must answer: `python -m bench.gpu [--seconds S]`, in 9 minutes.

From a bare checkout with torch, triton, numpy, pytest, pytest-benchmark and a compiler; nothing
is installed. In this order, each stage in processes of its own:

    build      the CUDA kernels for this GPU; beside it the tests of Triton's
    tests      the others marked gpu
    measure    limits of the machine, all cases, the most telling ones first, whole models, growth,
               then cases again with what has to be compiled
    summary    environment, tests, what failed, tables, the static report beside measured times

Rows are written as they come, to `bench/results/<device>`. When time is over, the same command
does what is missing: what has a row of the same commit is done, and tests that passed are. What
breaks the device, or ends the process, is a row that says so, and a fresh process goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from . import ratios, report, rows, static_times
from .engine import Deadline, Settings
from .plan import failures, measure

ROOT = Path(__file__).parents[1]
SECONDS = 520.0
SUMMARY_S, TESTS_S, BUILD_S, SLACK_S = 20.0, 150.0, 150.0, 20.0
SHOWN = 25  # lines
TESTS = ROOT / "tests"
RESTARTS = 10


def environment(device: str) -> list[str]:
    """Lines about the machine."""
    where = rows.where(device)
    names = ("device", "processor", "python", "torch", "triton", "cuda", "geot_kernels", "commit")
    lines = [f"{name}: {where.get(name, '')}" for name in names]
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        lines.append(f"capability {found.major}.{found.minor}, {found.total_memory / 1e9:.0f} GB")
        lines.append(f"{found.multi_processor_count} multiprocessors")
    tools = ("nvcc", "ninja", "c++", "ncu", "compute-sanitizer")
    lines.append("tools: " + ", ".join(f"{x} {'yes' if shutil.which(x) else 'no'}" for x in tools))
    return [*lines, f"system: {platform.platform()}"]


class Stage:
    """A command in a process of its own.

    Args:
        title: For the summary.
        command: To run, from the root of the project.
        seconds: After which it is ended.
        environment: Further variables.
    """

    def __init__(
        self, title: str, command: Sequence[str], seconds: float, environment: dict[str, str]
    ) -> None:
        self.title, self.end = title, time.monotonic() + seconds
        path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
        # A pipe that nobody reads would fill up.
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.lines: list[str] = []

    def wait(self) -> int:
        """The exit status; 124 where time was over."""
        try:
            status = self._process.wait(max(self.end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # what it has started, too
            self._process.wait()
            status = 124
        self._output.seek(0)
        self.lines = self._output.read().splitlines()
        self._output.close()
        print(f"== {self.title}: exit status {status}", flush=True)
        print("\n".join(self.lines[-SHOWN:]), flush=True)
        return status


def run(asked: argparse.Namespace, device: str, folder: Path) -> int:
    """All stages; 1 where something of ours failed."""
    deadline = Deadline(asked.seconds)

    def stage(title: str, *command: str, seconds: float, **variables: str) -> Stage:
        left = max(min(seconds, deadline.left() - SUMMARY_S), 1.0)
        return Stage(title, [sys.executable, "-m", *command], left, variables)

    print("\n".join(environment(device)), flush=True)
    summary: list[str] = []
    failed = False
    done = folder / f"tests-passed-{asked.commit or rows.where(device)['commit']}"
    if device == "cuda" and not asked.no_tests and not done.exists():
        for tests in build_and_test(stage):
            failed |= tests.wait() != 0
            found = [line for line in tests.lines if re.search("FAILED|ERROR", line)]
            summary += [f"{tests.title}: {line}" for line in [*found[-SHOWN:], *tests.lines[-1:]]]
        if not failed:
            folder.mkdir(parents=True, exist_ok=True)
            done.touch()
    for _ in range(RESTARTS):
        seconds = deadline.left() - SUMMARY_S
        if seconds < 2 * SLACK_S:
            break
        options = ["--measure", "--seconds", f"{seconds - SLACK_S:.0f}", *passed_on(asked)]
        measuring = stage("measure", "bench.gpu", *options, seconds=seconds)
        status = measuring.wait()
        if status in (0, 124):
            break
        failed = True
        summary.append(f"the process that measures ended with {status} and was started again")
    wrong = failures(folder, rows.where(device, asked.backend, asked.commit)["commit"])
    print("\n".join(["", "== summary", *environment(device), *summary, *wrong]), flush=True)
    try:
        print("\n".join(tables(folder)), flush=True)
    except Exception as error:  # what was measured is written, whatever happens here
        print(f"no tables: {type(error).__name__}: {error}", flush=True)
    return 1 if failed or wrong else 0


def tables(folder: Path) -> list[str]:
    """What the rows say."""
    device_rows = ratios.read(folder)
    if not device_rows.rows():
        return ["no rows"]
    report.write(device_rows)
    return [*report.summary(device_rows).splitlines(), *static_times.table(folder)]


def build_and_test(stage: Callable[..., Stage]) -> Iterator[Stage]:
    """Builds the CUDA kernels while Triton's are tested, then tests the rest."""
    parallel = ("-n", "6") if importlib.util.find_spec("xdist") else ()
    arch = ".".join(map(str, torch.cuda.get_device_capability()))
    build = stage("build", "geot_kernels", "build", seconds=BUILD_S, TORCH_CUDA_ARCH_LIST=arch)
    files = [str(x) for x in sorted(TESTS.glob("test_*.py")) if "mark.gpu" in x.read_text()]
    test = ("pytest", *files, "-m", "gpu", "-v", "--tb=line", *parallel, "-k")
    triton = stage("tests of Triton", *test, "triton", seconds=TESTS_S)
    yield build
    others = stage("other tests", *test, "not triton", seconds=TESTS_S)
    yield triton
    yield others


def passed_on(asked: argparse.Namespace) -> list[str]:
    """Options for the process that measures."""
    given = ["--device", asked.device, "--backend", asked.backend, "--dtype", *asked.dtype]
    given += ["--rows", str(asked.rows)] if asked.rows else []
    given += ["--commit", asked.commit] if asked.commit is not None else []
    return given + (["--tiny"] if asked.tiny else [])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seconds", type=float, default=SECONDS, help="after which all ends")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this command")
    add("--backend", help="of ours; default: triton")
    add("--dtype", nargs="+", default=["bfloat16", "float32"])
    add("--rows", type=Path, help="folder for rows; default: bench/results/<device>")
    add("--no-tests", action="store_true", help="build and test nothing")
    add("--commit", help="for the rows, where there is no git")
    add("--measure", action="store_true", help=argparse.SUPPRESS)
    add("--tiny", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device")
    asked.backend = asked.backend or {"cuda": "triton", "cpu": "cpu"}[asked.device]
    folder = asked.rows or rows.folder(asked.device)
    if not asked.measure:
        return run(asked, asked.device, folder)
    settings = Settings(asked.device, asked.backend, commit=asked.commit)
    if asked.tiny:
        settings = replace(settings, rounds=2, unit_s=0.1, compile=False)
    elif asked.device == "cuda":
        settings = replace(settings, unit_s=2.5)
    size = "check" if asked.tiny else "full"
    return measure(settings, folder, asked.seconds, asked.dtype, size)


if __name__ == "__main__":
    raise SystemExit(main())
