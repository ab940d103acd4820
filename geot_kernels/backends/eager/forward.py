"""Forward: `O_i = Σ_j P_ij v_j`, and the number of each row that the backward pass starts from."""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference import normalize, row_number
from ..inputs import Inputs
from .pair import Batch


def attention(inputs: Inputs, forward_only: bool = False) -> tuple[Tensor, Tensor]:
    """Computes `out`, like `q`, and `row`, `q`'s shape without `D` in the compute dtype.

    `row` is `L_i = log Σ_j exp(S_ij)` for softmax and `r_i = Σ_j S_ij` for linear.
    """
    batch = Batch(inputs)
    out, row = batch.zeros(*batch.q.shape), batch.zeros(*batch.q.shape[:3])
    for block in batch.blocks():
        s = block.scores(block.radial().value())
        weights = normalize(s, block.mask, inputs.normalizer)
        row[block.at] = row_number(s, block.mask, inputs.normalizer)
        out[block.at] = torch.einsum("bhij,bjhd->bihd", weights, block.v)
    return batch.store(out, inputs.q.dtype), batch.store(row, batch.dtype)


def attention_weights(inputs: Inputs) -> Tensor:
    """Computes `P [B, H, N, N]`, 0 on padding, in the dtype of `q`."""
    batch = Batch(inputs)
    num_molecules, num_atoms, num_heads, _ = batch.q.shape
    out = inputs.q.new_zeros(num_molecules, num_heads, num_atoms, num_atoms)
    for block in batch.blocks():
        s = block.scores(block.radial().value())
        weights = normalize(s, block.mask, inputs.normalizer)
        if batch.mask is not None:
            weights = weights.masked_fill(~batch.mask[block.at][:, None, :, None], 0)
        (molecules, rows), (_, keys) = block.at, block.keys
        out[molecules, :, rows, keys] = weights.to(out.dtype)
    return out
