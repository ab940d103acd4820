"""Memory of a forward+backward of N atoms: `python -m bench.memory [N]`, in its own process.

Prints the peak beyond inputs, outputs and gradients, in MB of 10^6 bytes. The peak is that of the
process' resident memory, set back before the call (Linux), so it counts all that the call touches.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import resource
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from .problems import BiasProblem
from .ways import Way

STATUS = Path("/proc/self/status")


def resident_bytes(name: str) -> int:
    """`VmRSS` or `VmHWM` (the peak); where there is no /proc, the peak so far for both."""
    if not STATUS.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {name}")


def reset_peak() -> None:
    """Sets the peak back to what is resident now, where the system can."""
    references = Path("/proc/self/clear_refs")
    if references.exists():
        references.write_text("5")


def return_free_memory() -> None:
    """Gives back what is free but resident, which a call would use unnoticed (glibc)."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def extra_bytes(atoms: int) -> int:
    """Peak memory of a forward+backward beyond inputs, output and gradients, table given."""
    BiasProblem(1, 64).ours().backward()  # libraries, threads
    way = BiasProblem(1, atoms).ours()
    return_free_memory()
    reset_peak()
    before = resident_bytes("VmRSS")
    leaves = (*way.inputs, *way.parameters)
    out = way.function(*way.inputs)
    gradients = torch.autograd.grad(out, leaves, way.cotangent)
    after = resident_bytes("VmHWM")
    return after - before - sum(x.nbytes for x in (out, *gradients))


def of_a_pass(way: Way, name: str) -> tuple[float, float]:
    """Memory of a pass that ran before, in MB: at its peak, and how much of that is extra.

    The peak counts the way's own inputs; what is extra is neither input nor output nor gradient.
    On a GPU it is what PyTorch's allocator handed out, elsewhere the resident memory of this
    process, which other tensors that were freed can hide.
    """
    call, cuda = way.call(name), way.cotangent.is_cuda
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        return_free_memory()
        reset_peak()
        before = resident_bytes("VmRSS")
    gc.disable()  # what it frees would be missing from the peak
    result = call()
    gc.enable()
    peak = torch.cuda.max_memory_allocated() if cuda else resident_bytes("VmHWM")
    tensors = [result] if isinstance(result, Tensor) else [*result, way.cotangent]  # as the output
    inputs = sum(x.nbytes for x in (*way.inputs, *way.parameters))
    extra = peak - before - sum(x.nbytes for x in tensors)
    return (peak - before + inputs) / 1e6, extra / 1e6


def in_a_process(atoms: int) -> float:
    """Measures in a fresh process: MB."""
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", "bench.memory", str(atoms), "--threads", threads]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    """Prints the number."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("atoms", type=int, nargs="?", default=8192)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(extra_bytes(arguments.atoms) / 1e6)


if __name__ == "__main__":
    main()
