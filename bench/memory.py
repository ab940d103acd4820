"""Memory of a pass, at its peak: of PyTorch's allocator on a GPU, else resident memory (Linux)."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

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
    try:
        result = call()
    finally:
        gc.enable()
    peak = torch.cuda.max_memory_allocated() if cuda else resident_bytes("VmHWM")
    tensors = [result] if isinstance(result, Tensor) else [*result, way.cotangent]  # as the output
    inputs = sum(x.nbytes for x in (*way.inputs, *way.parameters))
    extra = peak - before - sum(x.nbytes for x in tensors)
    return (peak - before + inputs) / 1e6, extra / 1e6
