"""The radial function in a kernel: a table's cubic, or a sum of Gaussians, and derivatives.

A table comes in one of three forms (`RADIAL`):

    KNOTS   as the user has it, `[P, G+1, 2, C]`: values and slopes, read at `y_0 s_0 y_1 s_1`
    ROWS    of a bias: `[C, P, G+5, 4]`, the coefficients of each interval's cubic, 16 bytes that
            one instruction reads; constant rows below and above it (see `tables`)
    WORDS   of a bias in 16 bits that nobody differentiates: `[C, W]`, value and rise of a finer
            linear table in 32 bits, which a program reads from shared memory

`GAUSSIANS` are evaluated as they are, K exponentials for each pair: centers, gammas and weights
`[2 + C, K]`. `K` is their number, or that of the words `W`. `radial` bundles `(pointer, intervals
`G`, tables `P`, r_min, r_max, 1/h)`.
"""

import triton
import triton.language as tl

from .pair import INTERPRETED, LOG2E, Constant, per_channel

KNOTS = Constant(0)
ROWS = Constant(1)
WORDS = Constant(2)
GAUSSIANS = Constant(3)

_MAGIC = Constant(12582912.0)  # 1.5 · 2²³: the last bits of x + magic are x, rounded
_MAGIC_BITS = Constant(0x4B400000)

# Derivatives of the cubic in t: 0, 1, 2.
VALUE = Constant(0)
SLOPE = Constant(1)
CURVATURE = Constant(2)


# Where a pair is in the table.


@triton.jit
def coordinate(radial, z, pairs, RADIAL: tl.constexpr):
    """The number of a pair that all heads share: `z`, or which row it is in, and how far.

    Rows and words are clamped to what is there; pairs with padding have a row of their own, and so
    have distances that are not numbers.
    """
    _, intervals, _, r_min, r_max, per_h = radial
    if RADIAL == ROWS:
        end = intervals.to(z.dtype) + 2.0
        u = (z - r_min) * per_h + 2.0
        # r_max itself belongs to the last interval, where rounding to even could miss it.
        u = tl.minimum(tl.maximum(u, 1.0), end if INTERPRETED else end * (1 - 2**-23))
        u = tl.where(z > r_max, end + 0.5, u)
        return tl.where(pairs, tl.where(z == z, u, end + 2.5), end + 1.5)
    elif RADIAL == WORDS:
        top = intervals.to(z.dtype) - 0.001
        u = (z - r_min) * per_h
        return tl.minimum(tl.maximum(u, 0.0), top) + 0 * z
    else:
        return z


@triton.jit
def split(u, end):
    """`u = n + t`, `0 <= t <= 1`, without conversions, which are slow; `t = 1` at `end`."""
    if INTERPRETED:
        n = tl.where(u == end, end - 1, tl.floor(u))
        return n.to(tl.int32), u - n
    else:
        shifted = u + (_MAGIC - 0.5)
        return shifted.to(tl.int32, bitcast=True) - _MAGIC_BITS, u - (shifted - _MAGIC)


@triton.jit
def interval_of(radial, x, RADIAL: tl.constexpr):
    """The interval `g`, the fraction `t` in it, and 1/h, which is 0 outside of the table."""
    _, intervals, _, r_min, r_max, per_h = radial
    if RADIAL == ROWS:
        row, t = split(x, intervals.to(x.dtype) + 2)
        inside = (row >= 2) & (row < intervals + 2)
        t = tl.where(row < 2, 0.0, tl.where(row < intervals + 2, t, 1.0))
        g = tl.minimum(tl.maximum(row - 2, 0), intervals - 1)
        return g, t, tl.where(inside, per_h, 0.0)
    else:
        top = intervals.to(x.dtype)
        u = tl.clamp((x - r_min) * per_h, 0.0 * top, top, propagate_nan=tl.PropagateNan.ALL)
        g = tl.minimum(tl.maximum(u.to(tl.int32), 0), intervals - 1)
        inside = (x >= r_min) & (x <= r_max)
        return g, u - g.to(x.dtype), tl.where(inside, per_h, 0.0)


@triton.jit
def locate(radial, x, table, C: tl.constexpr, RADIAL: tl.constexpr):
    """Where `evaluate` finds a pair: an offset, the fraction `t`, and 1/h, 0 outside."""
    _, intervals, _, _, _, per_h = radial
    if RADIAL == GAUSSIANS:
        return table, x, x
    elif RADIAL == KNOTS:
        g, t, inside = interval_of(radial, x, RADIAL)
        return (table * (intervals + 1) + g) * (2 * C), t, inside
    elif RADIAL == ROWS:
        row, t = split(x, intervals.to(x.dtype) + 2)
        return 4 * (table * (intervals + 5) + row), t, per_h
    else:
        row, t = split(x, intervals.to(x.dtype))
        return tl.minimum(tl.maximum(row, 0), intervals - 1), t, per_h  # where x is no number


# What is there.


@triton.jit
def look_up(ptr, at):
    """Four float32 numbers at `at [I, J]` of a table that nobody writes.

    As an instruction of its own a lookup takes whatever layout the scores have. Triton would give
    a `tl.load` a layout for neighbouring addresses, which these are not, and then carry every
    result through shared memory into the layout of the scores.
    """
    if INTERPRETED:
        at = ptr + at
        return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 at; mul.wide.u32 at, $5, 4; add.s64 at, at, $4;"
            "  ld.global.nc.v4.f32 {$0, $1, $2, $3}, [at]; }",
            "=f,=f,=f,=f,l,r",
            [tl.zeros(at.shape, tl.int64) + ptr.to(tl.int64), at],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def linear(ptr, place, h, W: tl.constexpr):
    """The linear table's value, from words in shared memory."""
    ptr += h * (W + 4)
    words = tl.load(ptr + tl.arange(0, W))
    unit = tl.load(ptr + W).to(tl.float32, bitcast=True)
    lowest = tl.load(ptr + W + 1).to(tl.float32, bitcast=True)
    at, t, _ = place
    SIZE: tl.constexpr = at.shape[0] * at.shape[1]
    word = tl.reshape(tl.gather(words, tl.reshape(at, [SIZE]), 0), at.shape)
    if INTERPRETED:
        y, rise = (word >> 16).to(tl.float32), ((word & 0xFFFF) - 32768).to(tl.float32)
        return lowest + unit * (y + t * rise)
    else:  # as the last bits of 2²³ + n: conversions are slow
        y, rise = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0x4B00, 0x5432; prmt.b32 $1, $2, 0x4B00, 0x5410;",
            "=f,=f,r",
            [word],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
        rise -= 8421376.0
        return (lowest - unit * 8388608.0) + unit * (y + t * rise)


@triton.jit
def load_knots(
    ptr,
    at,
    h,
    there,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_FILTER: tl.constexpr,
):
    """`y_0`, `s_0`, `y_1 - y_0`, `s_1` of intervals, `[I, J]` or `[I, J, D]`."""
    channel, real_d = channels_of(h, D, BLOCK_D, IS_FILTER)
    at = ptr + per_channel(at, IS_FILTER) + channel
    there = per_channel(there, IS_FILTER) & real_d
    y_0 = tl.load(at, mask=there, other=0.0)
    s_0 = tl.load(at + C, mask=there, other=0.0)
    y_1 = tl.load(at + 2 * C, mask=there, other=0.0)
    s_1 = tl.load(at + 3 * C, mask=there, other=0.0)
    return y_0, s_0, y_1 - y_0, s_1


@triton.jit
def channels_of(h, D: tl.constexpr, BLOCK_D: tl.constexpr, IS_FILTER: tl.constexpr):
    """The channels of a head, and which of them are there."""
    if IS_FILTER:
        offs_d = tl.arange(0, BLOCK_D)[None, None, :]
        return h * D + offs_d, offs_d < D
    else:
        return h, True


# The cubic and its derivatives by t.


@triton.jit
def hermite(t, ORDER: tl.constexpr):
    """The weights of `y_1 - y_0`, `s_0` and `s_1` in a derivative by `t`.

    With `y_1 - y_0`, no derivative is a difference of large numbers.
    """
    if ORDER == VALUE:
        u = 1 - t
        return t * t * (3 - 2 * t), t * u * u, -t * t * u
    elif ORDER == SLOPE:
        return 6 * t * (1 - t), (3 * t - 4) * t + 1, (3 * t - 2) * t
    else:
        return 6 - 12 * t, 6 * t - 4, 6 * t - 2


@triton.jit
def combine(knots, t, ORDER: tl.constexpr, RADIAL: tl.constexpr):
    """A derivative of the cubic, by t, from an interval's knots or its coefficients."""
    if RADIAL == KNOTS:
        w_y, w_0, w_1 = hermite(t, ORDER)
        risen = w_y * knots[2] + (w_0 * knots[1] + w_1 * knots[3])
        if ORDER == VALUE:
            return knots[0] + risen
        else:
            return risen
    elif ORDER == VALUE:
        return knots[0] + t * (knots[1] + t * (knots[2] + t * knots[3]))
    elif ORDER == SLOPE:
        return knots[1] + t * (2 * knots[2] + t * (3 * knots[3]))
    else:
        return 2 * knots[2] + t * (6 * knots[3])


@triton.jit
def cubic(
    radial,
    place,
    h,
    there,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RADIAL: tl.constexpr,
    IS_FILTER: tl.constexpr,
):
    """The numbers of the pairs' intervals, for `combine`."""
    ptr, intervals, tables, _, _, _ = radial
    if RADIAL == KNOTS:
        return load_knots(ptr, place[0], h, there, C, D, BLOCK_D, IS_FILTER)
    else:
        return look_up(ptr + 4 * h * (tables * (intervals + 5)).to(tl.int64), place[0])


# Gaussians.


@triton.jit
def gaussian(radial, z, h, k, K: tl.constexpr):
    """`e = z - μ_k`, `γ_k`, `w_hk` and `φ_k`."""
    ptr = radial[0]
    e = z - tl.load(ptr + k)
    gamma = tl.load(ptr + K + k)
    return e, gamma, tl.load(ptr + (2 + h) * K + k), tl.exp2(-LOG2E * gamma * e * e)


@triton.jit
def gaussians(radial, z, h, K: tl.constexpr, NEEDS_SLOPE: tl.constexpr):
    """`f_h(z)` and `f_h'(z)`."""
    f, f1 = 0 * z, 0 * z
    for k in range(K):
        e, gamma, w, phi = gaussian(radial, z, h, k, K)
        f += w * phi
        if NEEDS_SLOPE:
            f1 += -2 * w * gamma * (e * phi)
    return f, f1


@triton.jit
def gaussians_twice(radial, dot_ptr, z, h, K: tl.constexpr):
    """`f`, `f'`, `f''`, `ḟ`, `ḟ'` of Gaussians."""
    f, f1, f2, f_dot, f1_dot = 0 * z, 0 * z, 0 * z, 0 * z, 0 * z
    for k in range(K):
        e, gamma, w, phi = gaussian(radial, z, h, k, K)
        by_z = -2 * gamma * (e * phi)
        by_zz = -2 * gamma * (phi + e * by_z)
        f += w * phi
        f1 += w * by_z
        f2 += w * by_zz
        if dot_ptr is not None:
            by_gamma = -e * (e * phi)
            by_z_gamma = -2 * (e * phi + gamma * e * by_gamma)
            center_dot, gamma_dot = tl.load(dot_ptr + k), tl.load(dot_ptr + K + k)
            w_dot = tl.load(dot_ptr + (2 + h) * K + k)
            f_dot += w_dot * phi + w * (by_gamma * gamma_dot - by_z * center_dot)
            f1_dot += w_dot * by_z + w * (by_z_gamma * gamma_dot - by_zz * center_dot)
    return f, f1, f2, f_dot, f1_dot


# Any of them, at the pairs of a tile, for the channels of head `h`.


@triton.jit
def evaluate(
    radial,
    place,
    h,
    there,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    K: tl.constexpr,
    RADIAL: tl.constexpr,
    IS_FILTER: tl.constexpr,
    NEEDS_SLOPE: tl.constexpr,
):
    """`f` and `f'`."""
    if RADIAL == GAUSSIANS:
        return gaussians(radial, place[1], h, K, NEEDS_SLOPE)
    elif RADIAL == WORDS:
        f = linear(radial[0], place, h, K)
        return f, f
    else:
        knots = cubic(radial, place, h, there, C, D, BLOCK_D, RADIAL, IS_FILTER)
        t = per_channel(place[1], IS_FILTER)
        f = combine(knots, t, VALUE, RADIAL)
        if NEEDS_SLOPE:
            return f, per_channel(place[2], IS_FILTER) * combine(knots, t, SLOPE, RADIAL)
        else:
            return f, f


@triton.jit
def evaluate_twice(
    radial,
    dot_ptr,
    place,
    h,
    there,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    K: tl.constexpr,
    RADIAL: tl.constexpr,
    IS_FILTER: tl.constexpr,
):
    """`f`, `f'`, `f''`, and along the parameters' tangent `ḟ`, `ḟ'` (0 where there is none)."""
    if RADIAL == GAUSSIANS:
        return gaussians_twice(radial, dot_ptr, place[1], h, K)
    else:
        knots = cubic(radial, place, h, there, C, D, BLOCK_D, RADIAL, IS_FILTER)
        t, per_h = per_channel(place[1], IS_FILTER), per_channel(place[2], IS_FILTER)
        f = combine(knots, t, VALUE, RADIAL)
        f1 = per_h * combine(knots, t, SLOPE, RADIAL)
        f2 = per_h * per_h * combine(knots, t, CURVATURE, RADIAL)
        if dot_ptr is None:
            zero = tl.zeros(f.shape, f.dtype)
            return f, f1, f2, zero, zero
        else:
            dot = (dot_ptr, radial[1], radial[2], radial[3], radial[4], radial[5])
            knots = cubic(dot, place, h, there, C, D, BLOCK_D, RADIAL, IS_FILTER)
            f1_dot = per_h * combine(knots, t, SLOPE, RADIAL)
            return f, f1, f2, combine(knots, t, VALUE, RADIAL), f1_dot
