"""What CUDA kernels need, read from what `nvcc -Xptxas=-v` prints (build/cuda/*.o.log)."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import NamedTuple


class KernelResources(NamedTuple):
    """What ptxas says that a kernel needs on one architecture.

    Attributes:
        kernel: Its name with template arguments and parameters.
        arch: Such as "sm_90".
        registers: Of a thread, 32 bits each; 0 for a function that kernels call.
        shared: Bytes of shared memory of a block that its code declares; what a launch asks for
            comes on top.
        stack: Bytes of a thread's stack frame; spilled registers are in it.
        spill_stores: Bytes a thread stores because registers ran out.
        spill_loads: Bytes a thread loads again.
        constant: Bytes of constant memory, arguments among them; not every version says so.
    """

    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int
    constant: int


def ptxas_report(log_text: str) -> list[KernelResources]:
    """Reads every kernel on every architecture, in the order of the log.

    A function that was not inlined has a row of its own, for its spills are in no kernel's.

    Args:
        log_text: All that nvcc printed, one or several logs.
    """
    rows: list[KernelResources] = []
    arch = ""
    for line in log_text.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            arch = entry[2]
            rows.append(KernelResources(entry[1], arch, 0, 0, 0, 0, 0, 0))
        elif function := re.search(r"Function properties for (\S+)", line):
            if not rows or rows[-1][:2] != (function[1], arch):
                rows.append(KernelResources(function[1], arch, 0, 0, 0, 0, 0, 0))
        elif "bytes stack frame" in line:
            rows[-1] = rows[-1]._replace(
                stack=_bytes("stack frame", line),
                spill_stores=_bytes("spill stores", line),
                spill_loads=_bytes("spill loads", line),
            )
        elif used := re.search(r"Used (\d+) registers", line):
            rows[-1] = rows[-1]._replace(
                registers=int(used[1]),
                shared=_bytes("smem", line),
                constant=_bytes(r"cmem\[\d+\]", line),
            )
    names = _demangle([row.kernel for row in rows])
    return [row._replace(kernel=name) for row, name in zip(rows, names, strict=True)]


def _bytes(what: str, line: str) -> int:
    return sum(map(int, re.findall(rf"(\d+) bytes {what}", line)))


def _demangle(names: Sequence[str]) -> list[str]:
    """Names as they stand in the sources, where binutils or CUDA have the tool for it."""
    command = shutil.which("c++filt") or shutil.which("cu++filt")
    if command is None or not names:
        return list(names)
    text = "\n".join(names)
    return subprocess.check_output([command], input=text, text=True).splitlines()
