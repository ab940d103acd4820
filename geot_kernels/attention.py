"""The public functions: `geo_attention`, `attention_weights`, `check_inputs`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .backends import check_name, choose
from .checks import autocast, check_metadata, check_values, make_inputs
from .radial import GaussianSum
from .table import RadialTable, autocast_off


def geo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    radial: RadialTable | GaussianSum | Callable[..., Tensor],
    *,
    mask: Tensor | None = None,
    ptr: Tensor | None = None,
    max_atoms: int | None = None,
    atom_types: Tensor | None = None,
    score: str = "bias",
    normalizer: str = "softmax",
    scale: float | None = None,
    attention_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Computes attention whose scores carry a learned function of the interatomic distance.

        bias      S_ij = κ q_i·k_j + f_h(z_ij)          softmax   P_ij = exp(S_ij) / Σ_j exp(S_ij)
        filter    S_ij = κ Σ_c q_ic k_jc f_hc(z_ij)     linear    P_ij = S_ij
        O_i = Σ_j P_ij v_j,    z_ij = |x_i - x_j|, or m_p |x_i - x_j| + c_p for pairs of types

    Sums run over the real atoms `j` of the molecule, `j = i` included (distance 0). Rows of
    padded atoms give 0 and receive gradient 0, and what stands in them, NaN included, is not read.

    Args:
        q: `[B, N, H, D]`, or packed `[T, H, D]` with `ptr`; float32, float64, bfloat16 or
            float16. Differentiable, twice.
        k: Like `q`. Differentiable, twice.
        v: Like `q`. Differentiable, twice.
        positions: `[B, N, 3]` (packed `[T, 3]`), Å; float32 or float64. Differentiable, twice.
        radial: The radial function `f`, `C = H` channels for the score `bias`, `H*D` for
            `filter`: a `RadialTable` (differentiable in knots and affine map, twice), a
            `GaussianSum` (score `bias`; likewise), or with `backend="reference"` any callable,
            distances `[M]` to `[M, C]`.
        mask: bool `[B, N]`, **True for a real atom**, in any pattern (`nn.MultiheadAttention`'s
            `key_padding_mask` says True for padding); None: all atoms are real.
        ptr: int `[B+1]`: molecule `b` is the packed rows `ptr[b]:ptr[b+1]`.
        max_atoms: Size of the largest packed molecule; without it that is read back from the
            device.
        atom_types: int `[B, N]` (packed `[T]`), `0..T-1`; needed where `radial` has a
            `pair_index`, and where a callable takes types.
        score: `"bias"` or `"filter"`.
        normalizer: `"softmax"` or `"linear"`.
        scale: κ; None: `1/sqrt(D)`.
        attention_scale: GeoT's `s`, a scalar tensor or `[H]`: `P'_ij = (P_ij - m_i)(1 + s) + m_i`
            with the row's mean `m_i` over the real atoms. Differentiable, twice.
        backend: None takes the first that can run: `"triton"`, `"cuda"` on a GPU, `"cpu"`; then
            `"eager"`, plain PyTorch in bounded memory, with a warning. `"reference"` is plain
            PyTorch without operators, differentiable to any order. A backend that is named and
            cannot run raises; `available_backends` says why.

    Returns:
        Like `q`; under autocast in its dtype.

    Raises:
        TypeError: An argument is no tensor, or of the wrong dtype.
        ValueError: A shape, a device, a name, a combination or the backend is wrong.
        NotImplementedError: A third derivative was taken of anything but `backend="reference"`.

    Source: the bias of Graphormer-3D (Shi et al., arXiv 2203.04810), the filter and the attention
    scale of GeoT (Kwak et al., ACS Omega 2023, arXiv 2106.15516).
    """
    _check_backend(backend, radial)
    options: dict[str, Any] = {
        "mask": mask,
        "ptr": ptr,
        "max_atoms": max_atoms,
        "atom_types": atom_types,
        "score": score,
        "normalizer": normalizer,
        "scale": scale,
    }
    check_metadata(q, k, v, positions, radial, attention_scale=attention_scale, **options)
    q, k, v = autocast(q, k, v)
    if not isinstance(radial, (RadialTable, GaussianSum)) or backend == "reference":
        with autocast_off(q.device.type):
            return reference.geo_attention(
                q, k, v, positions, radial, attention_scale=attention_scale, **options
            )
    inputs = make_inputs(q, k, v, positions, radial, **options)
    out: Tensor
    out, row = ops._attention(*inputs, backend or "")
    if attention_scale is None:
        return out
    return _rescale(out, row, inputs.v, attention_scale, mask, ptr, normalizer)


def attention_weights(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    radial: RadialTable | GaussianSum | Callable[..., Tensor],
    *,
    mask: Tensor | None = None,
    ptr: Tensor | None = None,
    max_atoms: int | None = None,
    atom_types: Tensor | None = None,
    score: str = "bias",
    normalizer: str = "softmax",
    scale: float | None = None,
    attention_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Computes the weights `P_ij` that `geo_attention` multiplies the values with.

    A second pass over the pairs, whose result has `N²` entries for each head. Differentiable, to
    any order (gradients come from the reference formulas, at their cost in memory).

    Args:
        q: As for `geo_attention`, and so are all other arguments.
        k: Like `q`.
        positions: `[B, N, 3]` (packed `[T, 3]`), Å.
        radial: The radial function.
        mask: bool `[B, N]`, True for a real atom.
        ptr: int `[B+1]`, packed layout.
        max_atoms: Size of the largest packed molecule; give it under `torch.compile`, since the
            shape of the result depends on it.
        atom_types: int `[B, N]` (packed `[T]`).
        score: `"bias"` or `"filter"`.
        normalizer: `"softmax"` or `"linear"`.
        scale: κ; None: `1/sqrt(D)`.
        attention_scale: GeoT's `s`, a scalar tensor or `[H]`.
        backend: As for `geo_attention`.

    Returns:
        `[B, H, N, N]` (packed `[B, H, max_atoms, max_atoms]`) in the dtype of `q`, query atom `i`
        before key atom `j`, exact zeros where either is padding.

    Raises:
        TypeError: As for `geo_attention`.
        ValueError: As for `geo_attention`.
    """
    _check_backend(backend, radial)
    options: dict[str, Any] = {
        "mask": mask,
        "ptr": ptr,
        "max_atoms": max_atoms,
        "atom_types": atom_types,
        "score": score,
        "normalizer": normalizer,
        "scale": scale,
    }
    check_metadata(q, k, q, positions, radial, attention_scale=attention_scale, **options)
    q, k = autocast(q, k)
    if ptr is not None and max_atoms is None:
        options["max_atoms"] = reference.largest_molecule(ptr)
    if not isinstance(radial, (RadialTable, GaussianSum)) or backend == "reference":
        with autocast_off(q.device.type):
            return reference.attention_weights(
                q, k, positions, radial, attention_scale=attention_scale, **options
            )
    inputs = make_inputs(q, k, q, positions, radial, **options)
    weights: Tensor = ops._attention_weights(*inputs[:2], *inputs[3:], backend or "")
    if attention_scale is None:
        return weights
    if ptr is not None:
        mask = torch.arange(weights.shape[-1], device=ptr.device) < ptr.diff()[:, None]
    return reference.rescale(weights, attention_scale, mask)


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    radial: RadialTable | GaussianSum | Callable[..., Tensor],
    *,
    mask: Tensor | None = None,
    ptr: Tensor | None = None,
    max_atoms: int | None = None,
    atom_types: Tensor | None = None,
    score: str = "bias",
    normalizer: str = "softmax",
    scale: float | None = None,
    attention_scale: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Checks the arguments of `geo_attention`, values included, and waits for the device.

    `geo_attention` itself reads shapes, dtypes and devices only. With `GEOT_CHECK=1` in the
    environment the operators make these checks in every call.

    Args:
        q: As for `geo_attention`, and so are all other arguments.
        k: Like `q`.
        v: Like `q`.
        positions: `[B, N, 3]` (packed `[T, 3]`), Å.
        radial: The radial function.
        mask: bool `[B, N]`, True for a real atom.
        ptr: int `[B+1]`, packed layout.
        max_atoms: Size of the largest packed molecule.
        atom_types: int `[B, N]` (packed `[T]`).
        score: `"bias"` or `"filter"`.
        normalizer: `"softmax"` or `"linear"`.
        scale: κ.
        attention_scale: GeoT's `s`.
        backend: As for `geo_attention`.

    Raises:
        TypeError: As `geo_attention` raises it.
        ValueError: As `geo_attention` raises it; or `ptr` does not rise from 0 to `T`, a molecule
            is larger than `max_atoms`, a type is out of range, or the position of a real atom is
            not finite.
    """
    _check_backend(backend, radial)
    options: dict[str, Any] = {
        "mask": mask,
        "ptr": ptr,
        "max_atoms": max_atoms,
        "atom_types": atom_types,
        "score": score,
        "normalizer": normalizer,
        "scale": scale,
    }
    check_metadata(q, k, v, positions, radial, attention_scale=attention_scale, **options)
    if not isinstance(radial, (RadialTable, GaussianSum)):
        empty = q.new_zeros(1, 2, 2, 0)
        radial = RadialTable(empty, 0.0, 1.0)
    inputs = make_inputs(q, k, v, positions, radial, **options)
    check_values(inputs)
    if backend is not None and backend != "reference":
        choose(backend, inputs)


def _check_backend(backend: str | None, radial: object) -> None:
    check_name(backend)
    if isinstance(radial, (RadialTable, GaussianSum)):
        return
    if not callable(radial):
        raise TypeError(
            f"radial: expected a RadialTable, a GaussianSum or a callable, "
            f"got {type(radial).__name__}"
        )
    if backend != "reference":
        raise ValueError(
            f"radial: expected a RadialTable or a GaussianSum, got {type(radial).__name__}: "
            "tabulate(radial) makes a table; backend='reference' takes any callable"
        )


def _rescale(
    out: Tensor,
    row: Tensor,
    v: Tensor,
    attention_scale: Tensor,
    mask: Tensor | None,
    ptr: Tensor | None,
    normalizer: str,
) -> Tensor:
    """Applies GeoT's attention scale: `O' = (1 + s) O - s m_i Σ_j v_j`, `m_i = r_i / n_b`."""
    dtype = reference.compute_dtype(out.dtype)
    s = attention_scale.to(dtype).view(-1, 1)  # [1 or H, 1]
    if ptr is not None:
        counts = ptr.diff()
        molecule = torch.repeat_interleave(counts, output_size=v.shape[0])
        sums = v.new_zeros(counts.shape[0], *v.shape[1:], dtype=dtype)
        total = sums.index_add(0, molecule, v.to(dtype))[molecule]  # [T, H, D]
        count = counts[molecule][:, None].to(dtype)  # [T, 1]
    else:
        total = reference.zero_padding(v, mask).to(dtype).sum(1, keepdim=True)  # [B, 1, H, D]
        real = torch.ones_like(out[..., 0, 0], dtype=torch.bool) if mask is None else mask
        count = real.sum(1).clamp(min=1)[:, None, None].to(dtype)  # [B, 1, 1]
    mean = (1 / count if normalizer == "softmax" else row / count).unsqueeze(-1)
    rescaled = (1 + s) * out - s * mean * total
    return reference.zero_padding(rescaled, mask).to(out.dtype)
