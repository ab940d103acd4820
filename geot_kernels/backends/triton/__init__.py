"""Triton kernels for NVIDIA GPUs.

Every pass has a file that reads like its section of docs/math.md: `forward`, `backward`,
`second_backward`; `weights` are those of the forward pass. `pair` has the pair term, `radial` the
radial function, `radial_gradient` its adjoint. Before a launch: `tiles` chooses sizes, `tables`
reorders a table, `quantum` finds the unit of integer sums, `sweeps` divides the work of a backward
pass, `launch` turns the operators' inputs into arguments.
"""

from __future__ import annotations

import torch
import triton

from ..gpu import on_its_device, why_not_gpu
from ..inputs import Inputs
from .backward import launch_attention_bwd
from .forward import launch_attention_fwd
from .second_backward import launch_attention_bwd_bwd
from .weights import launch_attention_weights

__all__ = ["attention", "attention_bwd", "attention_bwd_bwd", "attention_weights", "why_not"]

attention = on_its_device(launch_attention_fwd)
attention_bwd = on_its_device(launch_attention_bwd)
attention_bwd_bwd = on_its_device(launch_attention_bwd_bwd)
attention_weights = on_its_device(launch_attention_weights)

_LARGEST_HEAD_DIM = 128
_MOST_TYPES = 256  # of an affine map: sums for each are kept in registers
_MOST_NUMBERS = 2**31  # of a radial function or a molecule: offsets there are 32 bits


def why_not(device: torch.device, inputs: Inputs | None = None) -> str | None:
    """Says why the kernels cannot run on a device, or these inputs; None where they can."""
    interpreted = triton.knobs.runtime.interpret
    if device.type == "cpu" and not interpreted:
        return (
            "its kernels run on 'cuda', not on 'cpu' (TRITON_INTERPRET=1 interprets them, slowly)"
        )
    if device.type != "cpu" and (reason := why_not_gpu(device)):
        return reason
    return None if inputs is None else _why_not_inputs(inputs, interpreted)


def _why_not_inputs(inputs: Inputs, interpreted: bool) -> str | None:
    if inputs.q.dtype == torch.float64 and not interpreted:
        return "its kernels compute in float32, and q is float64"
    if inputs.q.shape[-1] > _LARGEST_HEAD_DIM:
        most, got = _LARGEST_HEAD_DIM, inputs.q.shape[-1]
        return f"its kernels take at most {most} channels a head, not {got}"
    atoms = inputs.q.shape[-3] if inputs.max_atoms < 0 else inputs.max_atoms
    if atoms * inputs.q.shape[-2] * inputs.q.shape[-1] >= _MOST_NUMBERS:
        return "its kernels take molecules of fewer than 2^31 numbers q"
    if inputs.radial.numel() >= _MOST_NUMBERS:
        return "its kernels take radial functions of fewer than 2^31 numbers"
    if inputs.affine is not None and inputs.pair_index is not None:
        types = inputs.pair_index.shape[0]
        if types > _MOST_TYPES:
            return f"its kernels take affine maps of at most {_MOST_TYPES} types, not {types}"
    return None
