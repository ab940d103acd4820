"""The unit of the integer sums in `radial_gradient`: a bound on what any sum can become.

Norms of rows bound the numbers of pairs (Cauchy and Schwarz), and a softmax's weights sum to 1:

    |A_ij| <= |dO_i| |v_j| + |dr_i|,   Σ_j |E_ij| <= 2 max |A|,  of a linear normalizer n max |A|

The quantum is the power of two for which the largest sum that could be still fits 63 bits. Bounds
may be a million times too large without costing a float32 sum its precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import pair as pt
from .launch import RUN_TIME, Problem

# Where the largest norms stand.
Q, K, V, D_OUT, D_ROW, Q_DOT, K_DOT, V_DOT, X, X_DOT = map(pt.Constant, range(10))
NUM_NORMS = 10


@triton.jit
def _norm(ptr, offs, real, stride_n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The largest squared norm of some rows, as the integer with its bits: NaN is above all."""
    if ptr is None:
        return 0
    else:
        x = pt.load_rows(ptr, offs, real, stride_n, D, BLOCK_D, 1).to(tl.float32)
        return tl.max(tl.sum(x * x, 1).to(tl.int32, bitcast=True), 0)


@triton.jit
def _keep(largest_ptr, norm, WHICH: tl.constexpr):
    tl.atomic_max(largest_ptr + WHICH, norm, sem="relaxed")


@triton.jit(do_not_specialize=RUN_TIME)
def _norms_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    mask_ptr,
    ptr_ptr,
    d_out_ptr,
    d_row_ptr,
    q_dot_ptr,
    k_dot_ptr,
    v_dot_ptr,
    x_dot_ptr,
    largest_ptr,
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
    num_heads,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest squared norms of rows, over all atoms and heads."""
    pid = tl.program_id(0)
    b, block = pid // num_blocks, pid % num_blocks
    first, _, last = pt.molecule(b, num_atoms, mask_ptr, ptr_ptr, 128)
    if block * BLOCK >= last:
        return
    offs = block * BLOCK + tl.arange(0, BLOCK)
    real = pt.real_atoms(mask_ptr, first, offs, last)
    is_packed: tl.constexpr = ptr_ptr is not None
    q_ptr = pt.feature_start(q_ptr, b, first, stride_qb, stride_qn, is_packed, 1)
    k_ptr = pt.feature_start(k_ptr, b, first, stride_kb, stride_kn, is_packed, 1)
    v_ptr = pt.feature_start(v_ptr, b, first, stride_vb, stride_vn, is_packed, 1)
    rows = first + offs
    q, k, v, d_out, d_row, q_dot, k_dot, v_dot = 0, 0, 0, 0, 0, 0, 0, 0
    for h in range(num_heads):  # not a constant: unrolled, the loop would take all registers
        q = tl.maximum(
            q, _norm(pt.of_head(q_ptr, h, stride_qh, 1), offs, real, stride_qn, D, BLOCK_D)
        )
        k = tl.maximum(
            k, _norm(pt.of_head(k_ptr, h, stride_kh, 1), offs, real, stride_kn, D, BLOCK_D)
        )
        v = tl.maximum(
            v, _norm(pt.of_head(v_ptr, h, stride_vh, 1), offs, real, stride_vn, D, BLOCK_D)
        )
        at = h * D
        d_out = tl.maximum(d_out, _norm(d_out_ptr + at, rows, real, H * D, D, BLOCK_D))
        if d_row_ptr is not None:
            d_row = tl.maximum(d_row, _norm(d_row_ptr + h, rows, real, H, 1, 1))
        if q_dot_ptr is not None:
            q_dot = tl.maximum(q_dot, _norm(q_dot_ptr + at, rows, real, H * D, D, BLOCK_D))
        if k_dot_ptr is not None:
            k_dot = tl.maximum(k_dot, _norm(k_dot_ptr + at, rows, real, H * D, D, BLOCK_D))
        if v_dot_ptr is not None:
            v_dot = tl.maximum(v_dot, _norm(v_dot_ptr + at, rows, real, H * D, D, BLOCK_D))
    _keep(largest_ptr, q, Q)
    _keep(largest_ptr, k, K)
    _keep(largest_ptr, v, V)
    _keep(largest_ptr, d_out, D_OUT)
    _keep(largest_ptr, d_row, D_ROW)
    _keep(largest_ptr, q_dot, Q_DOT)
    _keep(largest_ptr, k_dot, K_DOT)
    _keep(largest_ptr, v_dot, V_DOT)
    _keep(largest_ptr, _norm(positions_ptr, rows, real, 3, 3, 4), X)
    if x_dot_ptr is not None:
        _keep(largest_ptr, _norm(x_dot_ptr, rows, real, 3, 3, 4), X_DOT)


@triton.jit
def _largest(ptr, WHICH: tl.constexpr):
    return tl.sqrt(tl.load(ptr + WHICH).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=("rows", "atoms"))
def _quantum_kernel(
    largest_ptr,
    radial_ptr,  # largest f, f', ḟ, m, ṁ, ċ; None in the first backward pass
    quantum_ptr,
    rows,
    atoms,
    scale,
    per_h,
    IS_FILTER: tl.constexpr,
    IS_LINEAR: tl.constexpr,
):
    """The quantum and one over it."""
    a = _largest(largest_ptr, D_OUT) * _largest(largest_ptr, V) + _largest(largest_ptr, D_ROW)
    qk = tl.abs(scale) * _largest(largest_ptr, Q) * _largest(largest_ptr, K)
    n = atoms.to(tl.float32)
    e = a * n if IS_LINEAR else 2 * a  # of a row: Σ_j |E_ij|
    total = e * qk if IS_FILTER else e
    if radial_ptr is not None:
        f, f1, f_dot = tl.load(radial_ptr), tl.load(radial_ptr + 1), tl.load(radial_ptr + 2)
        m, m_dot, c_dot = (
            tl.load(radial_ptr + 3),
            tl.load(radial_ptr + 4),
            tl.load(radial_ptr + 5),
        )
        z_dot = 2 * (m * _largest(largest_ptr, X_DOT) + m_dot * _largest(largest_ptr, X)) + c_dot
        f_dot += f1 * z_dot
        qk_dot = _largest(largest_ptr, Q_DOT) * _largest(largest_ptr, K)
        qk_dot += _largest(largest_ptr, Q) * _largest(largest_ptr, K_DOT)
        qk_dot *= tl.abs(scale)
        s_dot = qk_dot * f + qk * f_dot if IS_FILTER else qk_dot + f_dot
        a_dot = _largest(largest_ptr, D_OUT) * _largest(largest_ptr, V_DOT)
        s_bar = a_dot * n if IS_LINEAR else 8 * s_dot * a + 2 * a_dot  # of a row: Σ_j |S̄_ij|
        g_bar = e * qk_dot + s_bar * qk if IS_FILTER else s_bar
        total = g_bar + 1.5 * per_h * total * z_dot
    # What is not a number anywhere is not a number here, also where the bound needs no norm of it.
    others = _largest(largest_ptr, Q) + _largest(largest_ptr, K) + _largest(largest_ptr, X)
    bound = total * rows.to(tl.float32) + 0 * others
    exponent = tl.ceil(tl.log2(tl.where(bound > 0, bound, 1.0)))
    exponent = tl.where(bound < float("inf"), tl.clamp(exponent, -60.0, 127.0), float("nan"))
    tl.store(quantum_ptr, tl.exp2(exponent - 62.0))
    tl.store(quantum_ptr + 1, tl.exp2(62.0 - exponent))


def launch_quantum(
    problem: Problem,
    d_out: Tensor,
    d_row: Tensor | None,
    dots: tuple[Tensor | None, ...] = (None, None, None, None),
    radial: Tensor | None = None,
) -> Tensor:
    """Computes the quantum and one over it, `[2]`.

    Args:
        problem: The inputs.
        d_out: Cotangent of the output.
        d_row: Cotangent of the row sums.
        dots: In the second backward pass `q̇, k̇, v̇, ẋ`.
        radial: In the second backward pass the largest `|f|`, `|f'|`, `|ḟ|`, `|m|`, `|ṁ|`, `|ċ|`.
    """
    largest = torch.zeros(NUM_NORMS, dtype=torch.int32, device=problem.device)
    quantum = torch.empty(2, dtype=torch.float32, device=problem.device)
    positions, _, _, mask, ptr, _, _ = problem.tensors
    block = 32
    blocks = -(-problem.atoms // block)
    _norms_kernel[(problem.molecules * blocks,)](
        *problem.features,
        positions,
        mask,
        ptr,
        d_out,
        d_row,
        *dots,
        largest,
        *problem.strides,
        problem.atoms,
        blocks,
        problem.heads,
        H=problem.heads,
        D=problem.head_dim,
        BLOCK_D=problem.block_d,
        BLOCK=block,
        num_warps=4,
    )
    _quantum_kernel[(1,)](
        largest,
        radial,
        quantum,
        problem.rows,
        problem.atoms,
        problem.inputs.scale,
        problem.per_h,
        IS_FILTER=problem.is_filter,
        IS_LINEAR=problem.is_linear,
        num_warps=1,
    )
    return quantum


def largest_of_radial(problem: Problem, dot: Tensor | None, affine_dot: Tensor | None) -> Tensor:
    """Bounds `|f|`, `|f'|`, `|ḟ|`, `|m|`, `|ṁ|`, `|ċ|` of a table, `[6]`."""
    affine = problem.tensors[2]
    y, s = problem.radial.abs().amax((0, 1, 3))
    none = torch.zeros((), dtype=y.dtype, device=y.device)
    y_dot, s_dot = (none, none) if dot is None else dot.abs().amax((0, 1, 3))
    m = none + 1 if affine is None else affine[:, 0].abs().amax()
    m_dot, c_dot = (none, none) if affine_dot is None else affine_dot.abs().amax(0)
    # |w_0|, |w_1| <= 4/27 of the value, <= 1 of the slope; |w_y'| <= 3/2, and |y_1 - y_0| <= 2 |y|
    bounds = (y + s, problem.per_h * (3 * y + 2 * s), y_dot + s_dot, m, m_dot, c_dot)
    return torch.stack(bounds).float()
