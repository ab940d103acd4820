"""The C++ kernels for CPUs: the three passes of `csrc/cpu`, behind the operators `geot_cpu::*`.

float32 and float64 as they are; 16-bit features are computed with in float32, and every result
is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import eager
from .eager import attention_weights
from .inputs import Inputs, Tangent
from .native import load_library

__all__ = ["attention", "attention_bwd", "attention_bwd_bwd", "attention_weights", "why_not"]

_EXACT = (torch.float32, torch.float64)


def why_not(device: torch.device, inputs: Inputs | None = None) -> str | None:
    """Says what is missing: the device, or the compiled library."""
    if device.type != "cpu":
        return f"its kernels run on 'cpu', not on '{device.type}'"
    return load_library("cpu")


def attention(inputs: Inputs, forward_only: bool = False) -> tuple[Tensor, Tensor]:
    """Forward: `(out, row)`."""
    out, row = torch.ops.geot_cpu.attention.default(*_arguments(inputs))
    return out.to(inputs.q.dtype), row


def attention_bwd(
    inputs: Inputs,
    d_out: Tensor | None,
    d_row: Tensor | None,
    out: Tensor,
    row: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """First backward: those of the six gradients that `needs` asks for."""
    arguments = _arguments(inputs)
    out = _unrounded(inputs, arguments, out)
    grads = torch.ops.geot_cpu.attention_bwd.default(
        _upcast(d_out), d_row, out, row, *arguments, _bits(needs)
    )
    return _rounded(grads, (*inputs[:3], inputs.positions, inputs.radial, inputs.affine), needs)


def attention_bwd_bwd(
    inputs: Inputs,
    tangent: Tangent,
    d_out: Tensor | None,
    d_row: Tensor | None,
    out: Tensor,
    row: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Second backward: those of `(d_out, d_row, *six inputs)` that `needs` asks for.

    That of Gaussians goes through plain PyTorch, block by block.
    """
    if inputs.radial.ndim == 2:
        return eager.attention_bwd_bwd(inputs, tangent, d_out, d_row, out, row, needs)
    arguments = _arguments(inputs)
    out = _unrounded(inputs, arguments, out)
    q_dot, k_dot, v_dot = map(_upcast, tangent[:3])
    grads = torch.ops.geot_cpu.attention_bwd_bwd.default(
        q_dot,
        k_dot,
        v_dot,
        *tangent[3:],
        _upcast(d_out),
        d_row,
        out,
        row,
        *arguments,
        _bits(needs),
    )
    return _rounded(grads, (inputs.q, row, *inputs[:6]), needs)


def _arguments(inputs: Inputs) -> tuple[Any, ...]:
    """The operators' arguments: features upcast, indices int64, variants as flags."""
    q, k, v, x, radial, affine, mask, ptr, types, pairs, _, r_min, r_max, scale, score, norm = (
        inputs
    )
    if q.dtype not in _EXACT:
        q, k, v = q.float(), k.float(), v.float()
    if ptr is not None and ptr.dtype != torch.int64:
        ptr = ptr.long()
    if types is not None and pairs is not None:
        types, pairs = types.long(), pairs.long()
    flags = (score == "filter", norm == "linear")
    return q, k, v, x, radial, affine, mask, ptr, types, pairs, r_min, r_max, scale, *flags


def _upcast(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype in _EXACT else x.float()


def _unrounded(inputs: Inputs, arguments: tuple[Any, ...], out: Tensor) -> Tensor:
    """The output as it was before it was rounded to 16 bits: the softmax's gradient needs it."""
    if out.dtype in _EXACT:
        return out
    if inputs.normalizer == "linear":
        return out.float()
    unrounded: Tensor = torch.ops.geot_cpu.attention.default(*arguments)[0]
    return unrounded


def _bits(needs: Sequence[bool]) -> int:
    return sum(1 << i for i, needed in enumerate(needs) if needed)


def _rounded(
    grads: list[Tensor], like: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    wanted = [x for x, needed in zip(like, needs, strict=True) if needed and x is not None]
    return [g.to(x.dtype) for g, x in zip(grads, wanted, strict=True)]
