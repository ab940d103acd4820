"""What the passes add to the parameters of the radial function and of the affine map.

**Tables.** A weight `g` on `f(z)` adds to four numbers of the knots around `z`. Triton has no sums
in shared memory, so they go to memory by atomic additions of 64-bit integers: `g` in units of a
`quantum`, which a bound on `|g|` gives. Integers have one sum in any order, so results repeat bit
for bit. The sums are those of an interval, four words side by side where that is what a warp adds:
`[C, P, G, 4]` of a bias, `[P, G, 4, C]` of a filter; `_knots_kernel` makes knots of them.

**Gaussians.** Sums over the pairs of `g φ`, `g e φ`, `g e² φ`, `e = z - μ`, for each program.

**Affine map.** Sums for each query atom and type of key atom.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import pair as pt
from .launch import Problem
from .pair import INTERPRETED
from .radial import SLOPE, VALUE, channels_of, gaussian, hermite, interval_of

# Tables.


@triton.jit
def words_of(t, g, ORDER: tl.constexpr):
    """What a weight `g` on a derivative by `t` adds to `y_0`, `s_0`, `y_1`, `s_1`."""
    w_y, w_0, w_1 = hermite(t, ORDER)
    if ORDER == VALUE:
        return g - g * w_y, g * w_0, g * w_y, g * w_1
    else:
        return -(g * w_y), g * w_0, g * w_y, g * w_1


@triton.jit
def all_words(t, g_bar, slope, g_dot, IS_SECOND: tl.constexpr):
    """The four words of `ḡ` on the value, and of `g̃ slope` on the derivative by `t`."""
    words = words_of(t, g_bar, VALUE)
    if IS_SECOND:
        more = words_of(t, g_dot * slope, SLOPE)
        words = (
            words[0] + more[0],
            words[1] + more[1],
            words[2] + more[2],
            words[3] + more[3],
        )
    return words


@triton.jit
def add_to_table(
    sums_ptr,
    quantum_ptr,
    radial,
    x,
    z_dot,
    table,
    h,
    g_bar,
    g_dot,
    there,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RADIAL: tl.constexpr,
    IS_FILTER: tl.constexpr,
    IS_SECOND: tl.constexpr,
):
    """Adds four words of each pair to those of its interval."""
    _, intervals, tables, _, _, _ = radial
    per_quantum = tl.load(quantum_ptr + 1)
    interval, t, per_h = interval_of(radial, x, RADIAL)
    row = table * intervals + interval
    if IS_FILTER:
        channel, real_d = channels_of(h, D, BLOCK_D, IS_FILTER)
        at = sums_ptr + (row.to(tl.int64) * (4 * C))[:, :, None] + channel
        mask = there[:, :, None] & real_d
        words = all_words(t[:, :, None], g_bar, (per_h * z_dot)[:, :, None], g_dot, IS_SECOND)
        for n in tl.static_range(4):
            units = tl.floor(words[n] * per_quantum + 0.5).to(tl.int64)
            tl.atomic_add(at + n * C, units, mask=mask, sem="relaxed")
    else:
        # The four words of a pair in neighbouring lanes, so that they are one sector of memory:
        # opaque, for Triton would give neighbouring addresses to one lane, one after the other.
        n = pt.opaque(tl.arange(0, 4))[None, None, :]
        g_bar, g_dot, t = g_bar[:, :, None], g_dot[:, :, None], t[:, :, None]
        slope = (per_h * z_dot)[:, :, None]
        words = all_words(t, g_bar, slope, g_dot, IS_SECOND)
        word = tl.where(
            n < 2, tl.where(n < 1, words[0], words[1]), tl.where(n < 3, words[2], words[3])
        )
        sums_ptr += 4 * h * (tables * intervals).to(tl.int64)
        add_units(sums_ptr, (4 * row)[:, :, None] + n, word * per_quantum, there[:, :, None])


@triton.jit
def add_units(ptr, at, units, there):
    """Adds rounded numbers to 64-bit integers; as one piece, so nothing waits in registers."""
    if INTERPRETED:
        there = tl.broadcast_to(there, units.shape)
        tl.atomic_add(ptr + at, tl.floor(units + 0.5).to(tl.int64), mask=there, sem="relaxed")
    else:
        at = tl.where(there, at, -1)
        tl.inline_asm_elementwise(
            "{ .reg .b64 to, n; .reg .pred p; setp.ge.s32 p, $2, 0;"
            "  mad.wide.s32 to, $2, 8, $1; cvt.rni.s64.f32 n, $3;"
            "  @p red.relaxed.gpu.global.add.u64 [to], n; mov.b32 $0, 0; }",
            "=r,l,r,f",
            [tl.zeros(at.shape, tl.int64) + ptr.to(tl.int64), at, units],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit(do_not_specialize=("num_tables", "num_intervals", "num_channels"))
def _knots_kernel(
    sums_ptr,  # int64 [C, P, G, 4], or [P, G, 4, C] of a filter
    quantum_ptr,
    d_knots_ptr,  # [P, G+1, 2, C]
    num_tables,
    num_intervals,
    num_channels,
    IS_FILTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gives each knot what the intervals on its two sides have summed up."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = offs // num_channels  # table and knot
    c, knot, table = offs % num_channels, row % (num_intervals + 1), row // (num_intervals + 1)
    there = table < num_tables
    interval = table * num_intervals + knot  # to its right
    stride, step = 4 * num_channels, num_channels
    at = sums_ptr + interval * stride + c
    if not IS_FILTER:
        stride, step = 4, 1
        at = sums_ptr + (c * num_tables * num_intervals + interval) * 4
    right, left = there & (knot < num_intervals), there & (knot > 0)
    quantum = tl.load(quantum_ptr).to(tl.float64)
    for n in tl.static_range(2):
        total = tl.load(at + n * step, mask=right, other=0)
        total += tl.load(at - stride + (2 + n) * step, mask=left, other=0)
        d_knot = (total.to(tl.float64) * quantum).to(d_knots_ptr.dtype.element_ty)
        tl.store(d_knots_ptr + (2 * row + n) * num_channels + c, d_knot, mask=there)


# Gaussians.


@triton.jit
def add_moments(
    sums_ptr, slot, radial, z, z_dot, h, g_bar, g_dot, K: tl.constexpr, IS_SECOND: tl.constexpr
):
    """Adds a tile's sums of `ḡ eᵖ φ`, p = 0 to 2; then of `g̃ ż eᵖ φ`, 0 to 3, `g̃ eᵖ φ`, 0 to 4.

    To numbers `[slots, 3 or 12, K]` that no other program adds to, in its own order.
    """
    COUNT: tl.constexpr = 12 if IS_SECOND else 3
    for k in range(K):
        e, _, _, phi = gaussian(radial, z, h, k, K)
        at = sums_ptr + slot.to(tl.int64) * (COUNT * K) + k
        for p in tl.static_range(5 if IS_SECOND else 3):
            if p < 3:
                tl.atomic_add(at + p * K, tl.sum(g_bar * phi), sem="relaxed")
            if IS_SECOND:
                if p < 4:
                    tl.atomic_add(at + (3 + p) * K, tl.sum(g_dot * z_dot * phi), sem="relaxed")
                tl.atomic_add(at + (7 + p) * K, tl.sum(g_dot * phi), sem="relaxed")
            phi = e * phi


# Both.


@triton.jit
def add(
    d_radial_ptr,
    quantum_ptr,
    slot,
    radial,
    x,
    z_dot,
    table,
    h,
    g_bar,
    g_dot,
    there,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    K: tl.constexpr,
    RADIAL: tl.constexpr,
    IS_FILTER: tl.constexpr,
    IS_SECOND: tl.constexpr,
):
    """Adds what a tile's `ḡ` on `f(z)` gives, and `g̃` on `f'(z) ż + ḟ(z)` of a second backward."""
    if K > 0:
        add_moments(d_radial_ptr, slot, radial, x, z_dot, h, g_bar, g_dot, K, IS_SECOND)
    else:
        add_to_table(
            d_radial_ptr,
            quantum_ptr,
            radial,
            x,
            z_dot,
            table,
            h,
            g_bar,
            g_dot,
            there,
            C,
            D,
            BLOCK_D,
            RADIAL,
            IS_FILTER,
            IS_SECOND,
        )


# The affine map.


@triton.jit
def no_affine(BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, DTYPE: tl.constexpr):
    """Sums for `m` and `c`, [I, T] each."""
    zero = tl.zeros([BLOCK_I, BLOCK_T], DTYPE)
    return zero, zero


@triton.jit
def add_affine(sums, d_m, d_c, types_j, BLOCK_T: tl.constexpr, IS_FILTER: tl.constexpr):
    """Adds what pairs give to `m` and `c`, [I, J], by the type of the key atom."""
    is_type = (types_j[:, None] == tl.arange(0, BLOCK_T)[None, :]).to(d_m.dtype)  # [J, T]
    return (
        sums[0] + pt.weigh_rows(d_m, is_type, IS_FILTER, "ieee"),
        sums[1] + pt.weigh_rows(d_c, is_type, IS_FILTER, "ieee"),
    )


@triton.jit
def store_affine(ptr, rows, there, sums, BLOCK_T: tl.constexpr):
    """Stores the sums of query atoms: `[rows, 2, T]`."""
    at = ptr + (rows * (2 * BLOCK_T))[:, None] + tl.arange(0, BLOCK_T)[None, :]
    tl.store(at, sums[0], mask=there[:, None])
    tl.store(at + BLOCK_T, sums[1], mask=there[:, None])


# Before and after the pass.


class RadialSums:
    """Where a pass puts what it adds to the radial function's parameters, and their gradient."""

    def __init__(
        self, problem: Problem, programs: int, quantum: Callable[[], Tensor], is_second: bool
    ) -> None:
        self._problem = problem
        self.quantum: Tensor | None = None
        device = problem.device
        if problem.is_table:
            self.quantum = quantum()
            size = 4 * problem.channels * problem.tables * problem.intervals
            self.sums = torch.zeros(size, dtype=torch.int64, device=device)
        else:
            shape = (programs, problem.channels, 12 if is_second else 3, problem.num_gaussians)
            self.sums = torch.zeros(shape, dtype=problem.dtype, device=device)

    def gradient(self, dot: Tensor | None = None) -> Tensor:
        """The gradient, like `radial`; `dot` is its tangent in a second backward pass."""
        problem = self._problem
        radial = problem.radial
        if not problem.is_table:
            return gaussians_gradient(radial, dot, self.sums.sum(0))
        gradient = torch.empty_like(radial)
        block = 256
        _knots_kernel[(-(-radial.numel() // (2 * block)),)](
            self.sums,
            self.quantum,
            gradient,
            problem.tables,
            problem.intervals,
            problem.channels,
            IS_FILTER=problem.is_filter,
            BLOCK=block,
            num_warps=4,
        )
        return gradient


def gaussians_gradient(radial: Tensor, dot: Tensor | None, sums: Tensor) -> Tensor:
    """The gradient of `[2 + C, K]` from sums over pairs `[C, 3 or 12, K]` (see `add_moments`).

    With `φ' = -2γeφ`, `∂φ/∂γ = -e²φ` and their derivatives; the tangent of a Gaussian goes along
    `ż - μ̇` and `γ̇`, and its weight `w` moves along `ẇ`.
    """
    gamma, w = radial[1], radial[2:]
    m = sums.unbind(1)  # [C, K] each
    of_center, of_gamma, of_w = 2 * gamma * m[1], -m[2], m[0]
    if len(m) == 3:
        return torch.cat((((w * of_center).sum(0, True)), (w * of_gamma).sum(0, True), of_w))
    center_dot, gamma_dot, w_dot = (0, 0, 0) if dot is None else (dot[0], dot[1], dot[2:])
    u = m[7:]
    s = [m[3 + p] - center_dot * u[p] for p in range(4)]  # Σ g̃ (ż - μ̇) eᵖ φ
    of_w = of_w - 2 * gamma * s[1] - gamma_dot * u[2]
    of_center = of_center + 2 * gamma * s[0] - 4 * gamma**2 * s[2]
    of_center = of_center + 2 * gamma_dot * (u[1] - gamma * u[3])
    of_gamma = of_gamma - 2 * s[1] + 2 * gamma * s[3] + gamma_dot * u[4]
    d_center = (w * of_center + w_dot * (2 * gamma * u[1])).sum(0, True)
    d_gamma = (w * of_gamma - w_dot * u[2]).sum(0, True)
    return torch.cat((d_center, d_gamma, of_w))


def affine_gradient(problem: Problem, sums: Tensor) -> Tensor:
    """The gradient of `affine [P, 2]` from sums `[groups, rows, 2, T]` over types of key atoms."""
    _, _, affine, mask, _, types, pair_index = problem.tensors
    num_types = problem.num_types
    sums = sums.sum(0)[..., :num_types]  # [rows, 2, T]
    if pair_index is None:
        return sums.sum(0).T.contiguous()
    types = types.flatten().long()
    if mask is not None:
        types = types.masked_fill(~mask.flatten(), 0)
    of_types = torch.nn.functional.one_hot(types, num_types).to(sums.dtype)
    by_types = torch.einsum("nt,ncu->tuc", of_types, sums)  # [T, T, 2]
    gradient = torch.zeros_like(affine)
    index = pair_index.flatten().long()
    return gradient.index_put_((index,), by_types.flatten(0, 1), accumulate=True)
