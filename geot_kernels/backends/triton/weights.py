"""The weights `P_ij` themselves: nothing of their size is read, and they are written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..inputs import Inputs
from . import pair as pt
from .forward import online_softmax
from .launch import RUN_TIME, Problem
from .radial import ROWS, coordinate, evaluate, locate
from .tiles import weights_tiles


@triton.jit(do_not_specialize=RUN_TIME)
def _attention_weights_kernel(
    q_ptr,
    k_ptr,
    positions_ptr,
    radial_ptr,
    affine_ptr,
    mask_ptr,
    ptr_ptr,
    types_ptr,
    pair_index_ptr,
    weights_ptr,  # [B, H, M, M]
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    num_atoms,
    num_blocks,
    num_types,
    num_tables,
    num_intervals,
    r_min,
    r_max,
    per_h,
    scale,
    C: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    RADIAL: tl.constexpr,
    IS_FILTER: tl.constexpr,
    IS_LINEAR: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    h = pid % H
    block = (pid // H) % num_blocks
    b = pid // (H * num_blocks)
    first, _, last = pt.molecule(b, num_atoms, mask_ptr, ptr_ptr, 128)
    q_ptr = pt.feature_start(q_ptr, b, first, stride_qb, stride_qn, ptr_ptr is not None, ALIGN)
    k_ptr = pt.feature_start(k_ptr, b, first, stride_kb, stride_kn, ptr_ptr is not None, ALIGN)
    q_ptr = pt.of_head(q_ptr, h, stride_qh, ALIGN)
    k_ptr = pt.of_head(k_ptr, h, stride_kh, ALIGN)
    radial = (radial_ptr, num_intervals, num_tables, r_min, r_max, per_h)
    maps = (affine_ptr, pair_index_ptr, num_types, num_tables)
    SUM: tl.constexpr = positions_ptr.dtype.element_ty
    FEATURE: tl.constexpr = SUM if IS_FILTER else q_ptr.dtype.element_ty

    offs_i = block * BLOCK_I + tl.arange(0, BLOCK_I)
    real_i, x_i, types_i = pt.load_atoms(positions_ptr, types_ptr, mask_ptr, first, offs_i, last)
    q = pt.load_rows(q_ptr, offs_i, real_i, stride_qn, D, BLOCK_D, ALIGN).to(FEATURE)
    best = tl.full([BLOCK_I], -float("inf"), SUM)
    total = tl.zeros([BLOCK_I], SUM)
    row = (b.to(tl.int64) * H + h) * num_atoms + offs_i  # [I]
    tiles = (num_atoms + BLOCK_J - 1) // BLOCK_J
    # A softmax goes through the keys twice: for the sums of rows, then for the weights.
    for n in range(0, tiles if IS_LINEAR else 2 * tiles):
        offs_j = (n % tiles) * BLOCK_J + tl.arange(0, BLOCK_J)
        real_j, x_j, types_j = pt.load_atoms(
            positions_ptr, types_ptr, mask_ptr, first, offs_j, last
        )
        pairs = real_i[:, None] & real_j[None, :]
        geometry = pt.geometry(x_i, x_j, types_i, types_j, maps)
        table, z = geometry[1], geometry[3]
        place = locate(radial, coordinate(radial, z, pairs, RADIAL), table, C, RADIAL)
        k = pt.load_rows(k_ptr, offs_j, real_j, stride_kn, D, BLOCK_D, ALIGN).to(FEATURE)
        f = evaluate(radial, place, h, pairs, C, D, BLOCK_D, K, RADIAL, IS_FILTER, False)[0]
        s = pt.scores(q, k, f, scale, IS_FILTER, PRECISION)
        s = pt.without_padding(s, real_j, RADIAL == ROWS, IS_LINEAR)
        if not IS_LINEAR and n < tiles:
            step = online_softmax(s, best, total, IS_LINEAR)
            best, total = step[2], step[3]
        else:
            p = s
            if not IS_LINEAR:
                top = tl.where(total > 0, best, 0)
                p = tl.exp2((s - top[:, None]) * pt.LOG2E) / tl.where(total > 0, total, 1)[:, None]
            p = tl.where(pairs, p, 0).to(weights_ptr.dtype.element_ty)
            at = weights_ptr + (row * num_atoms)[:, None] + offs_j[None, :]
            there = (offs_i < num_atoms)[:, None] & (offs_j < num_atoms)[None, :]
            tl.store(at, p, mask=there)


def launch_attention_weights(inputs: Inputs) -> Tensor:
    """Computes the weights `[B, H, N, N]`, 0 on padding, in the dtype of `q`."""
    problem = Problem(inputs)
    problem.of_table()
    molecules, atoms, heads = problem.molecules, problem.atoms, problem.heads
    weights = problem.empty(molecules, heads, atoms, atoms, dtype=inputs.q.dtype)
    if not weights.numel():
        return weights
    tiles = weights_tiles(atoms, problem.block_d, problem.is_filter)
    blocks = -(-atoms // tiles.block_i)
    _attention_weights_kernel[(molecules * blocks * heads,)](
        *problem.features[:2],
        *problem.tensors,
        weights,
        *problem.strides[:6],
        atoms,
        blocks,
        *problem.numbers,
        **problem.constants,
        BLOCK_I=tiles.block_i,
        BLOCK_J=tiles.block_j,
        num_warps=tiles.num_warps,
        num_stages=1,
    )
    return weights
