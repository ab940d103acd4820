"""What the backends for GPUs share: which GPUs will do, the right device, reading of inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..reference import largest_molecule
from .inputs import Inputs

_LEAST_CAPABILITY = (8, 0)
_Launcher = TypeVar("_Launcher", bound=Callable[..., Any])


def on_its_device(launcher: _Launcher) -> _Launcher:
    """Kernels are launched on the current device: makes it that of the tensors."""

    @functools.wraps(launcher)
    def launch(inputs: Inputs, *rest: Any) -> Any:
        device = inputs.q.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launcher(inputs, *rest)
        with torch.cuda.device(device):
            return launcher(inputs, *rest)

    return cast(_Launcher, launch)


@functools.cache
def why_not_gpu(device: torch.device) -> str | None:
    """Says why kernels for NVIDIA GPUs cannot run on a device; None where they can."""
    if device.type != "cuda":
        return f"its kernels run on 'cuda', not on '{device.type}'"
    if torch.version.hip is not None:
        return "its kernels are written for NVIDIA GPUs, and this PyTorch is built for AMD's"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < _LEAST_CAPABILITY:
        return (
            f"its kernels need compute capability 8.0 or later, and {device} has {major}.{minor}"
        )
    return None


def molecules_and_atoms(inputs: Inputs) -> tuple[int, int]:
    """`B`, and atoms of the largest molecule, padding included."""
    if inputs.ptr is None:
        return inputs.q.shape[0], inputs.q.shape[1]
    atoms = inputs.max_atoms
    return inputs.ptr.shape[0] - 1, largest_molecule(inputs.ptr) if atoms < 0 else atoms


def contiguous(x: Tensor | None) -> Tensor | None:
    """The same of what may be absent."""
    return None if x is None else x.contiguous()
