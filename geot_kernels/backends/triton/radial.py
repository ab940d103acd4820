"""The radial function in a kernel: a table's cubic, or a sum of Gaussians, and derivatives.

On the interval `z = z_g + t h`, with `y_1 - y_0` so that no derivative is a difference of large
numbers (the weights and their adjoint are section 4 of docs/math.md):

    f = y_0 + w_y (y_1 - y_0) + w_0 s_0 + w_1 s_1

`radial` bundles what describes the function: `(pointer, channels C, intervals G, tables P,
r_min, r_max, 1/h)`; of Gaussians `(pointer, ...)` to centers, gammas and weights `[2 + C, K]`.
"""

import triton
import triton.language as tl

from .pair import LOG2E, per_channel

# Derivatives of the cubic in t: 0, 1, 2.
VALUE = tl.constexpr(0)
SLOPE = tl.constexpr(1)
CURVATURE = tl.constexpr(2)


@triton.jit
def locate(radial, z):
    """The interval `g`, the fraction `t` in it, and 1/h, which is 0 outside of the table."""
    _, _, intervals, _, r_min, r_max, per_h = radial
    top = intervals.to(z.dtype)
    u = tl.clamp((z - r_min) * per_h, 0.0 * top, top, propagate_nan=tl.PropagateNan.ALL)
    g = tl.minimum(tl.maximum(u.to(tl.int32), 0), intervals - 1)
    inside = (z >= r_min) & (z <= r_max)
    return g, u - g.to(z.dtype), tl.where(inside, per_h, 0.0)


@triton.jit
def hermite(t, ORDER: tl.constexpr):
    """The weights of `y_1 - y_0`, `s_0` and `s_1` in a derivative by `t`."""
    if ORDER == VALUE:
        u = 1 - t
        return t * t * (3 - 2 * t), t * u * u, -t * t * u
    else:
        if ORDER == SLOPE:
            return 6 * t * (1 - t), (3 * t - 4) * t + 1, (3 * t - 2) * t
        else:
            return 6 - 12 * t, 6 * t - 4, 6 * t - 2


@triton.jit
def load_knots(radial, table, g, h, there, D: tl.constexpr, BLOCK_D: tl.constexpr, IS_FILTER: tl.constexpr):
    """`y_0`, `s_0`, `y_1 - y_0`, `s_1` of intervals, `[I, J]` or `[I, J, D]`."""
    ptr, channels, intervals, _, _, _, _ = radial
    channel, real_d = channels_of(h, D, BLOCK_D, IS_FILTER)
    at = ptr + per_channel((table * (intervals + 1) + g) * (2 * channels), IS_FILTER) + channel
    if IS_FILTER:
        there = there[:, :, None] & real_d
        y_0 = tl.load(at, mask=there, other=0.0)
        s_0 = tl.load(at + channels, mask=there, other=0.0)
        y_1 = tl.load(at + 2 * channels, mask=there, other=0.0)
        s_1 = tl.load(at + 3 * channels, mask=there, other=0.0)
    else:  # every address is valid
        y_0, s_0 = tl.load(at), tl.load(at + channels)
        y_1, s_1 = tl.load(at + 2 * channels), tl.load(at + 3 * channels)
    return y_0, s_0, y_1 - y_0, s_1


@triton.jit
def combine(knots, t, ORDER: tl.constexpr):
    """A derivative of the cubic, by t."""
    w_y, w_0, w_1 = hermite(t, ORDER)
    risen = w_y * knots[2] + (w_0 * knots[1] + w_1 * knots[3])
    if ORDER == VALUE:
        return knots[0] + risen
    else:
        return risen


@triton.jit
def channels_of(h, D: tl.constexpr, BLOCK_D: tl.constexpr, IS_FILTER: tl.constexpr):
    """The channels of a head, and which of them are there."""
    if IS_FILTER:
        offs_d = tl.arange(0, BLOCK_D)[None, None, :]
        return h * D + offs_d, offs_d < D
    else:
        return h, True


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
def evaluate(
    radial,
    z,
    table,
    h,
    there,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    K: tl.constexpr,
    IS_FILTER: tl.constexpr,
    NEEDS_SLOPE: tl.constexpr,
):
    """`f` and `f'` at the pairs of a tile, of the channels of head `h`."""
    if K > 0:
        return gaussians(radial, z, h, K, NEEDS_SLOPE)
    else:
        g, t, per_h = locate(radial, z)
        knots = load_knots(radial, table, g, h, there, D, BLOCK_D, IS_FILTER)
        t = per_channel(t, IS_FILTER)
        f = combine(knots, t, VALUE)
        if NEEDS_SLOPE:
            return f, per_channel(per_h, IS_FILTER) * combine(knots, t, SLOPE)
        else:
            return f, f


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


@triton.jit
def evaluate_twice(
    radial,
    dot_ptr,
    z,
    table,
    h,
    there,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    K: tl.constexpr,
    IS_FILTER: tl.constexpr,
):
    """`f`, `f'`, `f''`, and along the parameters' tangent `ḟ`, `ḟ'` (0 where there is none)."""
    if K > 0:
        return gaussians_twice(radial, dot_ptr, z, h, K)
    else:
        g, t, per_h = locate(radial, z)
        knots = load_knots(radial, table, g, h, there, D, BLOCK_D, IS_FILTER)
        t, per_h = per_channel(t, IS_FILTER), per_channel(per_h, IS_FILTER)
        f = combine(knots, t, VALUE)
        f1 = per_h * combine(knots, t, SLOPE)
        f2 = per_h * per_h * combine(knots, t, CURVATURE)
        if dot_ptr is None:
            return f, f1, f2, 0 * f, 0 * f
        else:
            _, channels, intervals, tables, r_min, r_max, step = radial
            dot = (dot_ptr, channels, intervals, tables, r_min, r_max, step)
            knots = load_knots(dot, table, g, h, there, D, BLOCK_D, IS_FILTER)
            return f, f1, f2, combine(knots, t, VALUE), per_h * combine(knots, t, SLOPE)
