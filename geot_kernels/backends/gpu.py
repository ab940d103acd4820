"""What the backends for GPUs share: the right device, and which GPUs will do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

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
