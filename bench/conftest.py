"""`pytest bench/ --benchmark`: options, what they select, and the report at the end.

Without `--benchmark` each way to compute each case is run once, on a few small molecules, and
held against the formula.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import geot_kernels as gk

from . import ratios, report, rows
from .cases import all_cases
from .engine import Engine, Outcome, Settings, Unit
from .peers import OWN, functions, is_float
from .ways import MEASURED


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "geot-kernels' benchmark")
    add = group.addoption
    add("--benchmark", action="store_true", help="measure; without, each case is only checked")
    add("--quick", action="store_true", help="smaller sizes and fewer of them: about 3 minutes")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--dtype", nargs="+", help="default: float32, on a GPU also bfloat16")
    add("--case", nargs="+", metavar="NAME", help="default: all")
    add("--backend", help="of ours; default: the first that can run")
    add(
        "--rows",
        type=Path,
        metavar="FOLDER",
        help="for rows; default: bench/results/<device>[/quick]",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    options = config.option
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"torch {torch.__version__} sees no CUDA device")
    options.dtype = options.dtype or ["float32", "bfloat16"][: 1 + (options.device == "cuda")]
    try:
        for dtype in options.dtype:
            is_float(dtype)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    options.backend = options.backend or first_backend(options.device)
    unknown = set(options.case or ()) - {*all_cases(options.device), *OTHERS}
    if unknown:
        known = ", ".join([*all_cases(options.device), *OTHERS])
        raise pytest.UsageError(f"no case {', '.join(sorted(unknown))}; there are {known}")
    if hasattr(options, "benchmark_disable"):  # pytest-benchmark is installed
        options.benchmark_disable = not options.benchmark
        options.benchmark_timer = "bench.replay.now"
        options.benchmark_quiet = True  # its table has a line for each test; ours is at the end
    config.stash[TABLES] = []


OTHERS = ("scaling-n", "scaling-b", "models", "machine")
TABLES = pytest.StashKey[list[str]]()


def first_backend(device: str) -> str:
    """The backend that `geo_attention` takes there."""
    can_run = gk.available_backends(device)
    return next(name for name, reason in can_run.items() if reason is None)


def wanted(config: pytest.Config, case: str) -> bool:
    """Whether `--case` asks for a case."""
    return not config.option.case or case in config.option.case


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "unit" not in metafunc.fixturenames:
        return
    options = metafunc.config.option
    size = ("quick" if options.quick else "full") if options.benchmark else "check"
    units = [
        Unit(case.of_size(size), name, dtype)
        for key, case in all_cases(options.device).items()
        if wanted(metafunc.config, key)
        for dtype in options.dtype
        for name in MEASURED
    ]
    both = [
        pytest.param(unit, function, id=f"{unit}: {function}")
        for unit in units
        for function in functions(unit.name, options.device, options.backend)
    ]
    metafunc.parametrize(("unit", "function"), both)


class Bench:
    """What a session has measured.

    Args:
        config: Of pytest.
        asked: For each unit the functions whose tests were selected.
    """

    def __init__(self, config: pytest.Config, asked: dict[Unit, list[str]]) -> None:
        options = config.option
        self.options, self.asked = options, asked
        quick = bool(options.quick)
        settings = Settings(options.device, options.backend, quick=quick)
        if quick:
            settings.rounds, settings.unit_s, settings.stable = 9, 0.7, 0.05
        settings.compile = bool(options.benchmark)
        self.engine = Engine(settings)
        self.folder = options.rows or rows.folder(options.device, quick)
        self._done: dict[Unit, dict[str, Outcome]] = {}

    def outcome(self, unit: Unit, function: str) -> Outcome:
        """What became of a way; all ways of a unit are timed with the first that is asked for."""
        if not self.options.benchmark:
            return self.engine.check(unit, function)
        if unit not in self._done:
            self._done = {unit: self.engine.measure(unit, self.asked[unit])}
            self.add(unit.case.file or unit.case.name, self._done[unit].values())
        return self._done[unit][function]

    def add(self, file: str, outcomes: Any) -> None:
        """Writes rows: outcomes, or the rows themselves."""
        found = [x.row if isinstance(x, Outcome) else x for x in outcomes]
        rows.Rows(self.folder / f"{file}.csv").add(found)


ASKED = pytest.StashKey[dict[Unit, list[str]]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    asked: dict[Unit, list[str]] = defaultdict(list)
    for item in session.items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "unit" in parameters and isinstance(parameters["unit"], Unit):
            asked[parameters["unit"]].append(parameters["function"])
    session.config.stash[ASKED] = asked


@pytest.fixture(scope="session")
def bench(pytestconfig: pytest.Config) -> Iterator[Bench]:
    """Measures, and remembers."""
    made = Bench(pytestconfig, pytestconfig.stash[ASKED])
    yield made
    if pytestconfig.option.benchmark:
        found = ratios.read(made.folder)
        if found.rows():
            report.write(found)
            pytestconfig.stash[TABLES] = report.summary(found).splitlines()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in config.stash[TABLES]:
        terminalreporter.write_line(line)


def conclude(outcome: Outcome, function: str, benchmark: Any) -> None:
    """Fails where ours did, skips where another cannot, or replays the times."""
    from .replay import replay

    if outcome.reason and function in OWN:
        benchmark.skipped = True  # else pytest-benchmark complains that it was not used
        pytest.fail(outcome.reason, pytrace=False)
    if outcome.reason:
        pytest.skip(outcome.reason)
    benchmark.extra_info.update({n: x for n, x in outcome.row.items() if x})
    replay(benchmark, outcome.times or [0.0])
