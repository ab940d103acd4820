"""A GPU that is not there: Triton compiles for it, exactly as for a real one, and nothing runs.

    with offline_gpu(90) as launches:
        kernel[grid](x, y, n, BLOCK=64, num_warps=4)  # tensors in CPU memory
    print(resources(launches[0].compiled), sass(launches[0].compiled))

The fake stands where Triton keeps its driver. `JITFunction.run` asks it for the device, the stream
and the target; `CompiledKernel._init_handles` asks it for the size of shared memory, for a loaded
binary and for a launcher. Everything else is Triton's own: the arguments are specialised, the
kernel compiled, the disk cache read and written as on a machine with that GPU.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import CompiledKernel
from triton.runtime import driver as runtime

FIRST_DEVICE = 1000  # devices 1080, 1090, 1100: no machine has as many, so nothing is mistaken
SHARED_KIB = {80: 163, 90: 227, 100: 227}  # what one program may have at most
MULTIPROCESSORS = 132
MAX_THREADS = 1024  # of a program


class Launch(NamedTuple):
    """One launch that did not take place.

    Attributes:
        name: Of the kernel.
        compiled: Triton's `CompiledKernel`; `compiled.asm` holds ttir, ttgir, llir, ptx, cubin.
        grid: Programs along x, y, z.
        num_warps: Of a program.
        constants: Values that were compiled in, by argument: `constexpr`, 1 and None.
    """

    name: str
    compiled: CompiledKernel
    grid: tuple[int, int, int]
    num_warps: int
    constants: dict[str, Any]


class Resources(NamedTuple):
    """What ptxas and Triton say that a kernel needs.

    Attributes:
        registers: Of a thread, 32 bits each.
        spill_stores: Bytes a thread stores because registers ran out.
        spill_loads: Bytes a thread loads again.
        shared: Bytes of shared memory of a program.
        stack: Bytes of a thread's stack frame; spilled registers are in it.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    stack: int


class _Utils:
    """What Triton otherwise has in C: properties of the device, and loading a binary."""

    def __init__(self, capability: int) -> None:
        self.properties = {
            "max_shared_mem": SHARED_KIB[capability] * 1024,
            "max_num_regs": 65536,
            "multiprocessor_count": MULTIPROCESSORS,
            "warpSize": 32,
            "sm_clock_rate": 1_700_000,  # kHz
            "mem_clock_rate": 2_600_000,
            "mem_bus_width": 5120,
        }

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self.properties

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, threads; nothing is loaded."""
        return 0, 0, 0, 0, MAX_THREADS


class _Driver:
    """Stands where `triton.runtime.driver.active` does; one for each capability."""

    def __init__(self, capability: int) -> None:
        self.device = FIRST_DEVICE + capability
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = _Utils(capability)
        self.launches: list[Launch] = []

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_benchmarker(self) -> Any:
        raise RuntimeError("an offline GPU cannot choose among configurations: it times nothing")

    def launcher_cls(self, src: Any, metadata: Any) -> _Recorder:
        return _Recorder(self, src, metadata)


class _Recorder:
    """Called where a launcher is: appends to the driver's list.

    A compiled kernel keeps its launcher for good, so the list is looked up at every launch.
    """

    def __init__(self, driver: _Driver, src: Any, metadata: Any) -> None:
        known = src.fn.device_caches[driver.device][0].values()
        self.driver = driver
        self.compiled = next(kernel for kernel in known if kernel.metadata is metadata)
        self.num_warps = metadata.num_warps
        self.constants = {
            ".".join((src.fn.arg_names[path[0]], *map(str, path[1:]))): value
            for path, value in src.constants.items()
        }

    def __call__(self, x: int, y: int, z: int, *_: Any) -> None:
        kernel = self.compiled
        launch = Launch(kernel.name, kernel, (x, y, z), self.num_warps, self.constants)
        self.driver.launches.append(launch)


_drivers: dict[int, _Driver] = {}
_resources: dict[str, Resources] = {}
_sass: dict[str, str] = {}


@contextlib.contextmanager
def offline_gpu(capability: int) -> Iterator[list[Launch]]:
    """Lets Triton compile for a GPU that is not there.

    Args:
        capability: 80, 90 or 100.

    Yields:
        The launches, in order, as they come; clear it as you like.

    Raises:
        ValueError: for another capability.
        RuntimeError: under `TRITON_INTERPRET=1`, where nothing is compiled.
    """
    if capability not in SHARED_KIB:
        raise ValueError(f"capability: expected one of {sorted(SHARED_KIB)}, got {capability}")
    if knobs.runtime.interpret:
        raise RuntimeError("offline_gpu: TRITON_INTERPRET is set, nothing would be compiled")
    fake = _drivers.setdefault(capability, _Driver(capability))
    active, outer = runtime._active, fake.launches
    fake.launches = []
    runtime.set_active(fake)
    try:
        yield fake.launches
    finally:
        runtime.set_active(active)  # None, where no driver had been asked for
        fake.launches = outer


def resources(compiled: CompiledKernel) -> Resources:
    """Registers, spills, shared memory and stack of a kernel, by `ptxas -v`."""
    if compiled.hash not in _resources:
        log = _ptxas(compiled)
        _resources[compiled.hash] = Resources(
            registers=_number(r"Used (\d+) registers", log),
            spill_stores=_number(r"(\d+) bytes spill stores", log),
            spill_loads=_number(r"(\d+) bytes spill loads", log),
            shared=compiled.metadata.shared,
            stack=_number(r"(\d+) bytes stack frame", log),
        )
    return _resources[compiled.hash]


def sass(compiled: CompiledKernel) -> str:
    """The machine code of a kernel, by nvdisasm, with lines of the source between it."""
    if compiled.hash not in _sass:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(compiled.asm["cubin"])
            command = [knobs.nvidia.nvdisasm.path, "-c", "-gi", str(path)]
            _sass[compiled.hash] = _run(command).stdout
    return _sass[compiled.hash]


def _ptxas(compiled: CompiledKernel) -> str:
    """What ptxas says of a kernel, assembled with the flags that Triton gives it."""
    metadata = compiled.metadata
    capability = metadata.target.arch
    flags = [] if metadata.enable_fp_fusion else ["--fmad=false"]
    flags += metadata.ptx_options.split(" ") if metadata.ptx_options else []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(compiled.asm["ptx"])
        arch = f"--gpu-name={sm_arch_from_capability(capability)}"
        out = ["-o", str(path.with_suffix(".cubin"))]
        tool = get_ptxas(capability).path
        return _run([tool, "-lineinfo", *flags, "-v", arch, str(path), *out]).stderr


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
    return done


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    if not found:
        raise RuntimeError(f"ptxas said nothing like {pattern!r}:\n{log}")
    return int(found.group(1))
