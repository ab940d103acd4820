"""The backends: which there are, which can run, and their launchers.

A backend is a module with the launchers of the four operators (`attention`,
`attention_weights`, `attention_bwd`, `attention_bwd_bwd`; see `eager`) and `why_not`, which says
in one sentence why it cannot run. Modules are imported when they are first asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from .inputs import Inputs, Tangent

ORDER = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}  # of preference, by type of device
NAMES = ("triton", "cuda", "cpu", "eager", "reference")


class Backend(Protocol):
    """The launchers of a backend."""

    def why_not(self, device: torch.device, inputs: Inputs | None = None) -> str | None:
        """Says why it cannot run on a device, or these inputs; None where it can."""

    def attention(self, inputs: Inputs, forward_only: bool = False) -> tuple[Tensor, Tensor]:
        """Forward: `(out, row)`; with `forward_only` nobody will differentiate them."""

    def attention_weights(self, inputs: Inputs) -> Tensor:
        """The weights `[B, H, N, N]`."""

    def attention_bwd(
        self,
        inputs: Inputs,
        d_out: Tensor | None,
        d_row: Tensor | None,
        out: Tensor,
        row: Tensor,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """First backward: the gradients asked for of the six inputs."""

    def attention_bwd_bwd(
        self,
        inputs: Inputs,
        tangent: Tangent,
        d_out: Tensor | None,
        d_row: Tensor | None,
        out: Tensor,
        row: Tensor,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """Second backward: those of `(d_out, d_row, *six inputs)`."""


def check_name(backend: str | None) -> None:
    """Raises a ValueError where there is no backend of that name."""
    if backend is not None and backend not in NAMES:
        names = ", ".join(map(repr, NAMES))
        raise ValueError(f"backend: expected None or one of {names}, got {backend!r}")


@functools.cache
def load(name: str) -> Backend | str:
    """Imports a backend; what stands in the way comes back as a sentence."""
    if importlib.util.find_spec(f"{__name__}.{name}") is None:
        return f"this version of geot-kernels has no {name} kernels"
    try:
        return cast(Backend, importlib.import_module(f"{__name__}.{name}"))
    except ImportError as error:
        return f"it cannot be imported: {error}"


def why_not(name: str, device: torch.device, inputs: Inputs | None = None) -> str | None:
    """Says why a backend cannot run on a device, or these inputs; None where it can."""
    if name == "reference":
        return None
    backend = load(name)
    return backend if isinstance(backend, str) else backend.why_not(device, inputs)


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Says of each backend why it cannot run on a device, or None where it can.

    Args:
        device: None takes `cuda` where there is one, else `cpu`.

    Returns:
        Names to reasons. `reference` and `eager` are plain PyTorch and always run: `eager` inside
        the operators, in bounded memory; `reference` without them, to any order of gradient.

    Raises:
        RuntimeError: `device` is no device that PyTorch knows.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    return {name: why_not(name, device) for name in NAMES}


def choose(name: str, inputs: Inputs) -> Backend:
    """Picks the backend called `name`, or for `""` the first that can run these inputs.

    Raises:
        ValueError: The backend named cannot run; it never falls back.
    """
    device = inputs.q.device
    if name:
        reason = why_not(name, device, inputs)
        if reason is not None:
            raise ValueError(f"backend: expected one that can run here, got '{name}': {reason}")
        return cast(Backend, load(name))
    reasons = {}
    for candidate in ORDER.get(device.type, ()):
        reason = why_not(candidate, device, inputs)
        if reason is None:
            return cast(Backend, load(candidate))
        reasons[candidate] = reason
    _warn_unfused(device.type, "; ".join(f"{name}: {why}" for name, why in reasons.items()))
    return cast(Backend, load("eager"))


@functools.cache
def _warn_unfused(device: str, reasons: str) -> None:
    warnings.warn(
        f"geot_kernels: no fused kernel can run on '{device}' ({reasons}); using plain PyTorch, "
        "which is slower. Name backend='eager' to choose this without a warning.",
        stacklevel=2,
    )
