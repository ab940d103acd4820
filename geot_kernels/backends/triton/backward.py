"""First backward: the gradients of `(q, k, v, positions, radial, affine)`.

    A_ij = dO_i·v_j + dr_i
    softmax:  δ_i = Σ_j P_ij A_ij,  E_ij = P_ij (A_ij - δ_i)        linear:  E_ij = A_ij
    dv_j = Σ_i P_ij dO_i,   E pulls back on the scores,   b_ij = dL/dz_ij on the positions

One launch. Where a tile takes all keys of a molecule (`IS_WHOLE`), a program has all of them for a
group of heads, and every pair is computed once. In larger molecules some programs have keys and go
through the query atoms (dk, dv), the others have query atoms and go through the keys (dq, the
radial function); both pull back on the positions, each into sums of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import Inputs
from . import pair as pt
from . import radial_gradient as rg
from .launch import RUN_TIME, Problem
from .quantum import launch_quantum
from .radial import ROWS, coordinate, evaluate, locate
from .radial_gradient import RadialSums
from .sweeps import GeometrySums, Sweeps
from .tiles import backward_tiles


@triton.jit
def coefficients(
    s,
    a,
    log_sum,
    shift,
    pairs,
    AXIS: tl.constexpr,
    IS_DONE: tl.constexpr,
    IS_LINEAR: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """`P` and `E` from scores and `dO·v`, keys along `AXIS`; `shift` is `dr_i` or `-δ_i`."""
    p = pt.weights(s, tl.expand_dims(log_sum, AXIS), pairs, IS_DONE, IS_LINEAR)
    if IS_LINEAR:
        return p, tl.where(pairs, a + tl.expand_dims(shift, AXIS), 0)
    elif IS_WHOLE:
        # Normalised again: L is rounded, and where the forward pass read words, good to 16 bits.
        p *= pt.reciprocal(tl.maximum(tl.sum(p, AXIS, keep_dims=True), 1e-30))
        return p, p * (a - tl.sum(p * a, AXIS, keep_dims=True))
    else:
        return p, p * (a + tl.expand_dims(shift, AXIS))


@triton.jit
def load_queries(
    q_ptr,
    stride_qn,
    stride_qh,
    d_out_ptr,
    out_ptr,
    row_ptr,
    d_row_ptr,
    first,
    count,
    h,
    offs,
    real,
    FEATURE: tl.constexpr,
    SUM: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """`q`, `dO`, `L`, and `dr` or `-δ` of some query atoms and a head."""
    at_head, at = first * (H * D) + h * D, (first + offs) * H + h
    q = pt.load_rows(
        pt.of_head(q_ptr, h, stride_qh, ALIGN), offs, real, stride_qn, D, BLOCK_D, ALIGN
    )
    d_out = pt.load_rows(d_out_ptr + at_head, offs, real, H * D, D, BLOCK_D, ALIGN)
    log_sum = pt.load_numbers(row_ptr, at, offs < count, SUM)  # 0 for padding
    shift = pt.load_numbers(d_row_ptr, at, real, SUM)
    if out_ptr is not None:
        out = pt.load_rows(out_ptr + at_head, offs, real, H * D, D, BLOCK_D, ALIGN)
        shift = -tl.sum(out.to(SUM) * d_out.to(SUM), 1)
    return q.to(FEATURE), d_out.to(FEATURE), log_sum, shift


@triton.jit
def key_tile(
    queries,
    results,
    first,
    count,
    b,
    h,
    offs_i,
    real_i,
    real_j,
    k,
    v,
    dk,
    dv,
    x,
    table,
    radial,
    scale,
    C: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    RADIAL: tl.constexpr,
    IS_FILTER: tl.constexpr,
    IS_LINEAR: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    NEEDS_GEOMETRY: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    FEATURE: tl.constexpr,
    SUM: tl.constexpr,
):
    """What some query atoms add to keys that a program has: dk, dv, and `dL/dz` [J, I].

    With keys as rows the products that are summed over query atoms start from registers.
    `queries` are what is read of query atoms, `results` what is wanted.
    """
    q_ptr, stride_qn, stride_qh, d_out_ptr, out_ptr, row_ptr, d_row_ptr = queries
    quantum_ptr, dq_ptr, dk_ptr, dv_ptr, d_radial_ptr = results
    pairs = real_j[:, None] & real_i[None, :]
    q, d_out, log_sum, shift = load_queries(
        q_ptr,
        stride_qn,
        stride_qh,
        d_out_ptr,
        out_ptr,
        row_ptr,
        d_row_ptr,
        first,
        count,
        h,
        offs_i,
        real_i,
        FEATURE,
        SUM,
        H,
        D,
        BLOCK_D,
        ALIGN,
    )
    place = locate(radial, x, table, C, RADIAL)
    f, f1 = evaluate(radial, place, h, pairs, C, D, BLOCK_D, K, RADIAL, IS_FILTER, NEEDS_GEOMETRY)
    s = pt.scores(k, q, f, scale, IS_FILTER, PRECISION)
    a = pt.inner_rows(v, d_out, IS_FILTER, PRECISION)
    p, e = coefficients(s, a, log_sum, shift, pairs, 0, RADIAL == ROWS, IS_LINEAR, IS_WHOLE)
    if dv_ptr is not None:
        dv += pt.weigh_rows(p, d_out, IS_FILTER, PRECISION)
    if dk_ptr is not None:
        dk += pt.pull_q(e, q, f, IS_FILTER, PRECISION)
    if IS_WHOLE and dq_ptr is not None:
        dq = scale * pt.pull_k(e, k, f, IS_FILTER, PRECISION)
        pt.store_rows(
            dq_ptr + first * (H * D) + h * D, dq, offs_i, offs_i < count, H * D, D, BLOCK_D, ALIGN
        )
    g = pt.pull_f(e, k, q, scale, IS_FILTER)
    if IS_WHOLE and d_radial_ptr is not None:
        rg.add(
            d_radial_ptr,
            quantum_ptr,
            b * H + h,
            radial,
            x,
            x,
            table,
            h,
            g,
            g,
            pairs,
            C,
            D,
            BLOCK_D,
            K,
            RADIAL,
            IS_FILTER,
            False,
        )
    if NEEDS_GEOMETRY:
        return dk, dv, pt.over_channels(g * f1, IS_FILTER)
    else:
        return dk, dv, x


@triton.jit(do_not_specialize=RUN_TIME)
def _attention_bwd_kernel(
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
    out_ptr,  # [B, N, H, D]; None where a tile has the whole row, and where linear
    row_ptr,  # [B, N, H]; None where linear
    d_out_ptr,  # [B, N, H, D]
    d_row_ptr,  # [B, N, H] or None
    quantum_ptr,
    dq_ptr,  # [B, N, H, D], or None, as all that follow
    dk_ptr,
    dv_ptr,
    row_vectors_ptr,  # [parts, B, N, 3]
    column_vectors_ptr,
    row_affine_ptr,  # [groups, B, N, 2, T]
    d_radial_ptr,
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
    num_rows,
    num_column_blocks,
    C: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    RADIAL: tl.constexpr,
    IS_FILTER: tl.constexpr,
    IS_LINEAR: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    IS_ROW_WHOLE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    group = pid % num_groups
    block = (pid // num_groups) % num_blocks
    b = pid // (num_groups * num_blocks)
    first, count, last = pt.molecule(b, num_atoms, mask_ptr, ptr_ptr, 128)
    q_ptr = pt.feature_start(q_ptr, b, first, stride_qb, stride_qn, ptr_ptr is not None, ALIGN)
    k_ptr = pt.feature_start(k_ptr, b, first, stride_kb, stride_kn, ptr_ptr is not None, ALIGN)
    v_ptr = pt.feature_start(v_ptr, b, first, stride_vb, stride_vn, ptr_ptr is not None, ALIGN)
    at_features = first * (H * D)
    queries = (q_ptr, stride_qn, stride_qh, d_out_ptr, out_ptr, row_ptr, d_row_ptr)
    results = (quantum_ptr, dq_ptr, dk_ptr, dv_ptr, d_radial_ptr)
    radial = (radial_ptr, num_intervals, num_tables, r_min, r_max, per_h)
    maps = (affine_ptr, pair_index_ptr, num_types, num_tables)
    SUM: tl.constexpr = positions_ptr.dtype.element_ty
    FEATURE: tl.constexpr = SUM if IS_FILTER else q_ptr.dtype.element_ty
    NEEDS_GEOMETRY: tl.constexpr = column_vectors_ptr is not None or row_affine_ptr is not None
    first_head = group * heads_per_group
    last_head = min(H, first_head + heads_per_group)

    if IS_WHOLE or block < num_column_blocks:  # these keys, all query atoms; tiles are [J, I]
        offs_j = block * BLOCK_J + tl.arange(0, BLOCK_J)
        if block * BLOCK_J >= count:
            return
        real_j, x_j, types_j = pt.load_atoms(
            positions_ptr, types_ptr, mask_ptr, first, offs_j, last
        )
        dx_j = pt.no_vectors(BLOCK_J, SUM)
        d_affine = rg.no_affine(BLOCK_J, BLOCK_T, SUM)
        kept_x, all_b = (), ()
        for n in tl.static_range(TILES):  # what the heads share, where it can be kept
            offs_i = n * BLOCK_I + tl.arange(0, BLOCK_I)
            real_i, x_i, types_i = pt.load_atoms(
                positions_ptr, types_ptr, mask_ptr, first, offs_i, last
            )
            d, table, m, z = pt.geometry(x_j, x_i, types_j, types_i, maps)
            x = coordinate(radial, z, real_j[:, None] & real_i[None, :], RADIAL)
            kept_x += (x,)
            all_b += (tl.zeros([BLOCK_J, BLOCK_I], SUM),)
        for h in range(first_head, last_head):
            # Opaque, so that what follows from them is found again and not kept in registers.
            offs_j = pt.opaque(block * BLOCK_J + tl.arange(0, BLOCK_J))
            real_j = pt.real_atoms(mask_ptr, first, offs_j, last)
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
            dk = tl.zeros([BLOCK_J, BLOCK_D], SUM)
            dv = tl.zeros([BLOCK_J, BLOCK_D], SUM)
            if TILES > 0:
                for n in tl.static_range(TILES):
                    offs_i = pt.opaque(n * BLOCK_I + tl.arange(0, BLOCK_I))
                    real_i = pt.real_atoms(mask_ptr, first, offs_i, last)
                    types_i = pt.load_types(types_ptr, first + offs_i, real_i)
                    # Found again for every head: that costs less than registers to keep it.
                    x = pt.opaque(kept_x[n])
                    table = pt.tables_of(types_j, types_i, maps)
                    dk, dv, slope = key_tile(
                        queries,
                        results,
                        first,
                        count,
                        b,
                        h,
                        offs_i,
                        real_i,
                        real_j,
                        k,
                        v,
                        dk,
                        dv,
                        x,
                        table,
                        radial,
                        scale,
                        C,
                        H,
                        D,
                        K,
                        RADIAL,
                        IS_FILTER,
                        IS_LINEAR,
                        IS_WHOLE,
                        NEEDS_GEOMETRY,
                        BLOCK_D,
                        ALIGN,
                        PRECISION,
                        FEATURE,
                        SUM,
                    )
                    if NEEDS_GEOMETRY:
                        all_b = pt.replaced(all_b, n, all_b[n] + slope)
            else:
                for start in range(0, count, BLOCK_I):
                    offs_i = start + tl.arange(0, BLOCK_I)
                    real_i, x_i, types_i = pt.load_atoms(
                        positions_ptr, types_ptr, mask_ptr, first, offs_i, last
                    )
                    d, table, m, z = pt.geometry(x_j, x_i, types_j, types_i, maps)
                    x = coordinate(radial, z, real_j[:, None] & real_i[None, :], RADIAL)
                    dk, dv, slope = key_tile(
                        queries,
                        results,
                        first,
                        count,
                        b,
                        h,
                        offs_i,
                        real_i,
                        real_j,
                        k,
                        v,
                        dk,
                        dv,
                        x,
                        table,
                        radial,
                        scale,
                        C,
                        H,
                        D,
                        K,
                        RADIAL,
                        IS_FILTER,
                        IS_LINEAR,
                        IS_WHOLE,
                        NEEDS_GEOMETRY,
                        BLOCK_D,
                        ALIGN,
                        PRECISION,
                        FEATURE,
                        SUM,
                    )
                    if NEEDS_GEOMETRY:
                        weight = m * slope * pt.inverse(d)
                        if IS_WHOLE and row_affine_ptr is not None:
                            d_affine = rg.add_affine(
                                d_affine, slope * d, slope, types_i, BLOCK_T, IS_FILTER
                            )
                        dx_j = pt.add_vectors(dx_j, pt.pull_vectors(weight, x_j, x_i, 1))
                        if IS_WHOLE and row_vectors_ptr is not None:
                            at_i = h * num_rows.to(tl.int64) + first + offs_i
                            dx_i = pt.pull_vectors(-weight, x_j, x_i, 0)
                            pt.store_vectors(row_vectors_ptr, dx_i, at_i, offs_i < count)
            if dk_ptr is not None:
                dk = tl.where(real_j[:, None], scale * dk, 0)
                pt.store_rows(
                    dk_ptr + at_features + h * D,
                    dk,
                    offs_j,
                    offs_j < count,
                    H * D,
                    D,
                    BLOCK_D,
                    ALIGN,
                )
            if dv_ptr is not None:
                pt.store_rows(
                    dv_ptr + at_features + h * D,
                    dv,
                    offs_j,
                    offs_j < count,
                    H * D,
                    D,
                    BLOCK_D,
                    ALIGN,
                )
        at_part = group * num_rows.to(tl.int64) + first
        if NEEDS_GEOMETRY:
            # Loaded again: kept until here they would take the registers of the products.
            offs_j = pt.opaque(block * BLOCK_J + tl.arange(0, BLOCK_J))
            real_j, x_j, types_j = pt.load_atoms(
                positions_ptr, types_ptr, mask_ptr, first, offs_j, last
            )
            for n in tl.static_range(TILES):
                offs_i = n * BLOCK_I + tl.arange(0, BLOCK_I)
                real_i, x_i, types_i = pt.load_atoms(
                    positions_ptr, types_ptr, mask_ptr, first, offs_i, last
                )
                d, table, m, z = pt.geometry(x_j, x_i, types_j, types_i, maps)
                if row_affine_ptr is not None:
                    d_affine = rg.add_affine(
                        d_affine, all_b[n] * d, all_b[n], types_i, BLOCK_T, IS_FILTER
                    )
                weight = m * all_b[n] * pt.inverse(d)
                dx_j = pt.add_vectors(dx_j, pt.pull_vectors(weight, x_j, x_i, 1))
                if row_vectors_ptr is not None:
                    dx_i = pt.pull_vectors(-weight, x_j, x_i, 0)
                    pt.store_vectors(row_vectors_ptr, dx_i, at_part + offs_i, offs_i < count)
            if IS_WHOLE and row_affine_ptr is not None:
                rg.store_affine(
                    row_affine_ptr, at_part + offs_j, offs_j < count, d_affine, BLOCK_T
                )
            if column_vectors_ptr is not None:
                pt.store_vectors(column_vectors_ptr, dx_j, at_part + offs_j, offs_j < count)
    else:  # these query atoms, all keys; tiles are [I, J]
        block -= num_column_blocks
        row_block = b * (num_blocks - num_column_blocks) + block
        offs_i = block * BLOCK_I + tl.arange(0, BLOCK_I)
        if block * BLOCK_I >= count:
            return
        real_i, x_i, types_i = pt.load_atoms(
            positions_ptr, types_ptr, mask_ptr, first, offs_i, last
        )
        dx_i = pt.no_vectors(BLOCK_I, SUM)
        affine_sums = rg.no_affine(BLOCK_I, BLOCK_T, SUM)
        for h in range(first_head, last_head):
            q, d_out, log_sum, shift = load_queries(
                q_ptr,
                stride_qn,
                stride_qh,
                d_out_ptr,
                out_ptr,
                row_ptr,
                d_row_ptr,
                first,
                count,
                h,
                offs_i,
                real_i,
                FEATURE,
                SUM,
                H,
                D,
                BLOCK_D,
                ALIGN,
            )
            dq = tl.zeros([BLOCK_I, BLOCK_D], SUM)
            for start in range(0, last, BLOCK_J):
                offs_j = start + tl.arange(0, BLOCK_J)
                real_j, x_j, types_j = pt.load_atoms(
                    positions_ptr, types_ptr, mask_ptr, first, offs_j, last
                )
                pairs = real_i[:, None] & real_j[None, :]
                d, table, m, z = pt.geometry(x_i, x_j, types_i, types_j, maps)
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
                f, f1 = evaluate(
                    radial, place, h, pairs, C, D, BLOCK_D, K, RADIAL, IS_FILTER, NEEDS_GEOMETRY
                )
                s = pt.scores(q, k, f, scale, IS_FILTER, PRECISION)
                a = pt.inner_rows(d_out, v, IS_FILTER, PRECISION)
                e = coefficients(
                    s, a, log_sum, shift, pairs, 1, RADIAL == ROWS, IS_LINEAR, IS_ROW_WHOLE
                )[1]
                if dq_ptr is not None:
                    dq += pt.pull_q(e, k, f, IS_FILTER, PRECISION)
                g = pt.pull_f(e, q, k, scale, IS_FILTER)
                if d_radial_ptr is not None:
                    rg.add(
                        d_radial_ptr,
                        quantum_ptr,
                        row_block * H + h,
                        radial,
                        x,
                        x,
                        table,
                        h,
                        g,
                        g,
                        pairs,
                        C,
                        D,
                        BLOCK_D,
                        K,
                        RADIAL,
                        IS_FILTER,
                        False,
                    )
                if NEEDS_GEOMETRY:
                    slope = pt.over_channels(g * f1, IS_FILTER)
                    weight = m * slope * pt.inverse(d)
                    dx_i = pt.add_vectors(dx_i, pt.pull_vectors(weight, x_i, x_j, 1))
                    if row_affine_ptr is not None:
                        affine_sums = rg.add_affine(
                            affine_sums, slope * d, slope, types_j, BLOCK_T, IS_FILTER
                        )
            if dq_ptr is not None:
                pt.store_rows(
                    dq_ptr + at_features + h * D,
                    scale * dq,
                    offs_i,
                    offs_i < count,
                    H * D,
                    D,
                    BLOCK_D,
                    ALIGN,
                )
        at_part = group * num_rows.to(tl.int64) + first
        if row_vectors_ptr is not None:
            pt.store_vectors(row_vectors_ptr, dx_i, at_part + offs_i, offs_i < count)
        if row_affine_ptr is not None:
            rg.store_affine(row_affine_ptr, at_part + offs_i, offs_i < count, affine_sums, BLOCK_T)


def launch_attention_bwd(
    inputs: Inputs,
    d_out: Tensor | None,
    d_row: Tensor | None,
    out: Tensor,
    row: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Computes those of the six gradients that `needs` asks for."""
    problem = Problem(inputs)
    problem.of_table()
    shape, dtype = inputs.q.shape, inputs.q.dtype
    d_out = torch.zeros_like(out) if d_out is None else d_out.contiguous()
    d_row = None if d_row is None else d_row.contiguous()
    out, row = out.contiguous(), row.contiguous()
    dq, dk, dv = (problem.empty(*shape, dtype=dtype) if needed else None for needed in needs[:3])
    tiles = backward_tiles(problem.atoms, problem.block_d, problem.is_filter, inputs.q.itemsize)
    sweeps = Sweeps(problem, tiles)
    geometry = GeometrySums(problem, sweeps, needs[3], needs[5])
    sums = None
    if needs[4]:
        quantum = functools.partial(launch_quantum, problem, d_out, d_row)
        sums = RadialSums(problem, sweeps.row_programs, quantum, False)
    results = (dq, dk, dv, geometry.rows, geometry.columns, geometry.affine)
    d_radial = sums and sums.sums
    launch = functools.partial(_launch, problem, out, row, d_out, d_row, sums and sums.quantum)
    if d_radial is None or not problem.adds_by_atomics():
        launch(sweeps, (*results, d_radial))
    else:  # a launch of its own, whose tiles are small: atomic additions need many registers
        if any(x is not None for x in results):
            launch(sweeps, (*results, None))
        launch(Sweeps.of_rows(problem, False), (None,) * len(results) + (d_radial,))
    gradients = (
        dq,
        dk,
        dv,
        geometry.positions() if needs[3] else None,
        sums.gradient() if sums else None,
        geometry.affine_gradient() if needs[5] else None,
    )
    return [x for x in gradients if x is not None]


def _launch(
    problem: Problem,
    out: Tensor,
    row: Tensor,
    d_out: Tensor,
    d_row: Tensor | None,
    quantum: Tensor | None,
    sweeps: Sweeps,
    results: tuple[Tensor | None, ...],
) -> None:
    """Launches the kernel for the results that are not None."""
    tiles = sweeps.tiles
    if not sweeps.programs:
        return
    has_rows = tiles.is_whole or sweeps.is_row_whole
    _attention_bwd_kernel[(sweeps.programs,)](
        *problem.features,
        *problem.tensors,
        None if problem.is_linear or has_rows else out,
        None if problem.is_linear else row,
        d_out,
        d_row,
        quantum,
        *results,
        *problem.strides,
        problem.atoms,
        sweeps.blocks,
        sweeps.groups,
        sweeps.heads_per_group,
        *problem.numbers,
        problem.rows,
        sweeps.column_blocks,
        **problem.constants,
        **problem.of_gradients(),
        IS_WHOLE=tiles.is_whole,
        IS_ROW_WHOLE=sweeps.is_row_whole,
        TILES=tiles.kept,
        BLOCK_I=tiles.block_i,
        BLOCK_J=tiles.block_j,
        num_warps=tiles.num_warps,
        num_stages=1,
    )
