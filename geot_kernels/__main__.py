"""The report of what runs here: `python -m geot_kernels`."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import __version__, available_backends


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


if __name__ == "__main__":
    print(report())
