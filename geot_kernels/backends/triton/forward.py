"""Forward: `O_i = Σ_j P_ij v_j`, and the number of each row that the backward pass starts from.

A program has some query atoms of one molecule and goes through a group of heads, and for each
through tiles of key atoms. Where one tile takes all keys (`IS_WHOLE`), distances are computed once
for all heads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..inputs import Inputs
from . import pair as pt
from .launch import RUN_TIME, Problem
from .radial import ROWS, coordinate, evaluate, locate
from .tiles import forward_tiles


@triton.jit
def online_softmax(s, best, total, IS_LINEAR: tl.constexpr):
    """One step of the online softmax: `P` of a tile, how far older sums shrink, and the sums."""
    if IS_LINEAR:
        return s, 1, best, total + tl.sum(s, 1)
    else:
        top = tl.maximum(best, tl.max(s, 1))
        there = tl.where(top == -float("inf"), 0, top) * pt.LOG2E  # nothing real until now
        p = tl.exp2(s * pt.LOG2E - there[:, None])
        shrunk = tl.exp2(best * pt.LOG2E - there)
        return p, shrunk, top, total * shrunk + tl.sum(p, 1)


@triton.jit
def shrunk_rows(acc, shrunk, IS_FIRST: tl.constexpr):
    """Older sums, [I, D], brought to the new maximum."""
    if IS_FIRST:
        return acc
    else:
        return acc * shrunk[:, None]


@triton.jit
def row_number(best, total, IS_LINEAR: tl.constexpr):
    """`L_i = log Σ_j exp(S_ij)`, or `r_i`."""
    if IS_LINEAR:
        return total
    else:
        return best + pt.log2(tl.where(total > 0, total, 1)) * pt.LN2


@triton.jit(do_not_specialize=RUN_TIME)
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    radial_ptr,
    affine_ptr,
    mask_ptr,
    ptr_ptr,
    types_ptr,
    pair_index_ptr,
    out_ptr,  # [B, N, H, D]
    row_ptr,  # [B, N, H]
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    num_atoms,
    num_blocks,
    num_groups,
    heads_per_group,
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
    IS_WHOLE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    group = pid % num_groups
    block = (pid // num_groups) % num_blocks
    b = pid // (num_groups * num_blocks)
    first, count, last = pt.molecule(b, num_atoms, mask_ptr, ptr_ptr, BLOCK_J)
    if block * BLOCK_I >= count:
        return
    offs_i = block * BLOCK_I + tl.arange(0, BLOCK_I)
    there = offs_i < count
    real_i, x_i, types_i = pt.load_atoms(positions_ptr, types_ptr, mask_ptr, first, offs_i, last)
    q_ptr = pt.feature_start(q_ptr, b, first, stride_qb, stride_qn, ptr_ptr is not None, ALIGN)
    k_ptr = pt.feature_start(k_ptr, b, first, stride_kb, stride_kn, ptr_ptr is not None, ALIGN)
    v_ptr = pt.feature_start(v_ptr, b, first, stride_vb, stride_vn, ptr_ptr is not None, ALIGN)
    out_ptr += first * (H * D)
    row_ptr += first * H

    radial = (radial_ptr, num_intervals, num_tables, r_min, r_max, per_h)
    maps = (affine_ptr, pair_index_ptr, num_types, num_tables)
    offs_j = tl.arange(0, BLOCK_J)
    real_j, x_j, types_j = pt.load_atoms(positions_ptr, types_ptr, mask_ptr, first, offs_j, last)
    pairs = real_i[:, None] & real_j[None, :]
    geometry = pt.geometry(x_i, x_j, types_i, types_j, maps)
    table, z = geometry[1], geometry[3]
    SUM: tl.constexpr = z.dtype
    FEATURE: tl.constexpr = SUM if IS_FILTER else q_ptr.dtype.element_ty
    x = coordinate(radial, z, pairs, RADIAL)
    x = pt.in_layout_of_scores(x, FEATURE, IS_FILTER, PRECISION)
    place = locate(radial, x, table, C, RADIAL)

    for h in range(group * heads_per_group, min(H, (group + 1) * heads_per_group)):
        q = pt.load_rows(
            pt.of_head(q_ptr, h, stride_qh, ALIGN), offs_i, real_i, stride_qn, D, BLOCK_D, ALIGN
        )
        q = q.to(FEATURE)
        best = tl.full([BLOCK_I], -float("inf"), SUM)
        total = tl.zeros([BLOCK_I], SUM)
        acc = tl.zeros([BLOCK_I, BLOCK_D], SUM)
        for start in range(0, BLOCK_J if IS_WHOLE else last, BLOCK_J):
            if not IS_WHOLE:
                offs_j = start + tl.arange(0, BLOCK_J)
                real_j, x_j, types_j = pt.load_atoms(
                    positions_ptr, types_ptr, mask_ptr, first, offs_j, last
                )
                pairs = real_i[:, None] & real_j[None, :]
                geometry = pt.geometry(x_i, x_j, types_i, types_j, maps)
                table, z = geometry[1], geometry[3]
                x = coordinate(radial, z, pairs, RADIAL)
                place = locate(radial, x, table, C, RADIAL)
            k = pt.load_rows(
                pt.of_head(k_ptr, h, stride_kh, ALIGN),
                offs_j,
                real_j,
                stride_kn,
                D,
                BLOCK_D,
                ALIGN,
            )
            v = pt.load_rows(
                pt.of_head(v_ptr, h, stride_vh, ALIGN),
                offs_j,
                real_j,
                stride_vn,
                D,
                BLOCK_D,
                ALIGN,
            )
            k, v = k.to(FEATURE), v.to(FEATURE)
            f = evaluate(radial, place, h, pairs, C, D, BLOCK_D, K, RADIAL, IS_FILTER, False)[0]
            s = pt.scores(q, k, f, scale, IS_FILTER, PRECISION)
            s = pt.without_padding(s, real_j, RADIAL == ROWS, IS_LINEAR)
            p, shrunk, best, total = online_softmax(s, best, total, IS_LINEAR)
            acc = shrunk_rows(acc, shrunk, IS_LINEAR or IS_WHOLE) + pt.weigh_rows(
                p, v, IS_FILTER, PRECISION
            )
        if not IS_LINEAR:
            acc = acc * (1 / tl.where(total > 0, total, 1))[:, None]
        row = row_number(best, total, IS_LINEAR)
        acc = tl.where(real_i[:, None], acc, 0)
        pt.store_rows(out_ptr + h * D, acc, offs_i, there, H * D, D, BLOCK_D, ALIGN)
        tl.store(row_ptr + offs_i.to(tl.int64) * H + h, tl.where(real_i, row, 0), mask=there)


def launch_attention_fwd(inputs: Inputs, forward_only: bool = False) -> tuple[Tensor, Tensor]:
    """Computes `out`, like `q`, and `row`, `q`'s shape without `D` in the compute dtype.

    With `forward_only`, what 16-bit features make of a table may be good to 16 bits.
    """
    problem = Problem(inputs)
    problem.of_table(True, forward_only)
    shape = inputs.q.shape
    out, row = problem.empty(*shape, dtype=inputs.q.dtype), problem.empty(*shape[:-1])
    if not out.numel():
        return out, row
    tiles = forward_tiles(problem.atoms, problem.block_d, problem.is_filter, inputs.q.itemsize)
    blocks = -(-problem.atoms // tiles.block_i)
    groups, per_group = problem.groups(problem.molecules * blocks)
    _attention_fwd_kernel[(problem.molecules * blocks * groups,)](
        *problem.features,
        *problem.tensors,
        out,
        row,
        *problem.strides,
        problem.atoms,
        blocks,
        groups,
        per_group,
        *problem.numbers,
        **problem.constants,
        IS_WHOLE=tiles.is_whole,
        BLOCK_I=tiles.block_i,
        BLOCK_J=tiles.block_j,
        num_warps=tiles.num_warps,
        num_stages=1,
    )
    return out, row
