"""Speed and memory of the C++ kernels on a CPU: `python -m bench.cpu [--case NAME ...]`.

Each line compares two functions that were timed in turn in this process, in float32: medians,
with quartiles, of `--rounds` numbers each. Before that, both computed the same, within the
budgets of `bench.ways`. `--out` writes the times as rows; ratios are computed from them.

    forward    bias+softmax, table given, against attention without geometry and compiled eager
    backward   the same with gradients of q, k, v, positions and the Gaussians' weights
    forces     a step of training on energies and forces, against forward+backward and eager
    geot       filter+linear at GeoT's size, against eager and compiled eager
    large      one molecule of 8192 atoms: memory, and time against that of 4096
    small      one molecule of 9 atoms, with one thread and with two
    demo       filter+linear at the size of `make demo`, against plain PyTorch in the operators

"plain" is `scaled_dot_product_attention` of contiguous `[B, H, N, D]` without bias or mask.
"eager" is distances, 64 Gaussians (GeoT: 300, and a network), bias or filter, all in memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import geot_kernels as gk
from geot_kernels import reference

from . import memory
from .problems import BiasProblem, FilterProblem
from .timing import Functions, Goal, Report
from .ways import BUDGET, check, relative_error

ROUNDS, THREADS = 25, 2
ATOMS, EXTRA_MB, NOISE = 8192, 200.0, 1.1

Shape = tuple[int, int]  # B, N
FORWARD = {(64, 32): 0.5, (32, 64): 0.6, (8, 128): 0.75, (1, 512): 1.2}
BACKWARD = {(64, 32): (0.6, 5.0), (32, 64): (0.7, 8.0), (8, 128): (0.8, 8.0), (1, 512): (1.3, 8.0)}


def forward(report: Report, goals: dict[Shape, float] = FORWARD) -> None:
    """Bias and softmax, H = 8, D = 32, without gradient."""
    for (batch, atoms), at_most in goals.items():
        problem = BiasProblem(batch, atoms)
        ours, compiled = problem.ours(), problem.compiled()
        for other in (problem.eager(), compiled):
            check(ours, other, ["forward"])
        functions: Functions = {
            "ours": ours.forward,
            "plain": problem.plain().forward,
            "compiled eager": compiled.forward,
        }
        report.measure(
            f"forward, bias+softmax, B={batch} N={atoms} H=8 D=32",
            functions,
            [
                Goal("ours", "plain", at_most=at_most),
                Goal("ours", "compiled eager", at_least=8),
            ],
        )


def backward(report: Report, goals: dict[Shape, tuple[float, float]] = BACKWARD) -> None:
    """The same with all gradients, from the Gaussians' weights on."""
    for (batch, atoms), (at_most, at_least) in goals.items():
        problem = BiasProblem(batch, atoms)
        ours, compiled = problem.ours_building_the_table(), problem.compiled()
        for other in (problem.eager(), compiled):
            check(ours, other, ["forward", "backward"])
        functions: Functions = {
            "ours with table": ours.backward,
            "plain": problem.plain().backward,
            "compiled eager": compiled.backward,
        }
        report.measure(
            f"forward+backward, bias+softmax, B={batch} N={atoms} H=8 D=32",
            functions,
            [
                Goal("ours with table", "plain", at_most=at_most),
                Goal("ours with table", "compiled eager", at_least=at_least),
            ],
        )


def forces(report: Report, shapes: tuple[Shape, ...] = tuple(FORWARD)) -> None:
    """Forward, backward and second backward of one layer, from the Gaussians' weights on."""
    for batch, atoms in shapes:
        problem = BiasProblem(batch, atoms)
        ours, math = problem.ours_building_the_table(), problem.math()
        check(ours, math, ["forward", "backward", "force_step"])
        functions: Functions = {
            "ours": ours.force_step,
            "our forward+backward": ours.backward,
            "eager MATH": math.force_step,
        }
        report.measure(
            f"energies and forces, bias+softmax, B={batch} N={atoms} H=8 D=32",
            functions,
            [
                Goal("ours", "our forward+backward", at_most=3),
                Goal("ours", "eager MATH", at_least=8),
            ],
        )


def geot(report: Report) -> None:
    """Filter and linear at the published size, 32 molecules of QM9 padded to 32 atoms."""
    problem = FilterProblem.geot()
    given, built = problem.ours(), problem.ours_building_the_table()
    eager, compiled = problem.eager(), problem.compiled()
    check(given, compiled, ["forward"], problem.mask)
    check(built, eager, ["forward", "backward"], problem.mask)
    size = f"filter+linear, B=32 N=32 of {problem.mask.sum() / 32:.1f} real atoms H=64 D=16"
    report.measure(
        f"forward, {size}",
        {"ours": given.forward, "eager": eager.forward, "compiled eager": compiled.forward},
        [
            Goal("ours", "eager", at_least=250),
            Goal("ours", "compiled eager", at_least=80),
        ],
    )

    def tabulate() -> gk.RadialTable:
        with torch.no_grad():
            return problem.build()

    parameters, d_knots = built.parameters, torch.randn_like(problem.table.knots)
    table, both = "tabulate, 512 knots, forward", "tabulate, 512 knots, forward+backward"
    functions: Functions = {
        "ours": given.backward,
        "ours with table": built.backward,
        "eager": eager.backward,
        table: tabulate,
        both: lambda: torch.autograd.grad(problem.build().knots, parameters, d_knots),
    }
    report.measure(
        f"forward+backward, {size}",
        functions,
        [
            Goal("ours", "eager", at_least=100),
            Goal("ours with table", "eager"),
            Goal(table, "ours", at_most=2),
            Goal(both, "ours", at_most=2),
        ],
    )


def large(report: Report, atoms: int = ATOMS) -> None:
    """One molecule, forward+backward, table given: memory, and how time grows with N."""
    functions: Functions = {}
    for number in (atoms, atoms // 2):
        problem = BiasProblem(1, number)
        check_rows(problem)
        functions[f"N={number}"] = problem.ours().backward
    case = "forward+backward, bias+softmax, B=1 H=8 D=32"
    extra = memory.in_a_process(atoms)
    report.memory(f"{case}, beyond inputs, outputs and gradients", f"N={atoms}", extra, EXTRA_MB)
    note = " (4 and 10 % for noise)"
    goal = Goal(f"N={atoms}", f"N={atoms // 2}", at_most=4 * NOISE, note=note)
    report.measure(f"{case}, large", functions, [goal])


def check_rows(problem: BiasProblem, rows: int = 16) -> None:
    """Holds output and gradients of some rows against the formula: all rows would not fit."""
    ours = problem.ours()
    chosen = torch.randperm(problem.positions.shape[1])[:rows]
    leaves = [*ours.inputs, *ours.parameters]
    table = gk.RadialTable(leaves[4], problem.table.r_min, problem.table.r_max)

    def some(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        f = table(reference.distances(x[:, chosen], x))  # [1, rows, N, H]
        s = reference.scores(q[:, chosen], k, f, "bias", q.shape[-1] ** -0.5)
        return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v)

    results = []
    for out in (ours.function(*ours.inputs)[:, chosen], some(*ours.inputs)):
        results.append([out, *torch.autograd.grad(out, leaves, ours.cotangent[:, chosen])])
    for number, (got, expected) in enumerate(zip(*results, strict=True)):
        error = relative_error(got, expected)
        if not error <= BUDGET["gradient" if number else "out"]:
            raise RuntimeError(f"rows of a large molecule, result {number}: error {error:.1e}")


def small(report: Report) -> None:
    """One molecule of 9 atoms, table given: what a call costs."""
    problem = BiasProblem(1, 9)
    check(problem.ours(), problem.ours("reference"), ["forward", "backward"])
    q, k, v = problem.features
    plain = [x.transpose(1, 2).contiguous() for x in problem.features]
    positions = problem.positions.clone().requires_grad_()

    def energy_and_forces() -> tuple[Tensor, Tensor]:
        out = gk.geo_attention(q, k, v, positions, problem.table, backend="cpu")
        energy = (out * problem.cotangent).sum()
        return energy, torch.autograd.grad(energy, positions)[0].neg()

    functions: Functions = {
        "ours, forward": lambda: gk.geo_attention(
            q, k, v, problem.positions, problem.table, backend="cpu"
        ),
        "ours, energy and forces": energy_and_forces,
        "plain, forward": lambda: torch.nn.functional.scaled_dot_product_attention(*plain),
    }
    goals = [
        Goal("ours, forward", at_most=40),
        Goal("ours, forward", "plain, forward"),
        Goal("ours, energy and forces", at_most=200),
    ]
    threads = torch.get_num_threads()
    for number in sorted({1, threads}):
        torch.set_num_threads(number)
        report.measure(
            f"small calls, bias+softmax, B=1 N=9 H=8 D=32, threads: {number}", functions, goals
        )
    torch.set_num_threads(threads)


def demo(report: Report) -> None:
    """Filter and linear at the size of `make demo`, against the backend `eager`."""
    problem = FilterProblem.demo()
    ours, eager = problem.ours(), problem.ours("eager")
    check(ours, eager, ["forward", "backward"], problem.mask)
    size = "filter+linear, B=32 N=18 H=4 D=16"
    goals = [Goal("ours", "backend eager")]
    for name, one, other in (
        ("forward", ours.forward, eager.forward),
        ("forward+backward", ours.backward, eager.backward),
    ):
        report.measure(f"{name}, {size}", {"ours": one, "backend eager": other}, goals)


CASES = {
    "forward": forward,
    "backward": backward,
    "forces": forces,
    "geot": geot,
    "large": large,
    "small": small,
    "demo": demo,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the lines of the cases asked for, and writes their rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    report = Report(chosen.rounds)
    for name in chosen.case:
        CASES[name](report)
    if chosen.out is not None:
        report.write(chosen.out)


if __name__ == "__main__":
    main()
