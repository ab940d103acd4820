"""The three passes in plain PyTorch, block by block in bounded memory.

What runs inside the operators where no fused kernel can, on any device, and what fused kernels
are compared with at second order. Every file reads like its section of the mathematics:
`forward` (1), `backward` (2), `second_backward` (3); `pair` has what all of them share.
"""

from __future__ import annotations

import torch

from ..inputs import Inputs
from .backward import attention_bwd
from .forward import attention, attention_weights
from .second_backward import attention_bwd_bwd

__all__ = ["attention", "attention_bwd", "attention_bwd_bwd", "attention_weights", "why_not"]


def why_not(device: torch.device, inputs: Inputs | None = None) -> str | None:
    """Plain PyTorch runs everything everywhere."""
    return None
