"""Triton kernels for NVIDIA GPUs.

Every pass has a file that reads like its section of docs/math.md: `forward`, `backward`,
`second_backward`. `pair` and `radial` have what they share, `tiles` the sizes, `launch` turns the
operators' inputs into arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..inputs import Inputs, Tangent
from .backward import launch_attention_bwd as attention_bwd
from .forward import launch_attention_fwd as attention
from .second_backward import launch_attention_bwd_bwd as attention_bwd_bwd

def why_not(device, inputs=None):
    return None
