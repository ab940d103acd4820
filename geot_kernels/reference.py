"""The specification: geometric attention in plain PyTorch, differentiable to any order.

    bias      S_ij = κ q_i·k_j + f_h(z_ij)              softmax   P_ij = exp(S_ij) / Σ_j exp(S_ij)
    filter    S_ij = κ Σ_c q_ic k_jc f_hc(z_ij)         linear    P_ij = S_ij

    O_i = Σ_j P_ij v_j,    with GeoT's attention scale   P'_ij = (P_ij - m_i)(1 + s) + m_i

Everything of size `N²` is written to memory: read it, test against it, use it for molecules.
Sums over `j` run over the real atoms of the molecule, `j = i` included. Shapes are those of
`geot_kernels.geo_attention`, which documents the arguments; they are taken as checked here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .table import RadialTable


def geo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    radial: Callable[..., Tensor],
    *,
    mask: Tensor | None = None,
    ptr: Tensor | None = None,
    max_atoms: int | None = None,
    atom_types: Tensor | None = None,
    score: str = "bias",
    normalizer: str = "softmax",
    scale: float | None = None,
    attention_scale: Tensor | None = None,
) -> Tensor:
    """Computes `O_i = Σ_j P_ij v_j`; arguments and result as `geot_kernels.geo_attention`."""
    if ptr is not None:
        rows = PackedRows(ptr, max_atoms, len(q))
        q, k, v, positions = (rows.pad(x) for x in (q, k, v, positions))
        atom_types = None if atom_types is None else rows.pad(atom_types)
        mask = rows.mask
    weights, mask = _weights(
        q, k, positions, radial, mask, atom_types, score, normalizer, scale, attention_scale
    )
    v_real = zero_padding(v, mask).to(weights.dtype)
    out = zero_padding(torch.einsum("bhij,bjhd->bihd", weights, v_real), mask).to(q.dtype)
    return out if ptr is None else rows.unpad(out)


def attention_weights(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    radial: Callable[..., Tensor],
    *,
    mask: Tensor | None = None,
    ptr: Tensor | None = None,
    max_atoms: int | None = None,
    atom_types: Tensor | None = None,
    score: str = "bias",
    normalizer: str = "softmax",
    scale: float | None = None,
    attention_scale: Tensor | None = None,
) -> Tensor:
    """Computes `P [B, H, N, N]`; arguments as `geot_kernels.attention_weights`."""
    if ptr is not None:
        rows = PackedRows(ptr, max_atoms, len(q))
        q, k, positions = (rows.pad(x) for x in (q, k, positions))
        atom_types = None if atom_types is None else rows.pad(atom_types)
        mask = rows.mask
    weights, _ = _weights(
        q, k, positions, radial, mask, atom_types, score, normalizer, scale, attention_scale
    )
    return weights.to(q.dtype)


def _weights(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    radial: Callable[..., Tensor],
    mask: Tensor | None,
    atom_types: Tensor | None,
    score: str,
    normalizer: str,
    scale: float | None,
    attention_scale: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Computes the weights `[B, H, N, N]` in the compute dtype, 0 on padding."""
    dtype = compute_dtype(q.dtype)
    q, k = (zero_padding(x, mask).to(dtype) for x in (q, k))
    positions = zero_padding(positions, mask).to(dtype)
    dist = distances(positions, positions)
    types: tuple[Any, ...] = ()
    if atom_types is not None:
        types_i = zero_padding(atom_types, mask).long()
        types = (
            types_i[:, :, None].expand_as(dist),
            types_i[:, None, :].expand_as(dist),
        )
    if isinstance(radial, RadialTable):
        radial = cast_table(radial, dtype)
        f = radial(dist, *types) if radial.pair_index is not None else radial(dist)
    else:
        flat = [x.reshape(-1) for x in (dist, *types)]
        channels = q.shape[2] if score == "bias" else q.shape[2] * q.shape[3]
        f = radial(*flat)
        if f.shape != (dist.numel(), channels):
            raise ValueError(
                f"radial: expected [M, C={channels}] for score {score!r}, got {list(f.shape)}"
            )
        f = f.view(*dist.shape, channels).to(dtype)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    weights = normalize(scores(q, k, f, score, scale), mask, normalizer)
    if attention_scale is not None:
        weights = rescale(weights, attention_scale, mask)
    elif mask is not None:
        weights = weights.masked_fill(~mask[:, None, :, None], 0)
    return weights, mask


def rescale(weights: Tensor, attention_scale: Tensor, mask: Tensor | None) -> Tensor:
    """Applies GeoT's attention scale to `P [B, H, N, N]`: `(P_ij - m_i)(1 + s) + m_i`."""
    s = attention_scale.to(compute_dtype(weights.dtype)).view(-1, 1, 1)  # [1 or H, 1, 1]
    count = weights.shape[-1] if mask is None else mask.sum(1).clamp(min=1)[:, None, None, None]
    mean = weights.sum(-1, keepdim=True) / count
    scaled = ((weights - mean) * (1 + s) + mean).to(weights.dtype)
    if mask is None:
        return scaled
    return scaled.masked_fill(~(mask[:, None, :, None] & mask[:, None, None, :]), 0)


def scores(q: Tensor, k: Tensor, f: Tensor, score: str, scale: float) -> Tensor:
    """Computes `S [B, H, I, J]` from `q [B, I, H, D]`, `k [B, J, H, D]`, `f [B, I, J, C]`."""
    s = products(q, k, f, score, scale)
    return s + f.permute(0, 3, 1, 2) if score == "bias" else s


def products(q: Tensor, k: Tensor, f: Tensor, score: str, scale: float) -> Tensor:
    """Computes the product in the score: `κ q_i·k_j`, or `κ Σ_c q_ic k_jc f_c` of a filter."""
    if score == "bias":
        return scale * torch.einsum("bihd,bjhd->bhij", q, k)
    filters: Tensor = f.unflatten(-1, q.shape[2:])  # [B, I, J, H, D]
    return scale * (q[:, :, None] * filters * k[:, None]).sum(-1).permute(0, 3, 1, 2)


def normalize(s: Tensor, mask: Tensor | None, normalizer: str) -> Tensor:
    """Computes `P [B, H, I, J]`, 0 on padded keys."""
    if normalizer == "linear":
        return mask_keys(s, mask)
    return _mask_scores(s, mask).softmax(-1)


def row_number(s: Tensor, mask: Tensor | None, normalizer: str) -> Tensor:
    """Computes `[B, I, H]`: `L_i = log Σ_j exp(S_ij)` for softmax, `r_i = Σ_j S_ij` for linear."""
    if normalizer == "linear":
        return mask_keys(s, mask).sum(-1).transpose(1, 2)
    return _mask_scores(s, mask).logsumexp(-1).transpose(1, 2)


def mask_keys(x: Tensor, mask: Tensor | None, value: float = 0.0) -> Tensor:
    """Puts a value where `j` is padding in `x [B, H, I, J]`."""
    return x if mask is None else x.masked_fill(~mask[:, None, None, :], value)


def _mask_scores(s: Tensor, mask: Tensor | None) -> Tensor:
    """Takes padded keys out of a softmax."""
    if mask is None:
        return s
    empty = ~mask.any(1, keepdim=True)  # a molecule without atoms: any finite row will do
    return mask_keys(s, mask | empty, -torch.inf)


def distances(x_i: Tensor, x_j: Tensor) -> Tensor:
    """Computes `d [..., I, J]` from positions `[..., I, 3]` and `[..., J, 3]`.

    Every derivative is 0 where the distance is 0.
    """
    square = (x_i.unsqueeze(-2) - x_j.unsqueeze(-3)).square().sum(-1)
    apart = square != 0
    return torch.where(apart, square, 1).sqrt() * apart


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Puts 0 into the padded rows of `x [B, N, ...]`, whatever stands there."""
    if mask is None:
        return x
    return x.masked_fill(~mask.view(*mask.shape, *(1,) * (x.ndim - 2)), 0)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, sums and geometry: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast_table(table: RadialTable, dtype: torch.dtype) -> RadialTable:
    """Casts the tensors of a table that carry numbers."""
    affine = None if table.affine is None else table.affine.to(dtype)
    return RadialTable(table.knots.to(dtype), table.r_min, table.r_max, table.pair_index, affine)


def largest_molecule(ptr: Tensor) -> int:
    """Atoms of the largest packed molecule, read back from the device; 0 where there is none."""
    return int(ptr.diff().max()) if len(ptr) > 1 else 0


class PackedRows:
    """The map between packed rows `[T, ...]` and padded ones `[B, N, ...]`.

    Args:
        ptr: `[B + 1]` int: molecule `b` is the rows `ptr[b]:ptr[b+1]`.
        max_atoms: `N`; None reads the largest molecule back from the device.
        num_rows: `T`.
    """

    def __init__(self, ptr: Tensor, max_atoms: int | None, num_rows: int) -> None:
        ptr = ptr.long()
        if max_atoms is None:
            max_atoms = largest_molecule(ptr)
        rows = ptr[:-1, None] + torch.arange(max_atoms, device=ptr.device)
        self.mask = rows < ptr[1:, None]  # [B, N]
        self._rows = torch.where(self.mask, rows, num_rows)
        index = torch.arange(num_rows, device=ptr.device)
        self.molecule = torch.searchsorted(ptr, index, right=True) - 1  # [T]
        self._place = index - ptr[self.molecule]

    def pad(self, x: Tensor) -> Tensor:
        """`[T, ...]` to `[B, N, ...]`, 0 on padding."""
        return torch.cat((x, x.new_zeros(1, *x.shape[1:])))[self._rows]

    def unpad(self, x: Tensor) -> Tensor:
        """`[B, N, ...]` to `[T, ...]`."""
        return x[self.molecule, self._place]
