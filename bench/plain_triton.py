"""The opponent: flash attention in Triton without any geometry, FlashAttention-2's two passes.

    S = κ q·k,  P = softmax(S),  O = P v;   scores in base 2: S log2(e), so that P = exp2(...)

Forward: a program owns BLOCK_I rows of one head and walks over the keys, BLOCK_J at a time, with
an online softmax. Backward: `dq` owns rows and also computes Δ_i = dO_i·O_i; `dk, dv` owns keys
and walks over the rows with transposed scores, so that no product needs a transposed operand from
registers. Whole tiles run in the loop without masks, the last, partial one after it with masks.
Dao, "FlashAttention-2", 2023, algorithms 1 and 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634


@triton.jit
def _tile_ptrs(ptr, stride_n, offs, D: tl.constexpr):
    """Pointers of rows `offs` of a head: [rows, D]."""
    return ptr + offs.to(tl.int64)[:, None] * stride_n + tl.arange(0, D)[None, :]


@triton.jit
def _load_rows(ptr, stride_n, offs, n, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows `offs` of a head, 0 beyond n: [rows, D]."""
    ptrs = _tile_ptrs(ptr, stride_n, offs, D)
    if MASKED:
        return tl.load(ptrs, mask=(offs < n)[:, None], other=0.0)
    return tl.load(ptrs)


@triton.jit
def _load_row_scalars(ptr, offs, n, MASKED: tl.constexpr):
    """One float32 for each row, 0 beyond n: [rows]."""
    if MASKED:
        return tl.load(ptr + offs, mask=offs < n, other=0.0)
    return tl.load(ptr + offs)


@triton.jit
def _head_base(pid_bh, H, stride_b, stride_h):
    """Offset of molecule and head."""
    return (pid_bh // H).to(tl.int64) * stride_b + (pid_bh % H) * stride_h


@triton.jit
def _fwd_tile(
    q, k_ptr, v_ptr, stride_n, offs_j, n, scale, acc, row_max, row_sum,
    D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys of the online softmax."""
    k = _load_rows(k_ptr, stride_n, offs_j, n, D, MASKED)  # [J, D]
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [I, D] @ [D, J] -> [I, J]
    if MASKED:
        s = tl.where((offs_j < n)[None, :], s, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(s, 1) * scale)  # [I]
    p = tl.exp2(s * scale - new_max[:, None])  # [I, J]
    fade = tl.exp2(row_max - new_max)  # [I]
    row_sum = row_sum * fade + tl.sum(p, 1)
    v = _load_rows(v_ptr, stride_n, offs_j, n, D, MASKED)  # [J, D]
    # [I, J] @ [J, D] -> [I, D]
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def _plain_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stride_b, stride_n, stride_h, H, n, scale,
    D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_bh = tl.program_id(1)
    base = _head_base(pid_bh, H, stride_b, stride_h)
    k_ptr += base
    v_ptr += base
    offs_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    q = _load_rows(q_ptr + base, stride_n, offs_i, n, D, True)  # [I, D]
    acc = tl.zeros([BLOCK_I, D], tl.float32)  # [I, D]
    row_max = tl.full([BLOCK_I], float("-inf"), tl.float32)  # [I]
    row_sum = tl.zeros([BLOCK_I], tl.float32)  # [I]
    whole = n // BLOCK_J * BLOCK_J
    for start in range(0, whole, BLOCK_J):
        acc, row_max, row_sum = _fwd_tile(
            q, k_ptr, v_ptr, stride_n, start + tl.arange(0, BLOCK_J), n, scale,
            acc, row_max, row_sum, D, False, PRECISION,
        )  # fmt: skip
    if whole < n:
        acc, row_max, row_sum = _fwd_tile(
            q, k_ptr, v_ptr, stride_n, whole + tl.arange(0, BLOCK_J), n, scale,
            acc, row_max, row_sum, D, True, PRECISION,
        )  # fmt: skip
    rows = (offs_i < n)[:, None]
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(_tile_ptrs(out_ptr + base, stride_n, offs_i, D), out, mask=rows)
    tl.store(lse_ptr + pid_bh * n + offs_i, row_max + tl.log2(row_sum), mask=offs_i < n)


@triton.jit
def _dq_tile(
    q, do, lse, delta, k_ptr, v_ptr, stride_n, offs_j, n, scale, dq,
    D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one tile of keys to dq / κ."""
    k = _load_rows(k_ptr, stride_n, offs_j, n, D, MASKED)  # [J, D]
    v = _load_rows(v_ptr, stride_n, offs_j, n, D, MASKED)  # [J, D]
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [I, D] @ [D, J] -> [I, J]
    p = tl.exp2(s * scale - lse[:, None])  # [I, J]
    if MASKED:
        p = tl.where((offs_j < n)[None, :], p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [I, D] @ [D, J] -> [I, J]
    ds = p * (dp - delta[:, None])  # [I, J]
    # [I, J] @ [J, D] -> [I, D]
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _plain_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_b, stride_n, stride_h, H, n, scale, kappa,
    D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_bh = tl.program_id(1)
    base = _head_base(pid_bh, H, stride_b, stride_h)
    k_ptr += base
    v_ptr += base
    offs_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    q = _load_rows(q_ptr + base, stride_n, offs_i, n, D, True)  # [I, D]
    do = _load_rows(do_ptr + base, stride_n, offs_i, n, D, True)  # [I, D]
    out = _load_rows(out_ptr + base, stride_n, offs_i, n, D, True)  # [I, D]
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)  # [I]
    tl.store(delta_ptr + pid_bh * n + offs_i, delta, mask=offs_i < n)
    lse = _load_row_scalars(lse_ptr + pid_bh * n, offs_i, n, True)  # [I]
    dq = tl.zeros([BLOCK_I, D], tl.float32)  # [I, D]
    whole = n // BLOCK_J * BLOCK_J
    for start in range(0, whole, BLOCK_J):
        dq = _dq_tile(
            q, do, lse, delta, k_ptr, v_ptr, stride_n, start + tl.arange(0, BLOCK_J), n, scale,
            dq, D, False, PRECISION,
        )  # fmt: skip
    if whole < n:
        dq = _dq_tile(
            q, do, lse, delta, k_ptr, v_ptr, stride_n, whole + tl.arange(0, BLOCK_J), n, scale,
            dq, D, True, PRECISION,
        )  # fmt: skip
    ptrs = _tile_ptrs(dq_ptr + base, stride_n, offs_i, D)
    tl.store(ptrs, (dq * kappa).to(dq_ptr.dtype.element_ty), mask=(offs_i < n)[:, None])


@triton.jit
def _dkv_tile(
    k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_n, offs_i, n, scale, dk, dv,
    D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one tile of rows to dk / κ and dv. Rows beyond n have q = dO = 0 and add nothing."""
    q = _load_rows(q_ptr, stride_n, offs_i, n, D, MASKED)  # [I, D]
    do = _load_rows(do_ptr, stride_n, offs_i, n, D, MASKED)  # [I, D]
    lse = _load_row_scalars(lse_ptr, offs_i, n, MASKED)  # [I]
    delta = _load_row_scalars(delta_ptr, offs_i, n, MASKED)  # [I]
    st = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [J, D] @ [D, I] -> [J, I]
    pt = tl.exp2(st * scale - lse[None, :])  # [J, I]
    # [J, I] @ [I, D] -> [J, D]
    dv = tl.dot(pt.to(do.dtype), do, dv, input_precision=PRECISION)
    dpt = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [J, D] @ [D, I] -> [J, I]
    dst = pt * (dpt - delta[None, :])  # [J, I]
    # [J, I] @ [I, D] -> [J, D]
    dk = tl.dot(dst.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _plain_dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_b, stride_n, stride_h, H, n, scale, kappa,
    D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_bh = tl.program_id(1)
    base = _head_base(pid_bh, H, stride_b, stride_h)
    q_ptr += base
    do_ptr += base
    lse_ptr += pid_bh * n
    delta_ptr += pid_bh * n
    offs_j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    k = _load_rows(k_ptr + base, stride_n, offs_j, n, D, True)  # [J, D]
    v = _load_rows(v_ptr + base, stride_n, offs_j, n, D, True)  # [J, D]
    dk = tl.zeros([BLOCK_J, D], tl.float32)  # [J, D]
    dv = tl.zeros([BLOCK_J, D], tl.float32)  # [J, D]
    whole = n // BLOCK_I * BLOCK_I
    for start in range(0, whole, BLOCK_I):
        dk, dv = _dkv_tile(
            k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_n, start + tl.arange(0, BLOCK_I), n,
            scale, dk, dv, D, False, PRECISION,
        )  # fmt: skip
    if whole < n:
        dk, dv = _dkv_tile(
            k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_n, whole + tl.arange(0, BLOCK_I), n,
            scale, dk, dv, D, True, PRECISION,
        )  # fmt: skip
    cols = (offs_j < n)[:, None]
    dk_ptrs = _tile_ptrs(dk_ptr + base, stride_n, offs_j, D)
    tl.store(dk_ptrs, (dk * kappa).to(dk_ptr.dtype.element_ty), mask=cols)
    dv_ptrs = _tile_ptrs(dv_ptr + base, stride_n, offs_j, D)
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=cols)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, kappa: float, **options: int | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention.

    Args:
        q, k, v: [B, N, H, D], contiguous, one dtype, D a power of two from 16 on.
        kappa: Factor of q·k.
        options: `block`, rows and keys of a tile (64); `num_warps` (4); `num_stages` (2);
            `precision` of products of float32, "tf32" (as given to a real opponent) or "ieee".

    Returns:
        Output [B, N, H, D]; log2 of the sum of exponentials [B, H, N], float32.
    """
    B, N, H, _ = q.shape
    out, lse = torch.empty_like(q), q.new_empty(B, H, N, dtype=torch.float32)
    grid, compile_time = _launch(q, **options)
    shape = (*q.stride()[:3], H, N, kappa * LOG2E)
    _plain_fwd_kernel[grid](q, k, v, out, lse, *shape, **compile_time)
    return out, lse


def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor,
    *,
    kappa: float,
    **options: int | str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `forward`: dq, dk, dv [B, N, H, D]; `do` [B, N, H, D], contiguous."""
    _, N, H, _ = q.shape
    dq, dk, dv, delta = *(torch.empty_like(x) for x in (q, k, v)), torch.empty_like(lse)
    grid, compile_time = _launch(q, **options)
    shape = (*q.stride()[:3], H, N, kappa * LOG2E, kappa)
    _plain_dq_kernel[grid](q, k, v, out, do, lse, delta, dq, *shape, **compile_time)
    _plain_dkv_kernel[grid](q, k, v, do, lse, delta, dk, dv, *shape, **compile_time)
    return dq, dk, dv


def _launch(
    q: torch.Tensor,
    *,
    block: int = 64,
    num_warps: int = 4,
    num_stages: int = 2,
    precision: str = "tf32",
) -> tuple[tuple[int, int], dict[str, int | str]]:
    """Grid and compile-time arguments."""
    B, N, H, D = q.shape
    tile = {"D": D, "BLOCK_I": block, "BLOCK_J": block, "PRECISION": precision}
    return (triton.cdiv(N, block), B * H), {
        **tile,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
