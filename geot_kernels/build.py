"""Compiles the kernels: csrc/cpu into a shared library, and csrc/cuda into another.

    library.cpp            -> library.o              the operators: the only file that sees torch
    every other cpu/*.cpp  -> <instruction set>/*.o  C++ kernels, once for each instruction set
    every cuda/*.cu        -> *.o, *.o.log           CUDA kernels, and what ptxas says of them
    all objects of a kind  -> libgeot_<kind>.so      for every torch >= 2.10 and every Python

The operators use libtorch's stable ABI. Those of C++ choose the kernels that the processor can
run. Those of CUDA bring CUDA's runtime with them, and load beside a torch without CUDA.

An inline function that several objects hold, as those of `std` are, is linked only once. Linkers
take the first: objects are therefore linked from the oldest instruction set to the newest, so
that the copy which all of them call runs on any processor. Nothing is exported, so that no other
library can end up calling a copy of ours. Kernels themselves live in a namespace of their
instruction set, and nothing of them runs when the library is loaded; tests/test_build.py checks.

setup.py loads this file by its path: it imports nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent
FLAGS = (
    *("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wall", "-Wextra"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    "-Wno-psabi",  # vectors wider than registers are passed only within an object
)
TORCH_FLAGS = ("-DTORCH_TARGET_VERSION=0x020a000000000000",)  # 2.10, the oldest that will do
NVCC_FLAGS = (
    *("-O3", "-std=c++20", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden"),
    *("-prec-div=false", "-prec-sqrt=false"),  # float32 to two units of rounding, without branches
    "-Xptxas=-v",  # says what each kernel needs: the log beside the object
)
ARCHITECTURES = ("8.0", "9.0", "10.0")  # those of them that nvcc knows, and PTX of the last
OLDEST_ARCHITECTURE = 8
INSTRUCTION_SETS = {  # linked in this order
    "baseline": (),
    "avx2": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
}
KINDS = {"cpu": "C++", "cuda": "CUDA"}  # a folder of csrc each, and how its kernels are called
SUFFIXES = (".cpp", ".cu", ".cuh", ".h")
_PROBE = """
#include <concepts>
#include <span>
#if defined(__clang__)
static_assert(__clang_major__ >= 15, "clang 15 or later is needed");
#else
static_assert(__GNUC__ >= 12, "GCC 12 or later is needed");
#endif
template <std::integral T> T first(std::span<T> x) { return x[0]; }
"""
# Runs a command, its output into the file $0; shows what went wrong or was warned of, no more.
_LOGGED = (
    '"$@" >"$0" 2>&1; status=$?; if [ $status != 0 ] || grep -q "warning[ :]" "$0"; '
    'then grep -Ev "^ptxas info|bytes stack frame" "$0"; fi; exit $status'
)


class BuildError(RuntimeError):
    """The library cannot be compiled; the message says why."""


class Nvcc(NamedTuple):
    """The compiler of CUDA: its command, its version, what it compiles for, where cudart lies."""

    command: list[str]
    version: str
    architectures: list[str]
    libraries: list[str]


class Tools(NamedTuple):
    """What it takes to compile: the compiler's command, the folder of torch; nvcc for CUDA."""

    compiler: list[str]
    torch: Path
    nvcc: Nvcc | None = None

    def __str__(self) -> str:
        text = " ".join(self.compiler)
        if self.nvcc is None:
            return text
        targets = " ".join(x.rpartition("code=")[2] for x in self.nvcc.architectures)
        return f"{text} and {' '.join(self.nvcc.command)} ({self.nvcc.version}: {targets})"


class Step(NamedTuple):
    """One command of the build, and the files that it reads and writes."""

    output: Path
    inputs: list[Path]
    command: list[str]
    log: Path | None = None


# Where things are.


def checkout() -> Path | None:
    """The source tree that this package lies in; None where it is installed."""
    installed = (PACKAGE / "csrc").is_dir() or not (PACKAGE.parent / "csrc").is_dir()
    return None if installed else PACKAGE.parent


def sources() -> Path:
    """The folder csrc: beside the package in a source tree, in it where it is installed."""
    return (checkout() or PACKAGE) / "csrc"


def library_name(kind: str = "cpu") -> str:
    """The file name of a library."""
    return f"libgeot_{kind}.{'dylib' if sys.platform == 'darwin' else 'so'}"


def digest(kind: str = "cpu", csrc: Path | None = None) -> str:
    """Hashes what a library is compiled from, its flags included: 16 hexadecimal digits."""
    csrc = csrc or sources()
    own = {"cpu": INSTRUCTION_SETS, "cuda": NVCC_FLAGS}[kind]
    known = hashlib.sha256(repr((FLAGS, TORCH_FLAGS, own)).encode())
    for folder in ("common", kind):
        for path in sorted((csrc / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                known.update(f"{path.relative_to(csrc).as_posix()} {content}\n".encode())
    return known.hexdigest()[:16]


def compiled_from(library: Path) -> str | None:
    """The digest of the sources that a library was compiled from, written inside it."""
    found = re.search(rb"geot_sources=([0-9a-f]{16})", library.read_bytes())
    return found[1].decode() if found else None


# What compiles.


def variable(kind: str) -> str:
    """The environment variable that forbids a kind of kernels (0) or insists on it (1)."""
    return f"GEOT_KERNELS_{kind.upper()}"


def wanted(kind: str) -> bool | None:
    """Whether kernels are insisted on or forbidden; None where nothing is said.

    Raises:
        BuildError: The environment says something else than 0 or 1.
    """
    value = os.environ.get(variable(kind), "")
    if value not in ("", "0", "1"):
        raise BuildError(f"{variable(kind)}: expected 0 or 1, got {value!r}")
    return value == "1" if value else None


def find_tools(kind: str = "cpu", csrc: Path | None = None) -> Tools:
    """Finds the compiler ($CXX, else c++, g++ or clang++), torch without importing it, nvcc.

    nvcc, for CUDA alone, is $CUDACXX, else that of $CUDA_HOME, of $PATH or of /usr/local/cuda.

    Raises:
        BuildError: One of them is missing or too old.
    """
    csrc = csrc or sources()
    if sys.platform == "win32":
        raise BuildError("compiling them on Windows is not supported")
    if not (csrc / kind / "library.cpp").is_file():
        raise BuildError(f"there are no {KINDS[kind]} sources in {csrc}")
    compiler, torch = _find_compiler(), _find_torch()
    return Tools(compiler, torch, _find_nvcc(compiler) if kind == "cuda" else None)


def why_not(kind: str = "cpu", csrc: Path | None = None) -> str | None:
    """Says in a sentence why a library cannot be compiled here; None where it can."""
    try:
        find_tools(kind, csrc)
    except BuildError as error:
        return str(error)
    return None


def _find_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch cannot be found")
    torch = Path(spec.origin).parent
    header = torch / "include" / "torch" / "headeronly" / "version.h"
    if not header.is_file():
        raise BuildError(f"torch >= 2.10 with its headers is needed, and {header} is missing")
    numbers = re.findall(r"TORCH_VERSION_(?:MAJOR|MINOR) (\d+)", header.read_text())
    if tuple(map(int, numbers)) < (2, 10):
        raise BuildError(f"torch >= 2.10 is needed, got {'.'.join(numbers)}")
    return torch


def _find_compiler() -> list[str]:
    """Takes the first compiler that understands C++20, and reports the first that does not."""
    named = os.environ.get("CXX")
    reasons = []
    for command in [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]:
        reason = _why_not_compiler(command)
        if reason is None:
            return command
        if named or shutil.which(command[0]):
            reasons.append(reason)
    raise BuildError(
        reasons[0] if reasons else "no C++ compiler (GCC 12, clang 15 or later): name one in CXX"
    )


def _why_not_compiler(command: list[str]) -> str | None:
    try:
        probe = subprocess.run(
            [*command, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"],
            input=_PROBE,
            capture_output=True,
            text=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        return f"the C++ compiler {command[0]} cannot be run: {error.strerror}"
    if probe.returncode == 0:
        return None
    lines = [line.strip() for line in probe.stderr.splitlines() if line.strip()]
    complaint = next((x for x in lines if "error" in x), lines[0] if lines else "no message")
    return f"the C++ compiler {command[0]} cannot compile C++20: {complaint}"


def _find_nvcc(compiler: Sequence[str]) -> Nvcc:
    """Takes the first nvcc that will do, and reports the first that does not."""
    if named := os.environ.get("CUDACXX"):
        return _probe_nvcc(shlex.split(named), compiler)
    home = os.environ.get("CUDA_HOME")
    places = [*([f"{home}/bin/nvcc"] if home else []), "nvcc", "/usr/local/cuda/bin/nvcc"]
    reasons = []
    for command in filter(None, map(shutil.which, places)):
        try:
            return _probe_nvcc([command], compiler)
        except BuildError as error:
            reasons.append(error)
    raise reasons[0] if reasons else BuildError("no nvcc (CUDA 12 or later): name one in CUDACXX")


def _probe_nvcc(command: list[str], compiler: Sequence[str]) -> Nvcc:
    """Has nvcc say what it would do: whether it knows our flags, and where its libraries lie."""
    release = re.search(r"release ([\d.]+)", _ask_nvcc(command, "--version"))
    version = release[1] if release else "of unknown version"
    if len(compiler) == 1 and "NVCC_CCBIN" not in os.environ:
        command = [*command, f"-ccbin={compiler[0]}"]
    architectures = _architectures(command)
    flags = [*NVCC_FLAGS, *architectures, "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    try:
        plan = _ask_nvcc(command, "--dryrun", *flags)
    except BuildError as error:
        raise BuildError(f"{error} (nvcc {version})") from None
    libraries = re.findall(r'"(-L[^"]+)"', "".join(re.findall(r"#\$ LIBRARIES=.*", plan)))
    return Nvcc(command, version, architectures, libraries)


def _ask_nvcc(command: Sequence[str], *arguments: str) -> str:
    try:
        done = subprocess.run(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:
        raise BuildError(
            f"the CUDA compiler {command[0]} cannot be run: {error.strerror}"
        ) from None
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line and not line.startswith("#$")]
        complaint = next((x for x in lines if "fatal" in x), lines[0] if lines else "no message")
        raise BuildError(f"the CUDA compiler {command[0]} cannot compile them: {complaint}")
    return done.stdout


def _architectures(nvcc: Sequence[str]) -> list[str]:
    """Writes $TORCH_CUDA_ARCH_LIST, such as "8.0;9.0a+PTX", or else our own, as flags of nvcc.

    What is too old for the kernels is left out, for such lists are made for all that a machine
    compiles.
    """
    names = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not names:
        known = _ask_nvcc(nvcc, "--list-gpu-code").split()
        names = [x for x in ARCHITECTURES if f"sm_{x.replace('.', '')}" in known]
        names[-1:] = [f"{x}+PTX" for x in names[-1:]]
    flags = []
    for name in names:
        parts = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if parts is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: expected numbers such as '8.0 9.0a+PTX', got {name!r}"
            )
        if int(parts[1]) >= OLDEST_ARCHITECTURE:
            number = parts[1] + parts[2]
            kinds = ("sm", "compute") if parts[3] else ("sm",)
            flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
    if not flags:
        raise BuildError(
            f"the kernels need GPUs of architecture {OLDEST_ARCHITECTURE}.0 or later, got "
            f"{' '.join(names) or 'an nvcc that knows none of them'}"
        )
    return list(dict.fromkeys(flags))


# The build.


def build(
    destination: Path,
    kind: str = "cpu",
    *,
    work: Path | None = None,
    csrc: Path | None = None,
    verbose: bool = False,
) -> Path:
    """Compiles a library and puts it into a folder, in one step and in place of an older one.

    Args:
        destination: The folder to put it into; made where it is missing.
        kind: "cpu" or "cuda".
        work: Where objects are kept. With ninja, only what has changed is compiled again; None
            compiles all, in a temporary folder.
        csrc: The sources; None takes those of this package.
        verbose: Whether to print every command.

    Returns:
        The library.

    Raises:
        BuildError: Tools are missing, or the compiler refused: the message is what it printed.
    """
    if work is None:
        with tempfile.TemporaryDirectory(prefix="geot-kernels-") as folder:
            return build(destination, kind, work=Path(folder), csrc=csrc, verbose=verbose)
    csrc, work = (csrc or sources()).resolve(), work.resolve()
    tools = find_tools(kind, csrc)
    work.mkdir(parents=True, exist_ok=True)
    steps = _steps(kind, tools, csrc, work)
    ninja = _find_ninja()
    output = _run_ninja(ninja, steps, work, verbose) if ninja else _run_all(steps, verbose)
    if verbose or re.search("warning[ :]", output):
        print(output)
    return _install(steps[-1].output, destination)


def _steps(kind: str, tools: Tools, csrc: Path, work: Path) -> list[Step]:
    """The commands: objects in the order in which they are linked, then the library."""
    names = _instruction_sets() if kind == "cpu" else []
    common = [*tools.compiler, *FLAGS, f"-I{csrc}"]
    operators = csrc / kind / "library.cpp"
    newer = [f"-DGEOT_HAS_{name.upper()}" for name in names if name != "baseline"]
    include = ["-isystem", f"{tools.torch / 'include'}"]
    stamp = work / "stamp.cpp"
    _write(stamp, _stamp(digest(kind, csrc)))
    steps = [
        _compile([*common, *newer, *TORCH_FLAGS, *include], operators, work / "library.o"),
        _compile(common, stamp, work / "stamp.o"),
    ]
    for name in names:
        (work / name).mkdir(exist_ok=True)
        for source in sorted((csrc / kind).glob("*.cpp")):
            if source != operators:
                flags = [*common, f"-DGEOT_ISA={name}", *INSTRUCTION_SETS[name]]
                steps.append(_compile(flags, source, work / name / f"{source.stem}.o"))
    if tools.nvcc:
        flags = [*tools.nvcc.command, *NVCC_FLAGS, *tools.nvcc.architectures, f"-I{csrc}"]
        for source in sorted((csrc / kind).glob("*.cu")):
            steps.append(_logged(_compile(flags, source, work / f"{source.stem}.o")))
    library, objects = work / library_name(kind), [step.output for step in steps]
    return [*steps, Step(library, objects, _link(tools, objects, library))]


def _instruction_sets() -> list[str]:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return list(INSTRUCTION_SETS) if is_x86 else ["baseline"]


def _link(tools: Tools, objects: Sequence[Path], library: Path) -> list[str]:
    command = [*tools.compiler, "-shared", *map(str, objects), "-o", str(library)]
    command += [f"-L{tools.torch / 'lib'}", "-ltorch_cpu"]
    if tools.nvcc:
        command += [*tools.nvcc.libraries, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    if sys.platform != "darwin":
        exports = library.parent / "exports.map"
        _write(exports, "{ local: *; };\n")
        command += ["-Wl,-z,defs", f"-Wl,--version-script={exports}"]
    return command


def _compile(command: Sequence[str], source: Path, target: Path) -> Step:
    dependencies = ["-MD", "-MF", f"{target}.d"]
    return Step(target, [source], [*command, *dependencies, "-c", str(source), "-o", str(target)])


def _logged(step: Step) -> Step:
    """The same step with what it prints in a file beside its output."""
    log = Path(f"{step.output}.log")
    command = ["/bin/sh", "-c", _LOGGED, str(log), *step.command]
    return step._replace(command=command, log=log)


def _stamp(sources: str) -> str:
    text = f'"geot_sources={sources}"'
    return (
        f'extern "C" {{\nextern const char geot_sources[];\n'
        f"__attribute__((used)) const char geot_sources[] = {text};\n}}\n"
    )


def _write(path: Path, text: str) -> None:
    """Writes a file unless that is what it holds: ninja goes by the time of the last change."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _find_ninja() -> str | None:
    scripts = sysconfig.get_path("scripts")
    return shutil.which("ninja", path=os.pathsep.join([scripts, os.environ.get("PATH", "")]))


def _run_ninja(ninja: str, steps: Sequence[Step], work: Path, verbose: bool) -> str:
    lines = ["rule run", "  command = $run", "  description = $out"]
    lines += ["rule compile", *lines[1:], "  depfile = $out.d", "  deps = gcc"]
    for step in steps:
        rule = "run" if step is steps[-1] else "compile"
        inputs = " ".join(_ninja_path(path) for path in step.inputs)
        outputs = " | ".join(_ninja_path(path) for path in (step.output, step.log) if path)
        lines.append(f"build {outputs}: {rule} {inputs}")
        lines.append("  run = " + shlex.join(step.command).replace("$", "$$"))
    _write(work / "build.ninja", "\n".join(lines) + "\n")
    return _run([ninja, *(["-v"] if verbose else [])], work)


def _ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _run_all(steps: Sequence[Step], verbose: bool) -> str:
    """Does without ninja: compiles everything, several files at a time, then links."""

    def run(step: Step) -> str:
        return (shlex.join(step.command) + "\n" if verbose else "") + _run(step.command)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outputs = list(pool.map(run, steps[:-1]))
    return "".join([*outputs, run(steps[-1])])


def _run(command: Sequence[str], folder: Path | None = None) -> str:
    """Runs a command; raises a BuildError with all it has printed where it fails."""
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise BuildError(done.stdout.strip() or f"{command[0]} failed without a message")
    return done.stdout


def _install(library: Path, destination: Path) -> Path:
    """Puts the library in place by a rename: a process that has loaded the old one keeps it."""
    destination.mkdir(parents=True, exist_ok=True)
    target = destination / library.name
    partial = destination / f".{library.name}.{os.getpid()}"
    try:
        shutil.copy(library, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target
