"""Second backward: the gradients of `Ψ = <dO, Ȯ> + <dr, ṙ>` along the dotted direction.

    ḋ_ij = u_ij·(ẋ_i - ẋ_j),   ż_ij = m_p ḋ_ij + ṁ_p d_ij + ċ_p,   f̃ = f'(z_ij) ż_ij + ḟ(z_ij)
    Ṡ_ij from q̇, k̇ and f̃ as S_ij from q, k and f,   Ȧ_ij = dO_i·v̇_j
    softmax:  ρ_i = Σ_j P_ij Ṡ_ij,   Ṗ_ij = P_ij (Ṡ_ij - ρ_i)
              G_ij = (Ṡ_ij - ρ_i)(A_ij - δ_i) + Ȧ_ij,   ε_i = Σ_j P_ij G_ij
              S̄_ij = P_ij (G_ij - ε_i)
    linear:   Ṗ_ij = Ṡ_ij,   S̄_ij = Ȧ_ij

`E` pulls back on the tangent `Ṡ`, `S̄` on `S`. One launch where a tile takes all keys of a
molecule; else one for query atoms, which first goes through the keys for the sums of rows, and one
for key atoms. `P` is normalised again: `exp(S - L)` is off by the rounding of `L`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import Inputs, Tangent
from . import pair as pt
from . import radial as rd
from . import radial_gradient as rg
from .launch import RUN_TIME, Problem, precision
from .quantum import largest_of_radial, launch_quantum
from .radial import coordinate, evaluate_twice, locate
from .radial_gradient import RadialSums
from .sweeps import GeometrySums, Sweeps
from .tables import rows_of
from .tiles import second_backward_tiles

WHOLE, ROWS, COLUMNS = map(pt.Constant, range(3))


@triton.jit
def directions(
    x_i,
    x_j,
    x_dot_i,
    x_dot_j,
    d,
    m,
    types_i,
    types_j,
    maps,
    affine_dot_ptr,
    HAS_X_DOT: tl.constexpr,
):
    """`ḋ`, `ż`, `ṁ` and 1/d, [I, J]."""
    per_d = pt.inverse(d)
    d_dot, m_dot = tl.zeros(d.shape, d.dtype), tl.zeros(d.shape, d.dtype)
    if HAS_X_DOT:
        d_dot = pt.inner(x_i, x_j, x_dot_i, x_dot_j) * per_d
    z_dot = m * d_dot
    if affine_dot_ptr is not None:
        pair = pt.pairs_of(types_i, types_j, maps)
        m_dot = tl.load(affine_dot_ptr + 2 * pair)
        z_dot += m_dot * d + tl.load(affine_dot_ptr + 2 * pair + 1)
    return d_dot, z_dot, m_dot, per_d


@triton.jit
def coefficients(
    q,
    k,
    v,
    d_out,
    shift,
    q_dot,
    k_dot,
    v_dot,
    log_sum,
    f,
    f_dot,
    scale,
    pairs,
    IS_DONE: tl.constexpr,
    IS_FILTER: tl.constexpr,
    IS_LINEAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`P`, `Ṡ`, `A + shift_i` and `Ȧ`, [I, J]; 0 where either atom is padding."""
    s = pt.scores(q, k, f, scale, IS_FILTER, PRECISION)
    p = pt.weights(s, log_sum[:, None], pairs, IS_DONE, IS_LINEAR)
    s_dot = f_dot
    if IS_FILTER:
        s_dot = pt.products(q, k, f_dot, scale, IS_FILTER, PRECISION)
    if q_dot is not None:
        s_dot += pt.products(q_dot, k, f, scale, IS_FILTER, PRECISION)
    if k_dot is not None:
        s_dot += pt.products(q, k_dot, f, scale, IS_FILTER, PRECISION)
    a = pt.inner_rows(d_out, v, IS_FILTER, PRECISION) + shift[:, None]
    a_dot = tl.zeros(s.shape, s.dtype)
    if v_dot is not None:
        a_dot = pt.inner_rows(d_out, v_dot, IS_FILTER, PRECISION)
    if IS_LINEAR or not IS_DONE:  # else p is 0, which is all that they meet
        s_dot, a = tl.where(pairs, s_dot, 0), tl.where(pairs, a, 0)
        a_dot = tl.where(pairs, a_dot, 0)
    return p, s_dot, a, a_dot


@triton.jit
def row_sums(p, s_dot, a, a_dot):
    """What a tile adds to the sums of rows, [I]."""
    p_s, p_a = p * s_dot, p * a
    return tl.sum(p, 1), tl.sum(p_a, 1), tl.sum(p_s, 1), tl.sum(p_s * a + p * a_dot, 1)


@triton.jit
def row_numbers(sums):
    """1/Σ P, δ, ρ and ε from the sums of rows."""
    total, p_a, p_s, p_g = sums
    per_total = tl.where(total > 0, 1 / tl.where(total > 0, total, 1), 0)
    delta, rho = p_a * per_total, p_s * per_total
    return per_total, delta, rho, p_g * per_total - rho * delta


@triton.jit
def pull_normalizer(p, s_dot, a, a_dot, numbers, IS_LINEAR: tl.constexpr):
    """`P`, `Ṗ`, `E` and `S̄`, [I, J]."""
    if IS_LINEAR:
        return p, s_dot, a, a_dot
    else:
        per_total, delta, rho, epsilon = numbers
        p = p * per_total[:, None]
        s_dot -= rho[:, None]
        a -= delta[:, None]
        return p, p * s_dot, p * a, p * (s_dot * a + a_dot - epsilon[:, None])


@triton.jit
def pull_scores(
    e,
    s_bar,
    x,
    x_dot,
    f,
    f_dot,
    SIDE: tl.constexpr,
    IS_FILTER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adjoint of `S` and `Ṡ` in `q` (side 0: x is k) or `k` (side 1: x is q), without κ."""
    if SIDE == 0:
        grad = pt.pull_q(s_bar, x, f, IS_FILTER, PRECISION)
        if x_dot is not None:
            grad += pt.pull_q(e, x_dot, f, IS_FILTER, PRECISION)
        if IS_FILTER:
            grad += pt.pull_q(e, x, f_dot, IS_FILTER, PRECISION)
    else:
        grad = pt.pull_k(s_bar, x, f, IS_FILTER, PRECISION)
        if x_dot is not None:
            grad += pt.pull_k(e, x_dot, f, IS_FILTER, PRECISION)
        if IS_FILTER:
            grad += pt.pull_k(e, x, f_dot, IS_FILTER, PRECISION)
    return grad


@triton.jit
def pull_radial(e, s_bar, q, k, q_dot, k_dot, scale, IS_FILTER: tl.constexpr):
    """`ḡ` on `f`, `g̃` on `f̃`."""
    g_bar, g_dot = pt.pull_f(s_bar, q, k, scale, IS_FILTER), pt.pull_f(e, q, k, scale, IS_FILTER)
    if IS_FILTER:
        if q_dot is not None:
            g_bar += pt.pull_f(e, q_dot, k, scale, IS_FILTER)
        if k_dot is not None:
            g_bar += pt.pull_f(e, q, k_dot, scale, IS_FILTER)
    return g_bar, g_dot


@triton.jit
def pull_distance(b_bar, e_tilde, d_dot, m, m_dot, per_d):
    """What `b̄` on `z` and `ẽ` on `ż` weigh `x_i - x_j` and `ẋ_i - ẋ_j` with."""
    across = m * e_tilde * per_d
    return ((m * b_bar + m_dot * e_tilde) - across * d_dot) * per_d, across


@triton.jit
def load_tangent(ptr, rows, real, x):
    """The tangent of positions, where there is one."""
    if ptr is not None:
        return pt.load_vectors(ptr, rows, real)
    else:
        return x


@triton.jit
def row_inputs(
    row_ptr,
    d_row_ptr,
    out_ptr,
    at_number,
    at_head,
    offs,
    real,
    d_out,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """`L_i`, and what is added to `dO_i·v_j`: `dr_i`, or about `-δ_i`, which does not show."""
    at = at_number + offs.to(tl.int64) * H
    log_sum = pt.load_numbers(row_ptr, at, real, d_out.dtype)
    shift = pt.load_numbers(d_row_ptr, at, real, d_out.dtype)
    if out_ptr is not None:
        out = pt.load_rows(out_ptr + at_head, offs, real, H * D, D, BLOCK_D, ALIGN)
        shift = -tl.sum(out.to(d_out.dtype) * d_out, 1)
    return log_sum, shift


@triton.jit
def store_row_gradients(
    q_ptr,
    d_out_ptr,
    d_row_ptr,
    grad_q,
    grad_d_out,
    grad_d_row,
    at_head,
    at_number,
    offs,
    there,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Stores the gradients of `q`, `dO` and `dr` of some rows, those that are wanted."""
    if q_ptr is not None:
        pt.store_rows(q_ptr + at_head, grad_q, offs, there, H * D, D, BLOCK_D, ALIGN)
    if d_out_ptr is not None:
        pt.store_rows(d_out_ptr + at_head, grad_d_out, offs, there, H * D, D, BLOCK_D, ALIGN)
    if d_row_ptr is not None:
        tl.store(d_row_ptr + at_number + offs.to(tl.int64) * H, grad_d_row, mask=there)


@triton.jit
def store_row_numbers(ptr, numbers, at_number, offs, there, num_rows, H: tl.constexpr):
    """Stores `row_numbers` for the launch that has the keys."""
    at = ptr + at_number + offs.to(tl.int64) * H
    for n in tl.static_range(4):
        tl.store(at + n * (num_rows.to(tl.int64) * H), numbers[n], mask=there)


@triton.jit
def load_row_numbers(ptr, at_number, offs, real, num_rows, H: tl.constexpr):
    """Loads `row_numbers`."""
    at, step = ptr + at_number + offs.to(tl.int64) * H, num_rows.to(tl.int64) * H
    return (
        tl.load(at, mask=real, other=0.0),
        tl.load(at + step, mask=real, other=0.0),
        tl.load(at + 2 * step, mask=real, other=0.0),
        tl.load(at + 3 * step, mask=real, other=0.0),
    )


@triton.jit(do_not_specialize=RUN_TIME)
def _attention_bwd_bwd_kernel(
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
    q_dot_ptr,  # [B, N, H, D], or None, as all dotted
    k_dot_ptr,
    v_dot_ptr,
    positions_dot_ptr,
    radial_dot_ptr,
    affine_dot_ptr,
    out_ptr,  # None where linear
    row_ptr,  # None where linear
    d_out_ptr,
    d_row_ptr,
    quantum_ptr,
    numbers_ptr,  # [4, B, N, H]: 1/Σ P, δ, ρ, ε; None where a tile takes all keys
    grad_d_out_ptr,  # [B, N, H, D], or None, as all that follow
    grad_d_row_ptr,  # [B, N, H]
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    row_vectors_ptr,  # [parts, B, N, 3]
    column_vectors_ptr,
    row_affine_ptr,  # [groups, B, N, 2, T]
    grad_radial_ptr,
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
    C: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    RADIAL: tl.constexpr,
    IS_FILTER: tl.constexpr,
    IS_LINEAR: tl.constexpr,
    SWEEP: tl.constexpr,
    IS_ROW_WHOLE: tl.constexpr,
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
    OWN: tl.constexpr = BLOCK_I if SWEEP == ROWS else BLOCK_J
    STEP: tl.constexpr = BLOCK_J if SWEEP == ROWS else BLOCK_I
    if block * OWN >= count:
        return
    q_ptr = pt.feature_start(q_ptr, b, first, stride_qb, stride_qn, ptr_ptr is not None, ALIGN)
    k_ptr = pt.feature_start(k_ptr, b, first, stride_kb, stride_kn, ptr_ptr is not None, ALIGN)
    v_ptr = pt.feature_start(v_ptr, b, first, stride_vb, stride_vn, ptr_ptr is not None, ALIGN)
    at_features, at_rows = first * (H * D), first * H
    radial = (radial_ptr, num_intervals, num_tables, r_min, r_max, per_h)
    maps = (affine_ptr, pair_index_ptr, num_types, num_tables)
    SUM: tl.constexpr = positions_ptr.dtype.element_ty
    NEEDS_GEOMETRY: tl.constexpr = column_vectors_ptr is not None or row_affine_ptr is not None
    NEEDS_ROWS: tl.constexpr = not (
        grad_q_ptr is None and grad_d_out_ptr is None and grad_d_row_ptr is None
    )
    HAS_X_DOT: tl.constexpr = positions_dot_ptr is not None
    IS_SOFTMAX_IN_PARTS: tl.constexpr = SWEEP == ROWS and not IS_LINEAR and not IS_ROW_WHOLE
    first_head = group * heads_per_group
    last_head = min(H, first_head + heads_per_group)
    own = block * OWN + tl.arange(0, OWN)
    own_there = own < count

    own_real, own_x, own_types = pt.load_atoms(
        positions_ptr, types_ptr, mask_ptr, first, own, last
    )
    own_x_dot = load_tangent(positions_dot_ptr, first + own, own_real, own_x)
    dx = pt.no_vectors(OWN, SUM)
    d_affine = rg.no_affine(BLOCK_I, BLOCK_T, SUM)
    q_dot, k_dot, v_dot = None, None, None
    for h in range(first_head, last_head):
        at_head, at_number = at_features + h * D, at_rows + h
        zeros = tl.zeros([BLOCK_I], SUM)
        numbers = (zeros, zeros, zeros, zeros)
        if SWEEP == ROWS:
            q = pt.load_rows(
                pt.of_head(q_ptr, h, stride_qh, ALIGN), own, own_real, stride_qn, D, BLOCK_D, ALIGN
            )
            d_out = pt.load_rows(d_out_ptr + at_head, own, own_real, H * D, D, BLOCK_D, ALIGN)
            q, d_out = q.to(SUM), d_out.to(SUM)
            if q_dot_ptr is not None:
                q_dot = pt.load_rows(q_dot_ptr + at_head, own, own_real, H * D, D, BLOCK_D, ALIGN)
                q_dot = q_dot.to(SUM)
            log_sum, shift = row_inputs(
                row_ptr,
                d_row_ptr,
                out_ptr,
                at_number,
                at_head,
                own,
                own_real,
                d_out,
                H,
                D,
                BLOCK_D,
                ALIGN,
            )
            grad_q = tl.zeros([BLOCK_I, BLOCK_D], SUM)
            grad_d_out = tl.zeros([BLOCK_I, BLOCK_D], SUM)
            grad_d_row = tl.zeros([BLOCK_I], SUM)
        else:
            k = pt.load_rows(
                pt.of_head(k_ptr, h, stride_kh, ALIGN), own, own_real, stride_kn, D, BLOCK_D, ALIGN
            )
            v = pt.load_rows(
                pt.of_head(v_ptr, h, stride_vh, ALIGN), own, own_real, stride_vn, D, BLOCK_D, ALIGN
            )
            k, v = k.to(SUM), v.to(SUM)
            if k_dot_ptr is not None:
                k_dot = pt.load_rows(k_dot_ptr + at_head, own, own_real, H * D, D, BLOCK_D, ALIGN)
                k_dot = k_dot.to(SUM)
            if v_dot_ptr is not None:
                v_dot = pt.load_rows(v_dot_ptr + at_head, own, own_real, H * D, D, BLOCK_D, ALIGN)
                v_dot = v_dot.to(SUM)
            grad_k = tl.zeros([BLOCK_J, BLOCK_D], SUM)
            grad_v = tl.zeros([BLOCK_J, BLOCK_D], SUM)
        sums = (zeros, zeros, zeros, zeros)
        # In parts, rows go through all keys twice: for their sums, then for the gradients.
        reach = count if SWEEP == WHOLE else last
        tiles = (reach + STEP - 1) // STEP
        for n in range(0, 2 * tiles if IS_SOFTMAX_IN_PARTS else tiles):
            other = (n % tiles) * STEP + tl.arange(0, STEP)
            real, x, types = pt.load_atoms(positions_ptr, types_ptr, mask_ptr, first, other, last)
            x_dot = load_tangent(positions_dot_ptr, first + other, real, x)
            if SWEEP == ROWS:
                offs_i, real_i, x_i, types_i, x_dot_i = own, own_real, own_x, own_types, own_x_dot
                offs_j, real_j, x_j, types_j, x_dot_j = other, real, x, types, x_dot
            else:
                offs_i, real_i, x_i, types_i, x_dot_i = other, real, x, types, x_dot
                offs_j, real_j, x_j, types_j, x_dot_j = own, own_real, own_x, own_types, own_x_dot
            pairs = real_i[:, None] & real_j[None, :]
            d, table, m, z = pt.geometry(x_i, x_j, types_i, types_j, maps)
            place_x = coordinate(radial, z, pairs, RADIAL)
            place = locate(radial, place_x, table, C, RADIAL)
            d_dot, z_dot, m_dot, per_d = directions(
                x_i, x_j, x_dot_i, x_dot_j, d, m, types_i, types_j, maps, affine_dot_ptr, HAS_X_DOT
            )
            if SWEEP == ROWS:
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
                k, v = k.to(SUM), v.to(SUM)
                if k_dot_ptr is not None:
                    k_dot = pt.load_rows(
                        k_dot_ptr + at_head, offs_j, real_j, H * D, D, BLOCK_D, ALIGN
                    ).to(SUM)
                if v_dot_ptr is not None:
                    v_dot = pt.load_rows(
                        v_dot_ptr + at_head, offs_j, real_j, H * D, D, BLOCK_D, ALIGN
                    ).to(SUM)
            else:
                q = pt.load_rows(
                    pt.of_head(q_ptr, h, stride_qh, ALIGN),
                    offs_i,
                    real_i,
                    stride_qn,
                    D,
                    BLOCK_D,
                    ALIGN,
                )
                d_out = pt.load_rows(d_out_ptr + at_head, offs_i, real_i, H * D, D, BLOCK_D, ALIGN)
                q, d_out = q.to(SUM), d_out.to(SUM)
                if q_dot_ptr is not None:
                    q_dot = pt.load_rows(
                        q_dot_ptr + at_head, offs_i, real_i, H * D, D, BLOCK_D, ALIGN
                    ).to(SUM)
                log_sum, shift = row_inputs(
                    row_ptr,
                    d_row_ptr,
                    out_ptr,
                    at_number,
                    at_head,
                    offs_i,
                    real_i,
                    d_out,
                    H,
                    D,
                    BLOCK_D,
                    ALIGN,
                )
            f, f1, f2, f_dot, f1_dot = evaluate_twice(
                radial, radial_dot_ptr, place, h, pairs, C, D, BLOCK_D, K, RADIAL, IS_FILTER
            )
            shift_z = pt.per_channel(z_dot, IS_FILTER)
            f_dot += f1 * shift_z
            p, s_dot, a, a_dot = coefficients(
                q,
                k,
                v,
                d_out,
                shift,
                q_dot,
                k_dot,
                v_dot,
                log_sum,
                f,
                f_dot,
                scale,
                pairs,
                RADIAL == rd.ROWS,
                IS_FILTER,
                IS_LINEAR,
                PRECISION,
            )
            if IS_SOFTMAX_IN_PARTS and n < tiles:
                more = row_sums(p, s_dot, a, a_dot)
                sums = (sums[0] + more[0], sums[1] + more[1], sums[2] + more[2], sums[3] + more[3])
            else:
                if not IS_LINEAR:
                    if IS_SOFTMAX_IN_PARTS:
                        numbers = row_numbers(sums)
                    elif SWEEP != COLUMNS:
                        numbers = row_numbers(row_sums(p, s_dot, a, a_dot))
                    else:
                        numbers = load_row_numbers(
                            numbers_ptr, at_number, offs_i, real_i, num_rows, H
                        )
                p, p_dot, e, s_bar = pull_normalizer(p, s_dot, a, a_dot, numbers, IS_LINEAR)
                if SWEEP != ROWS:
                    if grad_v_ptr is not None:
                        grad_v += pt.weigh_columns(p_dot, d_out, IS_FILTER, PRECISION)
                    if grad_k_ptr is not None:
                        grad_k += pull_scores(
                            e, s_bar, q, q_dot, f, f_dot, 1, IS_FILTER, PRECISION
                        )
                if SWEEP != COLUMNS and NEEDS_ROWS:
                    more_q = pull_scores(e, s_bar, k, k_dot, f, f_dot, 0, IS_FILTER, PRECISION)
                    more_d_out = pt.weigh_rows(p_dot, v, IS_FILTER, PRECISION)
                    if v_dot_ptr is not None:
                        more_d_out += pt.weigh_rows(p, v_dot, IS_FILTER, PRECISION)
                    if SWEEP == ROWS:
                        grad_q += more_q
                        grad_d_out += more_d_out
                        grad_d_row += tl.sum(p_dot, 1)
                    else:
                        store_row_gradients(
                            grad_q_ptr,
                            grad_d_out_ptr,
                            grad_d_row_ptr,
                            scale * more_q,
                            more_d_out,
                            tl.sum(p_dot, 1),
                            at_head,
                            at_number,
                            offs_i,
                            offs_i < count,
                            H,
                            D,
                            BLOCK_D,
                            ALIGN,
                        )
                g_bar, g_dot = pull_radial(e, s_bar, q, k, q_dot, k_dot, scale, IS_FILTER)
                if SWEEP != COLUMNS and grad_radial_ptr is not None:
                    rg.add(
                        grad_radial_ptr,
                        quantum_ptr,
                        (b * num_blocks + block) * H + h,
                        radial,
                        place_x,
                        z_dot,
                        table,
                        h,
                        g_bar,
                        g_dot,
                        pairs,
                        C,
                        D,
                        BLOCK_D,
                        K,
                        RADIAL,
                        IS_FILTER,
                        True,
                    )
                if NEEDS_GEOMETRY:
                    b_bar = g_bar * f1 + g_dot * (f2 * shift_z + f1_dot)
                    b_bar = pt.over_channels(b_bar, IS_FILTER)
                    e_tilde = pt.over_channels(g_dot * f1, IS_FILTER)
                    along, across = pull_distance(b_bar, e_tilde, d_dot, m, m_dot, per_d)
                    if row_affine_ptr is not None:
                        d_affine = rg.add_affine(
                            d_affine,
                            b_bar * d + e_tilde * d_dot,
                            b_bar,
                            types_j,
                            BLOCK_T,
                            IS_FILTER,
                        )
                    if SWEEP == ROWS:
                        dx = pt.add_vectors(dx, pt.pull_vectors(along, x_i, x_j, 1))
                        if HAS_X_DOT:
                            dx = pt.add_vectors(dx, pt.pull_vectors(across, x_dot_i, x_dot_j, 1))
                    else:
                        dx = pt.subtract_vectors(dx, pt.pull_vectors(along, x_i, x_j, 0))
                        if HAS_X_DOT:
                            dx = pt.subtract_vectors(
                                dx, pt.pull_vectors(across, x_dot_i, x_dot_j, 0)
                            )
                    if SWEEP == WHOLE and row_vectors_ptr is not None:
                        dx_i = pt.pull_vectors(along, x_i, x_j, 1)
                        if HAS_X_DOT:
                            dx_i = pt.add_vectors(
                                dx_i, pt.pull_vectors(across, x_dot_i, x_dot_j, 1)
                            )
                        at = h * num_rows.to(tl.int64) + first + offs_i
                        pt.store_vectors(row_vectors_ptr, dx_i, at, offs_i < count)
        if SWEEP == ROWS:
            if IS_SOFTMAX_IN_PARTS and numbers_ptr is not None:
                store_row_numbers(
                    numbers_ptr, row_numbers(sums), at_number, own, own_there, num_rows, H
                )
            store_row_gradients(
                grad_q_ptr,
                grad_d_out_ptr,
                grad_d_row_ptr,
                scale * grad_q,
                grad_d_out,
                grad_d_row,
                at_head,
                at_number,
                own,
                own_there,
                H,
                D,
                BLOCK_D,
                ALIGN,
            )
        else:
            if grad_k_ptr is not None:
                pt.store_rows(
                    grad_k_ptr + at_head, scale * grad_k, own, own_there, H * D, D, BLOCK_D, ALIGN
                )
            if grad_v_ptr is not None:
                pt.store_rows(
                    grad_v_ptr + at_head, grad_v, own, own_there, H * D, D, BLOCK_D, ALIGN
                )
    at_part = group * num_rows.to(tl.int64) + first + own
    if row_affine_ptr is not None and SWEEP != COLUMNS:
        rg.store_affine(row_affine_ptr, at_part, own_there, d_affine, BLOCK_T)
    if SWEEP == ROWS:
        if row_vectors_ptr is not None:
            pt.store_vectors(row_vectors_ptr, dx, at_part, own_there)
    else:
        if column_vectors_ptr is not None:
            pt.store_vectors(column_vectors_ptr, dx, at_part, own_there)


def launch_attention_bwd_bwd(
    inputs: Inputs,
    tangent: Tangent,
    d_out: Tensor | None,
    d_row: Tensor | None,
    out: Tensor,
    row: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Computes those gradients of `(d_out, d_row, *six inputs)` that `needs` asks for."""
    problem = Problem(inputs)
    problem.of_table()
    shape, dtype = inputs.q.shape, inputs.q.dtype
    d_out = torch.zeros_like(out) if d_out is None else d_out.contiguous()
    d_row = None if d_row is None else d_row.contiguous()
    out, row = out.contiguous(), row.contiguous()
    dots = tuple(None if x is None else x.contiguous() for x in tangent)
    features = (needs[0], *needs[2:5])
    grad_d_out, grad_q, grad_k, grad_v = (
        problem.empty(*shape, dtype=dtype) if needed else None for needed in features
    )
    grad_d_row = problem.empty(*shape[:-1]) if needs[1] else None
    tiles = second_backward_tiles(problem.atoms, problem.block_d, problem.is_filter)
    if needs[7]:
        tiles = tiles._replace(is_whole=False)
    sweeps = Sweeps(problem, tiles)
    geometry = GeometrySums(problem, sweeps, needs[5], needs[7])
    sums = None
    if needs[6]:
        sums = RadialSums(
            problem,
            sweeps.row_programs,
            lambda: launch_quantum(
                problem, d_out, d_row, dots[:4], largest_of_radial(problem, dots[4], dots[5])
            ),
            True,
        )
    radial_dot = dots[4]
    if radial_dot is not None and problem.form is rd.ROWS:
        radial_dot = rows_of(radial_dot, 0.0)
    numbers = None
    if not (problem.is_linear or tiles.is_whole):
        numbers = problem.empty(4, *shape[:-1])
    results = (
        *(grad_d_out, grad_d_row, grad_q, grad_k, grad_v),
        *(geometry.rows, geometry.columns, geometry.affine),
    )
    d_radial = sums and sums.sums
    launch = functools.partial(
        *(_launch, problem, (*dots[:4], radial_dot, dots[5]), out, row, d_out, d_row),
        *(sums and sums.quantum, numbers),
    )
    if d_radial is None or not problem.adds_by_atomics():
        launch(sweeps, (*results, d_radial))
    else:
        if any(x is not None for x in results):
            launch(sweeps, (*results, None))
        launch(Sweeps.of_rows(problem, True), (None,) * len(results) + (d_radial,))
    gradients = (
        grad_d_out,
        grad_d_row,
        grad_q,
        grad_k,
        grad_v,
        geometry.positions() if needs[5] else None,
        sums.gradient(dots[4]) if sums else None,
        geometry.affine_gradient() if needs[7] else None,
    )
    return [x for x in gradients if x is not None]


def _launch(
    problem: Problem,
    dots: tuple[Tensor | None, ...],
    out: Tensor,
    row: Tensor,
    d_out: Tensor,
    d_row: Tensor | None,
    quantum: Tensor | None,
    numbers: Tensor | None,
    sweeps: Sweeps,
    results: tuple[Tensor | None, ...],
) -> None:
    """Launches the kernel, once or twice, for the results that are not None."""
    tiles = sweeps.tiles
    launches = [(ROWS, sweeps.row_blocks), (COLUMNS, sweeps.column_blocks)]
    if tiles.is_whole:
        launches = [(WHOLE, sweeps.column_blocks)]
    for sweep, blocks in launches:
        programs = problem.molecules * blocks * sweeps.groups
        if not programs or not sweeps.programs:
            continue
        _attention_bwd_bwd_kernel[(programs,)](
            *problem.features,
            *problem.tensors,
            *dots,
            None if problem.is_linear else out,
            None if problem.is_linear else row,
            d_out,
            d_row,
            quantum,
            numbers,
            *results,
            *problem.strides,
            problem.atoms,
            blocks,
            sweeps.groups,
            sweeps.heads_per_group,
            *problem.numbers,
            problem.rows,
            **problem.constants | {"PRECISION": second_precision(problem.inputs.q.dtype)},
            **problem.of_gradients(),
            SWEEP=sweep.value,
            IS_ROW_WHOLE=sweeps.is_row_whole,
            BLOCK_I=tiles.block_i,
            BLOCK_J=tiles.block_j,
            num_warps=tiles.num_warps,
            num_stages=1,
        )


def second_precision(dtype: torch.dtype) -> str:
    """16-bit features are computed with in TF32, which holds them exactly."""
    return precision() if dtype.itemsize > 2 else "tf32"
