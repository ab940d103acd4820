"""How time and memory grow with the atoms of a molecule, and with the number of molecules.

    scaling-n    one molecule of 64 to 16384 atoms
    scaling-b    1 to 1024 molecules of 32 atoms

Bias and softmax, 8 heads of 32 channels, 64 Gaussians, table given. Before ours is timed, the
results of some query atoms are held against the formula in float64 (`check_rows`), and all of its
results against eager PyTorch's, where that fits into memory and is not itself of 16 bits.

Memory is that beyond inputs, outputs and gradients, for growth with N alone. On a CPU it is
resident memory, of a process for each number: `python -m bench.scaling N PASS FUNCTION`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from geot_kernels.reference import distances

from . import memory, rows, timing
from .engine import least_work, reason_of, release
from .peers import OURS, PEERS, is_float
from .problems import BiasProblem, own_table
from .ways import Results, Way, budgets, closest, errors, refuse_wrong, verdict

HEADS, DIM, GAUSSIANS, SMALL = 8, 32, 64, 32
FUNCTIONS = dict.fromkeys(("forward", "backward+table"), (OURS, "plain", "eager"))
FUNCTIONS["force_step"] = (OURS, "eager")
ROUNDS, FEW = 25, 3  # numbers of each way
# What eager PyTorch holds at its peak, in arrays [B, N, N, K] of float32; found at N = 1024.
EAGER_ARRAYS = {"forward": 2.5, "backward+table": 5.5, "force_step": 8.0}
EAGER_GB = {False: 6.0, True: 1.0}  # that it may take on a CPU; quick
GPU_SHARE = 0.6  # of the memory that is free
RESIDENT_FROM = 1024  # atoms; what fewer of them take drowns among the pages of a process
QUICKLY = (("backward+table", OURS), ("backward+table", "eager"))  # in a quick run, on a CPU
CHECKED = 16  # query atoms of each molecule

Row = dict[str, str]


def sizes_n(device: str, quick: bool = False) -> list[int]:
    """Atoms of the one molecule; the same on every device."""
    return [2**n for n in range(6, 12 if quick else 15)]


def sizes_b(device: str, quick: bool = False) -> list[int]:
    """Molecules of 32 atoms; the same on every device."""
    return [2**n for n in range(7 if quick else 11)]


def measure_n(
    device: str, backend: str, quick: bool = False, dtype: str = "float32", seconds: float = 10.0
) -> Iterator[list[Row]]:
    """Rows of each size and pass, as they come; about so many seconds time the ways of one."""
    for atoms in sizes_n(device, quick):
        yield from Size("scaling-n", 1, atoms, device, backend, dtype, quick, seconds).measure()


def measure_b(
    device: str, backend: str, quick: bool = False, dtype: str = "float32", seconds: float = 10.0
) -> Iterator[list[Row]]:
    """The same for many small molecules."""
    for molecules in sizes_b(device, quick):
        size = Size("scaling-b", molecules, SMALL, device, backend, dtype, quick, seconds)
        yield from size.measure()


@dataclass(frozen=True)
class Size:
    """One problem, all of whose ways are timed in turn, pass by pass."""

    case: str
    molecules: int
    atoms: int
    device: str
    backend: str
    dtype: str
    quick: bool = False
    seconds: float = 10.0

    def measure(self) -> Iterator[list[Row]]:
        """The rows of each pass."""
        release(self.device)
        problem = self.problem()
        for name, functions in FUNCTIONS.items():
            found: dict[str, Row] = {function: {"reason": ""} for function in functions}
            found["eager"]["reason"] = self.too_large(name)
            self._measure(problem, name, found)
            yield [{**self._columns(name), "function": n, **row} for n, row in found.items()]
            release(self.device)

    def problem(self) -> BiasProblem:
        """The tensors."""
        shape = self.molecules, self.atoms, HEADS, DIM, GAUSSIANS
        return BiasProblem(*shape, device=self.device, dtype=is_float(self.dtype))

    def too_large(self, name: str) -> str:
        """Why eager PyTorch is not tried; "" where it is."""
        needed = self.molecules * self.atoms**2 * GAUSSIANS * 4 * EAGER_ARRAYS[name] / 1e9
        limit = EAGER_GB[self.quick]
        if self.device == "cuda":
            limit = GPU_SHARE * torch.cuda.mem_get_info()[0] / 1e9
        return f"would need about {needed:.3g} GB" if needed > limit else ""

    def _columns(self, name: str) -> Row:
        """All columns; those that are not yet known are empty."""
        row = dict.fromkeys(rows.COLUMNS, "") | rows.where(self.device, self.backend)
        row |= {"case": self.case, "pass": name, "dtype": self.dtype, "mode": "eager"}
        sizes = {"molecules": self.molecules, "atoms": self.atoms, "mean_atoms": self.atoms}
        sizes |= {"heads": HEADS, "head_dim": DIM, "gaussians": GAUSSIANS}
        return row | {column: str(value) for column, value in sizes.items()}

    def _measure(self, problem: BiasProblem, name: str, found: dict[str, Row]) -> None:
        """Checks what can run, and times it; the rest gets a reason."""
        calls: timing.Functions = {}
        results: dict[str, Results] = {}
        seconds = 0.0
        for function in reversed(found):  # ours last: it is held against eager
            if found[function]["reason"]:
                continue
            try:
                way = PEERS[function].make(problem, name, self.backend).prepare(name)
                call, start = way.call(name), time.perf_counter()
                results[function] = way.named(name, call())
                self._wait()
                if self.device == "cuda":  # the first one has compiled
                    start = time.perf_counter()
                    call()
                    self._wait()
                seconds += time.perf_counter() - start
                if function == OURS:
                    found[OURS] |= least_work(problem, name)
                    found[OURS] |= check(problem, self.backend, name, results)
                found[function] |= self._memory(way, name, function)
                calls[function] = call
            except Exception as error:
                found[function]["reason"] = reason_of(error)
                error.__traceback__ = None  # which holds tensors
        results.clear()
        self._time({name: calls[name] for name in found if name in calls}, seconds, found)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _memory(self, way: Way, name: str, function: str) -> Row:
        if self.case != "scaling-n":
            return {}
        if self.device == "cuda":
            peak, extra = memory.of_a_pass(way, name)
            return {"peak_memory_mb": f"{peak:.1f}", "extra_memory_mb": f"{extra:.1f}"}
        if self.atoms < RESIDENT_FROM or (self.quick and (name, function) not in QUICKLY):
            return {}
        extra = in_a_process(self.atoms, name, function, self.backend, self.dtype)
        return {"extra_memory_mb": f"{extra:.1f}"}

    def _time(self, calls: timing.Functions, seconds: float, found: dict[str, Row]) -> None:
        """Times calls in turn, which took that many seconds when each was made once."""
        if not calls:
            return
        others = timing.watch()
        times = self._times(calls, seconds, timing.stopwatch(self.device))
        busy = others()
        wall_us = timing.wall_us(time.perf_counter, self._wait)
        for function, values in times.items():
            cuda = self.device == "cuda"
            walls = [wall_us(calls[function], 1) for _ in range(FEW)] if cuda else values
            wall_ms = rows.quartiles(walls)[1] / 1e3
            found[function] |= rows.numbers(values)
            found[function] |= {"wall_ms": f"{wall_ms:.4g}", "other_cores": busy}

    def _times(
        self, calls: timing.Functions, seconds: float, stopwatch: timing.Stopwatch
    ) -> timing.Times:
        """Where there is no time to be thorough, just so many rounds as there is time for."""
        if seconds * (timing.WARM_UP + 2 * timing.FEWEST) < self.seconds:
            limits = {"at_most_s": self.seconds, "stable": timing.STABLE}
            return timing.interleaved(calls, ROUNDS, measure=stopwatch, **limits)
        times: timing.Times = {function: [] for function in calls}
        for _ in range(max(int(self.seconds / seconds), FEW)):
            for function, call in calls.items():
                times[function].append(stopwatch(call, 1))
        return times


# What is right.


def check(problem: BiasProblem, backend: str, name: str, results: dict[str, Results]) -> Row:
    """Columns: which result of ours comes closest to its budget.

    Raises:
        ArithmeticError: One is beyond it.
    """
    some, allowed = check_rows(problem, backend, name)
    found = list(some.items())
    if "eager" in results and problem.cotangent.dtype.itemsize >= 4:
        found += errors(results[OURS], results["eager"]).items()
    worst = closest(found, allowed)
    refuse_wrong(*worst)
    return verdict(*worst)


def check_rows(
    problem: BiasProblem, backend: str, name: str, count: int = CHECKED
) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of a pass of which some query atoms alone have a cotangent, and their budgets.

    The formula for all atoms would not fit into memory. What it loses in the dtype of the features
    is what a budget is made of (`bench.ways.budgets`).
    """
    chosen = torch.randperm(problem.positions.shape[1])[:count].to(problem.positions.device)
    ours = problem.ours(backend)
    every = ours.function
    ours.function = lambda *inputs: every(*inputs)[:, chosen]
    ours.cotangent = ours.cotangent[:, chosen]
    dtype = ours.cotangent.dtype
    ways = ours, rows_of(problem, chosen, dtype), rows_of(problem, chosen, torch.float64)
    got, rounded, exact = (way.prepare(name).named(name, way.call(name)()) for way in ways)
    return errors(got, exact), budgets(name, errors(rounded, exact), dtype)


def rows_of(problem: BiasProblem, chosen: Tensor, dtype: torch.dtype) -> Way:
    """The formula for some query atoms, geometry in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    table = own_table(problem.table, wide)

    def some(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        f = table(distances(x[:, chosen], x)).to(q.dtype)  # [B, rows, N, H]
        q, k, v = q[:, chosen].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scores = q @ k.mT * q.shape[-1] ** -0.5 + f.permute(0, 3, 1, 2)  # [B, H, rows, N]
        return (scores.softmax(-1) @ v).transpose(1, 2)

    inputs = [x.detach().to(dtype, copy=True) for x in problem.features]
    inputs.append(problem.positions.detach().to(wide, copy=True))
    return Way(
        some, inputs, problem.cotangent[:, chosen].to(dtype), [table.knots], names=("knots",)
    )


# Memory of a process of its own.


def in_a_process(
    atoms: int, name: str, function: str = OURS, backend: str = "cpu", dtype: str = "float32"
) -> float:
    """Memory of a pass on the CPU beyond inputs, outputs and gradients, in a fresh process: MB."""
    asked = (str(atoms), name, function, backend, dtype, str(torch.get_num_threads()))
    command, root = [sys.executable, "-m", "bench.scaling", *asked], Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the memory of a pass beyond inputs, outputs and gradients, MB."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("atoms", type=int)
    parser.add_argument("name", metavar="pass", choices=FUNCTIONS)
    parser.add_argument("function", choices=PEERS)
    for name, default in (("backend", "cpu"), ("dtype", "float32"), ("threads", "2")):
        parser.add_argument(name, nargs="?", default=default)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(int(asked.threads))
    for atoms in (64, asked.atoms):  # the first one brings libraries and threads
        problem = Size("scaling-n", 1, atoms, "cpu", asked.backend, asked.dtype).problem()
        way = PEERS[asked.function].make(problem, asked.name, asked.backend).prepare(asked.name)
        if atoms == 64:
            way.call(asked.name)()
    print(memory.of_a_pass(way, asked.name)[1])


if __name__ == "__main__":
    main()
