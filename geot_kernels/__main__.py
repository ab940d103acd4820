"""The report of what runs here: `python -m geot_kernels`; its command `build` compiles."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

import torch

from . import __version__, available_backends
from .backends.native import compile_library


def report() -> str:
    """Writes versions, devices, and each backend with the reason where it cannot run."""
    lines = [
        f"geot-kernels {__version__}",
        f"python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"torch {torch.__version__}, triton {_version('triton')}",
    ]
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device in devices:
        name = "" if device == "cpu" else f" ({torch.cuda.get_device_name(device)})"
        lines.append(f"\n{device}{name}")
        for backend, reason in available_backends(device).items():
            lines.append(f"  {backend:10} {'can run' if reason is None else f'no: {reason}'}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> int:
    """Prints the report, or compiles the kernels; returns an exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m geot_kernels", description="Says what runs here, and why something cannot."
    )
    parser.add_argument(
        "command", nargs="?", choices=["build"], help="compile the C++ and CUDA kernels"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="print the compiler's calls")
    arguments = parser.parse_args()
    if arguments.command == "build":
        return compile_library(arguments.verbose)
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
