"""Machine code of NVIDIA GPUs, read: instructions, loops, and the clocks that each pipe needs.

A model, not a measurement: every pipe on its own, without latencies and without the stalls between
dependent instructions. What a multiprocessor needs at least is the largest of these numbers.
"""

from __future__ import annotations

import linecache
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# Opcodes up to their first dot, kind for counting, pipe; the first row that matches wins.
# Sources: CUDA C++ Programming Guide, "Arithmetic Instructions" (results a clock and
# multiprocessor); Nsight Compute's Profiling Guide, "Pipelines"; NVIDIA's engineers in its forum
# (thread 302018) on GH100: FMAheavy takes IMAD, IDP and FP32, FMAlite FP32 only, packed 16-bit
# operations take both.
# Sure: FFMA, FADD, FMUL, IMAD, MUFU, I2F, F2I, IADD3, LOP3, SHF, the memory instructions.
# Likely: FMNMX, FSEL, FSETP, ISETP, SEL, PRMT, LEA, MOV, VIADD on the ALU.
# A guess: F2FP, I2FP at the ALU's rate (the guide gives most conversions 64 a clock; that F2F,
# F2I, I2F remain on the 16-wide unit is older knowledge), FRND, POPC, FLO on it, REDUX like SHFL,
# FFMA2 of capability 100 at the price of FFMA.
# Not modelled: LDTM, STTM (tensor memory of capability 100), the time that TMA takes.
# Uniform instructions (U...) take issue slots here and no pipe, barriers and branches likewise.
TABLE: tuple[tuple[str, str, str], ...] = (
    ("[HQIBD]GMMA|[HIDQBO]MMA|UTC[A-Z0-9]*MMA", "tensor", "tensor"),
    ("MUFU", "mufu", "xu"),
    ("I2FP|F2FP|F2IP|I2IP", "convert", "alu"),
    ("I2F|F2I|F2F|FRND|I2I", "convert", "xu"),
    ("FFMA2?|FMUL2?|FADD2?|FFMA32I|FMUL32I|FADD32I", "fp32", "fma"),
    ("HFMA2|HADD2|HMUL2", "fp16", "fma"),
    ("FMNMX3?|FSETP|FSET|FSEL|FCHK|HMNMX2|HSETP2|HSET2|VHMNMX", "fp32", "alu"),
    ("DADD|DFMA|DMUL|DSETP", "fp64", "fp64"),
    ("IMAD|IDP4?A?|IMUL", "integer", "imad"),
    ("POPC|FLO|BREV", "integer", "xu"),
    ("IADD|IADD3|IADD32I|ISETP|ISET|LOP3|LOP|SHF|SHL|SHR|LEA|IABS|IMNMX|ISCADD", "integer", "alu"),
    ("VIADD|VIMNMX3?|VIADDMNMX|VABSDIFF4?|SGXT|BMSK|PLOP3|P2R|R2P", "integer", "alu"),
    ("MOV|MOV32I|SEL|PRMT|VOTE", "integer", "alu"),
    ("LDL|STL", "local", "global"),
    ("LDGSTS", "global", "copy"),
    ("LDG|LD|STG|ST|RED|ATOM|ATOMG|REDG", "global", "global"),
    ("LDS|STS|LDSM|STSM|ATOMS", "shared", "shared"),
    ("SHFL|REDUX|CREDUX", "shuffle", "shuffle"),
    (
        "BAR|DEPBAR|LDGDEPBAR|WARPSYNC|WARPGROUP|MEMBAR|FENCE|SYNCS|ARRIVES|ERRBAR|CGAERRBAR",
        "barrier",
        "",
    ),
    ("CCTL|CCTLL|WARPGROUPSET|ELECT|UTMA[A-Z]*|UBLK[A-Z]*|UTC[A-Z]*|NANOSLEEP", "barrier", ""),
    ("BRA|BRX|BSSY|BSYNC|BREAK|BMOV|CALL|RET|EXIT|JMP|YIELD|WARPCOLLECTIVE", "branch", ""),
    ("LDTM|STTM", "tensor memory", ""),
    ("S2R|CS2R|S2UR|R2UR|LDCU?|NOP|BPT|B2R|LEPC|GETLMEMBASE|MATCH|PMTRIG", "other", ""),
    ("U[A-Z0-9]+|VOTEU|R2UP", "uniform", ""),
)
_TABLE = tuple((re.compile(stem), kind, pipe) for stem, kind, pipe in TABLE)
MEMORY = {"global", "shared", "copy", "shuffle"}  # of the pipes
KINDS = tuple(dict.fromkeys(kind for _, kind, _ in TABLE))

# Clocks that a warp instruction keeps the pipes of its multiprocessor: 32 threads / lanes.
PIPES = ("issue", "tensor", "fma", "fma heavy", "alu", "xu", "fp64", "shared", "l1", "memory")


@dataclass(frozen=True)
class Machine:
    """What a multiprocessor does in a clock.

    Attributes:
        lanes: Threads a clock, by pipe.
        macs: Multiply-adds a clock on the tensor cores, by kind of number. mma.sync (HMMA) is
            reported to reach only about 60 % of it on capability 90, where HGMMA reaches all.
    """

    lanes: Mapping[str, int]
    macs: Mapping[str, int]


def _machine(fma: int, heavy: int, fp16_macs: int, fp64_macs: int) -> Machine:
    lanes = {"fma": fma, "fma heavy": heavy, "alu": 64, "xu": 16, "fp64": 64}
    macs = {"16": fp16_macs, "tf32": fp16_macs // 2, "8": 2 * fp16_macs, "64": fp64_macs}
    return Machine(lanes, macs)


MACHINES = {
    80: _machine(64, 64, 1024, 64),
    90: _machine(128, 64, 2048, 128),
    100: _machine(128, 64, 4096, 128),  # tcgen05 hides its shape: see Cost.unknown
}

# Wavefronts of a random lookup of one warp in shared memory, and 128-byte lines of one through L1,
# by bits of a lookup (PERFORMANCE.md: simulated). 64 bits through L1: between its neighbours.
SHARED_LOOKUP = {32: 3.3, 64: 5.9, 128: 10.2}
L1_LOOKUP_QM9 = {32: 7.0, 64: 12.0, 128: 18.0}
L1_LOOKUP_UNIFORM = {32: 14.0, 64: 19.0, 128: 25.0}
# Operands of products on the FP32 pipe: of a warp's 2 x 16 threads, one operand has 2 different
# addresses, the other 16, so 128 bits are 1 or 2 wavefronts. Read from Triton's layouts.
FP32_OPERANDS = {32: 1.0, 64: 1.0, 128: 1.5}


class Mark(NamedTuple):
    """Says what memory instructions of some source lines cost; unmarked ones are coalesced.

    Of a file's path its last two parts count: Triton's disk cache knows no paths, so a binary may
    have been compiled in another copy of the sources. Regular expressions need the file itself.

    Attributes:
        where: A function under `triton.jit`, for all of its lines; or a regular expression that
            is searched for in the text of the source line.
        units: Lines (global) or wavefronts (shared) of a warp instruction, by its bits: 32, 64,
            128; fewer bits count as 32.
        stems: Regular expression for the whole opcode up to its first dot: "LDS|LDG".
    """

    where: Any
    units: Mapping[int, float]
    stems: str = ".*"

    def covers(self, instruction: Instruction) -> bool:
        """Whether an instruction reads or writes memory and is meant."""
        known = classify(instruction.opcode)
        if not known or known[1] not in MEMORY or not re.fullmatch(self.stems, instruction.stem):
            return False
        if isinstance(self.where, str):
            line = linecache.getline(instruction.file, instruction.line)
            return re.search(self.where, line) is not None
        first = self.where.starting_line_number
        inside = first <= instruction.line < first + len(self.where.raw_src)
        file = Path(self.where.fn.__code__.co_filename)
        return inside and Path(instruction.file).parts[-2:] == file.parts[-2:]


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        address: In the kernel, bytes.
        predicate: "" or such as "P0", "!UP1".
        opcode: With modifiers: "LDG.E.128".
        operands: As printed.
        target: Of a branch, else None.
        file, line: Of the source, innermost function where functions were inlined; "", 0 unknown.
    """

    address: int
    predicate: str
    opcode: str
    operands: tuple[str, ...]
    target: int | None = None
    file: str = ""
    line: int = 0

    @property
    def stem(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def never(self) -> bool:
        """Whether the predicate is constant and false: the instruction only fills a slot."""
        return self.predicate == "!PT"

    @property
    def bits(self) -> int:
        """Bits that a thread moves, at least 32; of LDSM and STSM, 32 for each matrix."""
        matrices = re.search(r"\.MT?88(?:\.(\d))?", self.opcode)
        if matrices:
            return 32 * int(matrices.group(1) or 1)
        width = re.search(r"\.(64|128)(?:\.|$)", self.opcode)
        return int(width.group(1)) if width else 32


_LOCK = re.compile(r"SYNCS|UTCATOMSWS|ATOM.*\.CAS")
_LABEL = re.compile(r"^(\.L_\w+):")
_FILE = re.compile(r'//## File "([^"]*)", line (\d+)')
_CODE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


def parse(text: str) -> list[Instruction]:
    """Instructions of a kernel, from what `nvdisasm -c -g` prints."""
    found: list[tuple[Instruction, str]] = []
    labels: dict[str, int] = {}  # index of the instruction behind each label
    file, line = "", 0
    for row in text.splitlines():
        if source := _FILE.search(row):
            file, line = source.group(1), int(source.group(2))
        elif label := _LABEL.match(row):
            labels[label.group(1)] = len(found)
        elif code := _CODE.match(row):
            address, predicate, opcode, rest = code.groups()
            operands = tuple(part.strip() for part in rest.split(",")) if rest else ()
            target = _TARGET.search(rest)
            new = Instruction(
                int(address, 16), predicate or "", opcode, operands, None, file, line
            )
            found.append((new, target.group(1) if target else ""))
    addresses = [instruction.address for instruction, _ in found]
    ends = {label: addresses[i] for label, i in labels.items() if i < len(addresses)}
    return [instruction._replace(target=ends.get(label)) for instruction, label in found]


@dataclass
class Loop:
    """A natural loop: what a branch back to a place that dominates it encloses.

    Attributes:
        body: Instructions by address, those of inner loops too. Not always contiguous: slow
            ways stand at the end of a kernel.
        always: Addresses of instructions that every round executes.
        inner: Loops directly inside, without those that only wait (on a lock, on a barrier).
    """

    body: list[Instruction]
    always: set[int]
    inner: list[Loop] = field(default_factory=list)

    @property
    def start(self) -> int:
        return self.body[0].address

    @property
    def addresses(self) -> set[int]:
        return {x.address for x in self.body}

    @property
    def own(self) -> list[Instruction]:
        """Instructions outside of the inner loops."""
        inside = set().union(*(loop.addresses for loop in self.inner))
        return [x for x in self.body if x.address not in inside]

    @property
    def conditional(self) -> int:
        """How many own instructions a round may leave out; they are counted all the same."""
        return sum(x.address not in self.always for x in self.own)

    @property
    def waits(self) -> bool:
        """Whether this is a loop around a lock or a barrier, not around work."""
        locks = any(_LOCK.match(x.opcode) for x in self.body)
        return locks and len(self.body) < 32 and not self.inner


class _Graph:
    """Basic blocks of a kernel: which follow which, and which dominate which."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        ends = [i for i, x in enumerate(code) if _leaves(x)]
        index = {x.address: i for i, x in enumerate(code)}
        targets = {index[code[i].target] for i in ends if code[i].target is not None}
        starts = sorted({0, *targets, *(i + 1 for i in ends if i + 1 < len(code))})
        bounds = zip(starts, [*starts[1:], len(code)], strict=True)
        self.blocks = [list(code[a:b]) for a, b in bounds]
        number = {block[0].address: n for n, block in enumerate(self.blocks)}
        self.before: list[set[int]] = [set() for _ in self.blocks]
        self.after: list[set[int]] = [set() for _ in self.blocks]
        for n, block in enumerate(self.blocks):
            last = block[-1]
            if _leaves(last) and last.target is not None:
                self.after[n].add(number[last.target])
            if not _leaves(last) or _may_stay(last):
                self.after[n] |= {n + 1} & set(range(len(self.blocks)))
            for m in self.after[n]:
                self.before[m].add(n)
        self.dominators = self._dominators()

    def _dominators(self) -> list[set[int]]:
        everything = set(range(len(self.blocks)))
        above = [everything] * len(self.blocks)
        above[0] = {0}
        changed = True
        while changed:
            changed = False
            for n in range(1, len(self.blocks)):
                ways = [above[m] for m in self.before[n]]
                new = {n} | (set.intersection(*ways) if ways else everything)
                changed |= new != above[n]
                above[n] = new
        return above

    def natural_loops(self) -> Iterator[Loop]:
        reached = [n for n in range(len(self.blocks)) if n == 0 or self._reachable(n)]
        latches: dict[int, set[int]] = {}
        for n in reached:
            for head in self.after[n] & self.dominators[n]:
                latches.setdefault(head, set()).add(n)
        for head, ends in latches.items():
            inside, open_ends = {head}, ends - {head}
            while open_ends:
                inside |= open_ends
                open_ends = set().union(*(self.before[n] for n in open_ends)) - inside
            always = set.intersection(*(self.dominators[n] for n in ends)) & inside
            body = [x for n in sorted(inside) for x in self.blocks[n]]
            yield Loop(body, {x.address for n in always for x in self.blocks[n]})

    def _reachable(self, n: int) -> bool:
        """Whether the start leads there; an unreachable block counts as dominated by all."""
        return len(self.dominators[n]) < len(self.blocks) or len(self.blocks) == 1


def _leaves(x: Instruction) -> bool:
    return x.stem in {"EXIT", "RET", "BRX", "JMP"} or (x.stem == "BRA" and x.target is not None)


def _may_stay(x: Instruction) -> bool:
    """Whether the instruction behind a branch can follow it."""
    return x.predicate not in {"", "PT"} or (x.stem == "BRA" and len(x.operands) > 1)


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """Outermost loops of a kernel, in order, each with its inner loops."""
    outermost: list[Loop] = []
    for loop in sorted(_Graph(code).natural_loops(), key=lambda loop: -len(loop.body)):
        _place(loop, outermost)
    return _working(outermost)


def _place(loop: Loop, among: list[Loop]) -> None:
    """Puts a loop into the innermost of the loops, seen before, that enclose it."""
    for other in among:
        if loop.addresses <= other.addresses:
            return _place(loop, other.inner)
    among.append(loop)
    return None


def _working(nest: Iterable[Loop]) -> list[Loop]:
    """The loops that do not only wait, by address."""
    for loop in nest:
        loop.inner = _working(loop.inner)
    return sorted((loop for loop in nest if not loop.waits), key=lambda loop: loop.start)


def flat(nest: Iterable[Loop]) -> list[tuple[int, Loop]]:
    """All loops in order of their addresses, each with its height: 0 innermost."""
    rows: list[tuple[int, Loop]] = []
    for loop in nest:
        inner = flat(loop.inner)
        rows += [(1 + max((height for height, _ in inner), default=-1), loop), *inner]
    return rows


def classify(opcode: str) -> tuple[str, str] | None:
    """Kind and pipe of an opcode; None, if the table lacks it."""
    stem = opcode.partition(".")[0]
    rows = (row for row in _TABLE if row[0].fullmatch(stem))
    return next(((kind, pipe) for _, kind, pipe in rows), None)


_SHAPES = {  # of one warp: rows, columns, depth
    "884": (8, 8, 4),
    "8816": (8, 8, 16),
    "1684": (16, 8, 4),
    "1688": (16, 8, 8),
    "16816": (16, 8, 16),
    "16832": (16, 8, 32),
    "16864": (16, 8, 64),
}


def tensor_shape(opcode: str) -> tuple[int, int, int] | None:
    """Rows, columns and depth of what one warp multiplies; of HGMMA a quarter of its 64 rows."""
    if group := re.search(r"\.(\d+)x(\d+)x(\d+)", opcode):
        m, n, k = (int(size) for size in group.groups())
        return m // 4, n, k
    warp = re.search(r"MMA\.(?:[A-Z]+\.)?(\d+)", opcode)
    return _SHAPES.get(warp.group(1)) if warp else None


def _number_kind(opcode: str) -> str:
    if "TF32" in opcode:
        return "tf32"
    return {"H": "16", "B": "16", "D": "64"}.get(opcode[0], "8")


@dataclass
class Cost:
    """What one warp needs for some instructions, all of them executed once.

    Attributes:
        kinds: Warp instructions, by kind (`KINDS`).
        opcodes: Warp instructions, by full opcode.
        macs: Multiply-adds on tensor cores, of this warp.
        pipes: Clocks that this warp keeps the pipes of its multiprocessor, by name (`PIPES`);
            "memory" is "shared" + "l1": both read one array, 128 bytes a clock.
        unknown: Opcodes that the table lacks or whose shape cannot be seen; they cost one issue.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    opcodes: Counter[str] = field(default_factory=Counter)
    macs: int = 0
    pipes: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PIPES, 0.0))
    unknown: Counter[str] = field(default_factory=Counter)


def cost(code: Iterable[Instruction], *, capability: int = 90, marks: Sequence[Mark] = ()) -> Cost:
    """Counts instructions and the clocks of each pipe for one warp.

    Instructions under a predicate count in full, since the warp issues them.
    """
    total, machine = Cost(), MACHINES[capability]
    for x in code:
        total.pipes["issue"] += 1 / 4
        total.opcodes[x.opcode] += 1
        known = classify(x.opcode)
        if known is None:
            total.unknown[x.opcode] += 1
        kind, pipe = ("other", "") if known is None or x.never else known
        total.kinds[kind] += 1
        if pipe == "tensor":
            _tensor(x, machine, total)
        elif pipe in MEMORY:
            _memory(x, pipe, marks, total)
        elif pipe == "imad":
            total.pipes["fma"] += 32 / machine.lanes["fma"]
            total.pipes["fma heavy"] += 32 / machine.lanes["fma heavy"]
        elif pipe:
            total.pipes[pipe] += 32 / machine.lanes[pipe]
    total.pipes["memory"] = total.pipes["shared"] + total.pipes["l1"]
    return total


def _tensor(x: Instruction, machine: Machine, total: Cost) -> None:
    """Multiply-adds, and the operands that HGMMA reads from shared memory, 128 bytes a clock.

    That these reads take turns with loads, and that the four warps share one reading of the
    second operand, is a guess.
    """
    shape = tensor_shape(x.opcode)
    if shape is None:
        total.unknown[x.opcode] += 1
        return
    m, n, k = shape
    number = _number_kind(x.opcode)
    total.macs += m * n * k
    total.pipes["tensor"] += m * n * k / machine.macs[number]
    if "GMMA" in x.opcode:
        size = {"16": 2, "tf32": 4, "8": 1, "64": 8}[number]
        from_shared = n / 4 + (m if x.operands[1].startswith("gdesc") else 0)  # rows of depth k
        total.pipes["shared"] += from_shared * k * size / 128


def _memory(x: Instruction, pipe: str, marks: Sequence[Mark], total: Cost) -> None:
    """Wavefronts in shared memory, lines through L1: as marked, else without conflicts."""
    coalesced = 1 if pipe == "shuffle" else x.bits / 32
    marked = next((mark.units[x.bits] for mark in marks if mark.covers(x)), coalesced)
    if pipe in {"shared", "shuffle"}:
        total.pipes["shared"] += marked
    else:
        total.pipes["l1"] += marked
        total.pipes["shared"] += min(marked, coalesced) if pipe == "copy" else 0
