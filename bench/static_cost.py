"""What kernels cost, read from their machine code: no GPU needed (python -m bench.static_cost).

For every loop over tiles: clocks of each pipe of a multiprocessor and warp instructions by kind,
for 64 x 64 pairs of one head; the pipe that binds; registers, spills, shared memory; and the
busiest pipe against flash attention without geometry, compiled the same way. A model
(bench/sass.py says which), so good for comparing two versions of a kernel, not for a time.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import plain_triton
from bench.offline import Launch, Resources, offline_gpu, resources, sass
from bench.sass import FP32_OPERANDS, KINDS, PIPES, Cost, Loop, Mark, cost, flat, loops, parse
from bench.triton_costs import bias_cases

TILE = 64 * 64  # pairs
BINDING = tuple(pipe for pipe in PIPES if pipe not in {"shared", "l1"})  # both are in "memory"
ROWS_ADD = 0.3  # at most: rows need exponentials too, not pairs alone
SHARED_KIB = {80: 164, 90: 228, 100: 228}  # of a multiprocessor


@dataclass(frozen=True)
class Case:
    """One pass to look at.

    Attributes:
        name: Unique.
        launch: Launches the kernels, under `offline_gpu`.
        pairs: Pairs, times heads, that one program works through in one round of the innermost
            loop as written; a tuple for nested loops: innermost first, then what encloses it.
            Rounds that ptxas put into one are noticed by `per_pair`.
        kernels: Names of the kernels that count; their clocks are added.
        plain: Name of the case to compare with; "" for none.
        per_pair: What each pair needs exactly once or so, to count the pairs of a round: an
            opcode up to some dot and how many of it, or "macs" and how many multiply-adds.
        marks: Memory instructions that are not coalesced.
        take: Which loops count, numbered by address, inner ones too; None: all.
        whole: The kernel has no loop over tiles: all of it is one round.
    """

    name: str
    launch: Callable[[], Any]
    pairs: int | tuple[int, ...]
    kernels: tuple[str, ...]
    plain: str = ""
    per_pair: tuple[str, float] = ("MUFU.EX2", 1.0)
    marks: tuple[Mark, ...] = ()
    take: tuple[int, ...] | None = None
    whole: bool = False


@dataclass
class Work:
    """What a loop, or several, cost for one tile of pairs: all warps of a program together.

    Attributes:
        clocks: Of a multiprocessor, by pipe.
        kinds: Warp instructions, by kind.
        conditional: Warp instructions among them that a round may leave out.
        unknown: Opcodes whose cost is not known.
    """

    clocks: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PIPES, 0.0))
    kinds: Counter[str] = field(default_factory=Counter)
    conditional: float = 0.0
    unknown: Counter[str] = field(default_factory=Counter)

    def add(self, other: Work) -> None:
        for pipe, clocks in other.clocks.items():
            self.clocks[pipe] += clocks
        self.kinds.update(other.kinds)
        self.unknown.update(other.unknown)
        self.conditional += other.conditional

    @property
    def binding(self) -> str:
        return max(BINDING, key=lambda pipe: self.clocks[pipe])

    @property
    def busiest(self) -> float:
        return self.clocks[self.binding]


@dataclass
class Row:
    """One loop of a kernel, or the sum of them where there are several.

    Attributes:
        label: Which loop: its address, and how many rounds ptxas made one.
        programs: That fit on a multiprocessor.
    """

    case: str
    kernel: str
    label: str
    needs: Resources
    programs: int
    work: Work


def measure(case: Case, capability: int = 90) -> list[list[Row]]:
    """The loops of each kernel of a case; the last row of a kernel is the sum of its loops.

    Raises:
        ValueError: where a kernel was not launched, where what a loop holds does not fit to the
            pairs that the case says, or where a mark means no instruction of the loops.
    """
    with offline_gpu(capability) as launches:
        case.launch()
    found = [_find(case, name, launches) for name in case.kernels]
    code = [x for launch in found for _, loop in _rounds(case, launch) for x in loop.own]
    for mark in case.marks:
        if not any(mark.covers(x) for x in code):
            raise ValueError(f"{case.name}: no memory instruction in its loops is meant by {mark}")
    return [_kernel_rows(case, launch, capability) for launch in found]


def busiest(kernels: Iterable[Sequence[Row]]) -> float:
    """Clocks of the binding pipes for one tile; kernels follow each other, so they add up."""
    return sum(rows[-1].work.busiest for rows in kernels)


def _find(case: Case, name: str, launches: Sequence[Launch]) -> Launch:
    found = {launch.compiled.hash: launch for launch in launches if launch.name == name}
    if len(found) != 1:
        seen = sorted({launch.name for launch in launches})
        raise ValueError(f"{case.name}: {len(found)} variants of {name} among launches of {seen}")
    return next(iter(found.values()))


def _kernel_rows(case: Case, launch: Launch, capability: int) -> list[Row]:
    needs = resources(launch.compiled)
    programs = _programs(needs, launch.num_warps, capability)

    def row(label: str, work: Work) -> Row:
        return Row(case.name, launch.name, label, needs, programs, work)

    total, rows = Work(), []
    for height, loop in _rounds(case, launch):
        one = cost(loop.own, capability=capability, marks=case.marks)
        pairs, label = _pairs(case, launch, height, loop, one)
        work = _scaled(one, loop, launch.num_warps * TILE / pairs)
        total.add(work)
        rows.append(row(label, work))
    return rows if len(rows) == 1 else [*rows, row("sum", total)]


def _rounds(case: Case, launch: Launch) -> list[tuple[int, Loop]]:
    """The loops that count, each with its height."""
    code = parse(sass(launch.compiled))
    if case.whole:
        return [(0, Loop(code, {x.address for x in code}))]
    found = flat(loops(code))
    if case.take is not None:
        found = [found[number] for number in case.take]
    if not found:
        raise ValueError(f"{case.name}: {launch.name} has no loop; say whole=True, if that is so")
    return found


def _pairs(case: Case, launch: Launch, height: int, loop: Loop, one: Cost) -> tuple[int, str]:
    """Pairs of one round of a loop of the machine code, and what the loop is called."""
    known = case.pairs if isinstance(case.pairs, tuple) else (case.pairs,)
    where = f"{case.name}: loop of {launch.name} at {loop.start:#x}"
    if height >= len(known):
        raise ValueError(f"{where} encloses {height} others: how many pairs has its round?")
    if height:
        return known[height], f"{loop.start:#x}, outer"
    what, per_pair = case.per_pair
    number = one.macs if what == "macs" else 32 * _count(one, what)
    counted = number * launch.num_warps / (known[0] * per_pair)
    rounds = 2 ** int(math.log2(max(counted, 1) * 1.05))  # ptxas unrolls by powers of two
    if not 0.95 <= counted / rounds <= 1 + ROWS_ADD:
        raise ValueError(f"{where} holds {what} for {counted:.3g} rounds of {known[0]} pairs")
    return known[0] * rounds, f"{loop.start:#x}" + f", {rounds} rounds" * (rounds > 1)


def _count(one: Cost, opcode: str) -> int:
    return sum(n for name, n in one.opcodes.items() if f"{name}.".startswith(f"{opcode}."))


def _scaled(one: Cost, loop: Loop, factor: float) -> Work:
    return Work(
        {pipe: clocks * factor for pipe, clocks in one.pipes.items()},
        Counter({kind: number * factor for kind, number in one.kinds.items()}),
        loop.conditional * factor,
        one.unknown,
    )


def _programs(needs: Resources, num_warps: int, capability: int) -> int:
    """Programs that fit on a multiprocessor: by warps, registers (in eights) and shared memory."""
    warp_registers = 32 * -(-needs.registers // 8) * 8
    by_shared = SHARED_KIB[capability] * 1024 // (needs.shared + 1024)  # 1 KiB is the system's
    return min(32, 64 // num_warps, 65536 // (warp_registers * num_warps), by_shared)


def _plain(kind: str, numbers: str, dim: int) -> Case:
    """Plain flash attention: pass, numbers, head dimension."""
    dtype, options = NUMBERS[numbers]
    q = torch.zeros(1, 256, 2, dim, dtype=dtype)
    lse = torch.zeros(1, 2, 256)

    def forward() -> None:
        plain_triton.forward(q, q, q, kappa=0.3, **options)

    def backward() -> None:
        plain_triton.backward(q, q, q, q, lse, q, kappa=0.3, **options)

    marks = []
    if kind == "backward":  # eight threads read each row's number at once: one wavefront, one line
        marks.append(Mark(plain_triton._load_row_scalars, {32: 1, 64: 1, 128: 1}))
    if options.get("precision") == "ieee":
        marks.append(Mark("", FP32_OPERANDS, "LDS"))
    launch, kernels = {
        "forward": (forward, ("_plain_fwd_kernel",)),
        "backward": (backward, ("_plain_dq_kernel", "_plain_dkv_kernel")),
    }[kind]
    # In full float32 a thread holds eight rows, and rescaling costs each an exponential more.
    return Case(plain_name(kind, numbers, dim), launch, TILE, kernels, marks=tuple(marks))


def plain_name(kind: str, numbers: str, dim: int) -> str:
    """Name of a plain case: "forward" or "backward", a key of `NUMBERS`, head dimension."""
    return f"plain {kind} {numbers} D={dim}"


NUMBERS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "bf16": (torch.bfloat16, {}),
    "fp16": (torch.float16, {}),
    "tf32": (torch.float32, {"precision": "tf32"}),
    "fp32": (torch.float32, {"precision": "ieee"}),
}
PLAIN = [
    _plain(kind, numbers, dim)
    for numbers in NUMBERS
    for dim in (16, 32)
    for kind in ("forward", "backward")
]


def _geometry() -> list[Case]:
    """The kernels that this project is about, each beside its plain counterpart."""
    cases = []
    for numbers, sizes in (("bf16", (16, 32, 64, 128, 512)), ("fp32", (64,))):
        for atoms in sizes:
            for name, launch, pairs, kernel, plain, marks in bias_cases(atoms, numbers):
                other = plain_name(plain, numbers, 32) if plain else ""
                if numbers == "fp32":
                    marks = (*marks, Mark("", FP32_OPERANDS, "LDS"))
                kernels = (f"_attention_{kernel}_kernel",)
                cases.append(Case(name, launch, pairs, kernels, other, marks=marks))
    return cases


GEOMETRY = _geometry()


def report(cases: Sequence[Case], capability: int = 90) -> str:
    """Tables of clocks and of instructions, in Markdown."""
    known = {case.name: case for case in [*PLAIN, *cases]}
    measured: dict[str, list[list[Row]]] = {}
    for case in cases:
        for name in filter(None, (case.plain, case.name)):
            if name not in measured:
                measured[name] = measure(known[name], capability)
    clocks, instructions = [], []
    for case in cases:
        rows = [row for kernel in measured[case.name] for row in kernel]
        clocks += [[*_head(row), *_clocks(row)] for row in rows]
        instructions += [[*_head(row), *_instructions(row)] for row in rows]
        clocks[-1][-1] = _ratio(case, measured)
    columns = ["registers", "spilled, B", "shared, KiB", "programs", *PIPES, "binds", "x plain"]
    return "\n".join(
        [
            f"Capability {capability}; for 64 x 64 pairs of one head, on one multiprocessor.\n",
            "Clocks of each pipe (memory = shared + l1; see bench/sass.py):\n",
            _table(["case", "kernel", "loop", *columns], clocks),
            "\nWarp instructions:\n",
            _table(["case", "kernel", "loop", "all", "may skip", *KINDS, "unknown"], instructions),
        ]
    )


def _head(row: Row) -> list[str]:
    return [row.case, row.kernel, row.label]


def _clocks(row: Row) -> list[str]:
    needs = row.needs
    spilled = f"{needs.spill_stores} + {needs.spill_loads}"
    shown = [str(needs.registers), spilled, f"{needs.shared / 1024:.1f}", str(row.programs)]
    return [*shown, *(f"{row.work.clocks[pipe]:.0f}" for pipe in PIPES), row.work.binding, ""]


def _instructions(row: Row) -> list[str]:
    kinds, unknown = row.work.kinds, row.work.unknown
    numbers = [sum(kinds.values()), row.work.conditional, *(kinds[kind] for kind in KINDS)]
    return [*(f"{number:.0f}" for number in numbers), " ".join(sorted(unknown))]


def _ratio(case: Case, measured: dict[str, list[list[Row]]]) -> str:
    if not case.plain:
        return ""
    return f"{busiest(measured[case.name]) / busiest(measured[case.plain]):.2f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the report; `--markdown FILE` also writes it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--capability", type=int, default=90, choices=(80, 90, 100))
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    cases = [case for case in [*PLAIN, *GEOMETRY] if options.case in case.name]
    if not cases:
        parser.error(f"no case is called like {options.case!r}")
    text = report(cases, options.capability)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
