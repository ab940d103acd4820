"""The pair term, written once: distance, radial coordinate, scores, normalizers, and adjoints.

    d_ij = |x_i - x_j|,   z_ij = m_p d_ij + c_p
    bias      S_ij = κ q_i·k_j + f_h(z_ij)           f, g   [I, J]
    filter    S_ij = κ Σ_c q_ic k_jc f_c(z_ij)       f, g   [I, J, D]

`g` is the gradient of `f`. A tile is some query atoms `i` against some key atoms `j` of one
molecule and head; `D` is padded to a power of two. Vectors of atoms come as triples of
coordinates. `IS_FILTER` and `IS_LINEAR` choose score and normalizer.
"""

import triton
import triton.language as tl


class Constant(tl.constexpr):
    """A constant of the kernels.

    Triton compares them with themselves in every launch, which is faster than for `tl.constexpr`.
    """

    def __ne__(self, other: object) -> bool:
        """False where it is the same object."""
        return False if other is self else super().__ne__(other)


LOG2E = Constant(1.4426950408889634)
LN2 = Constant(0.6931471805599453)
INTERPRETED = Constant(triton.knobs.runtime.interpret)


@triton.jit
def log2(x):
    """The logarithm as the hardware has it, good to 2⁻²²: as good as its float32 sum with S."""
    if INTERPRETED or x.dtype == tl.float64:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal(x):
    """1/x as the hardware has it, good to one unit of rounding."""
    if INTERPRETED or x.dtype == tl.float64:
        return 1 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def opaque(x):
    """The same numbers, of which the compiler knows nothing: 32-bit integers or float32."""
    if INTERPRETED:
        return x
    elif x.dtype == tl.int32:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1
        )


# Molecules and their rows.


@triton.jit
def molecule(b, num_atoms, mask_ptr, ptr_ptr, BLOCK: tl.constexpr):
    """First row and number of rows of molecule `b`, and how far its real atoms reach."""
    if ptr_ptr is not None:
        first = tl.load(ptr_ptr + b).to(tl.int64)
        count = (tl.load(ptr_ptr + b + 1).to(tl.int64) - first).to(tl.int32)
        return first, count, count
    else:
        first = b.to(tl.int64) * num_atoms
        last = num_atoms
        if mask_ptr is not None:
            last = 0
            for start in range(0, num_atoms, BLOCK):
                offs = start + tl.arange(0, BLOCK)
                real = tl.load(mask_ptr + first + offs, mask=offs < num_atoms, other=False)
                last = tl.maximum(last, tl.max(tl.where(real, offs + 1, 0), 0))
        return first, num_atoms, last


@triton.jit
def real_atoms(mask_ptr, first, offs, last):
    """Which of the atoms `offs` are real, [I]."""
    real = offs < last
    if mask_ptr is not None:
        real = tl.load(mask_ptr + first + offs, mask=real, other=False)
    return real


@triton.jit
def feature_start(ptr, b, first, stride_b, stride_n, IS_PACKED: tl.constexpr, ALIGN: tl.constexpr):
    """Where the features of a molecule start."""
    if IS_PACKED:
        return ptr + tl.multiple_of(first * stride_n, ALIGN)
    else:
        return ptr + tl.multiple_of(b.to(tl.int64) * stride_b, ALIGN)


@triton.jit
def of_head(ptr, h, stride_h, ALIGN: tl.constexpr):
    """Where those of head `h` start."""
    return ptr + tl.multiple_of(h * stride_h, ALIGN)


@triton.jit
def load_rows(
    ptr, offs, real, stride_n, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr
):
    """Rows `[I, D]` of one head; 0 for padding. Offsets in a molecule fit 32 bits (`launch`)."""
    at = tl.multiple_of(offs * stride_n, ALIGN)
    offs_d = tl.arange(0, BLOCK_D)
    mask = real[:, None] & (offs_d < D)[None, :]
    return tl.load(ptr + at[:, None] + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(
    ptr, x, offs, there, stride_n, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr
):
    """Stores rows `[I, D]` of one head, rounding once."""
    at = tl.multiple_of(offs * stride_n, ALIGN)
    offs_d = tl.arange(0, BLOCK_D)
    mask = there[:, None] & (offs_d < D)[None, :]
    tl.store(ptr + at[:, None] + offs_d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_vectors(ptr, rows, real):
    """Triples of coordinates, [I] each; 0 for padding."""
    at = ptr + 3 * rows.to(tl.int64)
    x = tl.load(at, mask=real, other=0.0)
    y = tl.load(at + 1, mask=real, other=0.0)
    return x, y, tl.load(at + 2, mask=real, other=0.0)


@triton.jit
def store_vectors(ptr, xyz, rows, there):
    """Stores triples of coordinates."""
    at = ptr + 3 * rows.to(tl.int64)
    for n in tl.static_range(3):
        tl.store(at + n, xyz[n].to(ptr.dtype.element_ty), mask=there)


@triton.jit
def load_types(types_ptr, rows, real):
    """Types of atoms, [I]; 0 for padding and where there are none."""
    if types_ptr is not None:
        return tl.load(types_ptr + rows, mask=real, other=0).to(tl.int32)
    else:
        return tl.zeros(rows.shape, tl.int32)


@triton.jit
def load_atoms(positions_ptr, types_ptr, mask_ptr, first, offs, last):
    """Some atoms of a molecule: which are real, positions, types."""
    real = real_atoms(mask_ptr, first, offs, last)
    x = load_vectors(positions_ptr, first + offs, real)
    return real, x, load_types(types_ptr, first + offs, real)


@triton.jit
def load_numbers(ptr, at, real, DTYPE: tl.constexpr):
    """A number of each row, [I]; 0 for padding and where there is none."""
    if ptr is not None:
        return tl.load(ptr + at, mask=real, other=0.0)
    else:
        return tl.zeros(at.shape, DTYPE)


# Geometry.


@triton.jit
def inner(a_i, a_j, b_i, b_j):
    """`(a_i - a_j)·(b_i - b_j)`, [I, J]."""
    total = (a_i[0][:, None] - a_j[0][None, :]) * (b_i[0][:, None] - b_j[0][None, :])
    for n in tl.static_range(1, 3):
        total += (a_i[n][:, None] - a_j[n][None, :]) * (b_i[n][:, None] - b_j[n][None, :])
    return total


@triton.jit
def distances(x_i, x_j):
    """`d_ij`, [I, J]."""
    return tl.sqrt(inner(x_i, x_j, x_i, x_j))


@triton.jit
def inverse(d):
    """`1 / d`, and 0 where the distance is 0."""
    return tl.where(d > 0, 1 / tl.where(d > 0, d, 1), 0)


@triton.jit
def pairs_of(types_i, types_j, maps):
    """The number of the pair of types, [I, J]; 0 where there is one pair."""
    _, pair_index_ptr, num_types, _ = maps
    pair = types_i[:, None] * num_types + types_j[None, :]
    if pair_index_ptr is None:
        return 0 * pair
    else:
        return tl.load(pair_index_ptr + pair).to(tl.int32)


@triton.jit
def tables_of(types_i, types_j, maps):
    """The number of the table, [I, J]; 0 where there is one."""
    return tl.minimum(pairs_of(types_i, types_j, maps), maps[3] - 1)


@triton.jit
def geometry(x_i, x_j, types_i, types_j, maps):
    """Distance, number of the table, slope `m_p` and radial coordinate `z`, [I, J]."""
    affine_ptr, _, _, _ = maps
    d = distances(x_i, x_j)
    table = tables_of(types_i, types_j, maps)
    if affine_ptr is None:
        return d, table, tl.full(d.shape, 1.0, d.dtype), d
    else:
        pair = pairs_of(types_i, types_j, maps)
        m = tl.load(affine_ptr + 2 * pair)
        return d, table, m, m * d + tl.load(affine_ptr + 2 * pair + 1)


@triton.jit
def in_layout_of_scores(
    x, FEATURE: tl.constexpr, IS_FILTER: tl.constexpr, PRECISION: tl.constexpr
):
    """The same numbers where a matrix product on tensor cores leaves its own.

    Nothing else tells Triton where to keep what is used with scores again and again: it would
    carry each lookup's result there, for every head, instead of `x` once.
    """
    IS_EXACT: tl.constexpr = FEATURE.primitive_bitwidth == 32 and PRECISION == "ieee"
    if IS_FILTER or IS_EXACT or FEATURE.primitive_bitwidth == 64:
        return x
    else:
        zero = tl.zeros([x.shape[0], 16], tl.bfloat16)
        return x + tl.dot(zero, tl.trans(tl.zeros([x.shape[1], 16], tl.bfloat16)))


@triton.jit
def pull_vectors(weight, x_i, x_j, AXIS: tl.constexpr):
    """`Σ weight_ij (x_i - x_j)` over axis 1 (the keys) or 0, a triple of vectors."""
    x = tl.sum(weight * (x_i[0][:, None] - x_j[0][None, :]), AXIS)
    y = tl.sum(weight * (x_i[1][:, None] - x_j[1][None, :]), AXIS)
    return x, y, tl.sum(weight * (x_i[2][:, None] - x_j[2][None, :]), AXIS)


@triton.jit
def add_vectors(a, b):
    """Adds triples."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


@triton.jit
def subtract_vectors(a, b):
    """Subtracts triples."""
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


@triton.jit
def no_vectors(BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """A triple of zeros."""
    zero = tl.zeros([BLOCK], DTYPE)
    return zero, zero, zero


@triton.jit
def replaced(x, n: tl.constexpr, new):
    """A tuple with another member `n`."""
    result = ()
    for k in tl.static_range(len(x)):
        if k == n:
            result += (new,)
        else:
            result += (x[k],)
    return result


# The scores and their adjoints.


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """`[I, J] @ [J, D]` in the dtype of `b`, summed in that of scores."""
    if b.dtype == tl.float64:
        return tl.dot(a, b, out_dtype=tl.float64)
    else:
        return tl.dot(a.to(b.dtype), b, input_precision=PRECISION)


@triton.jit
def products(q, k, f, scale, IS_FILTER: tl.constexpr, PRECISION: tl.constexpr):
    """`κ q_i·k_j`, or `κ Σ_c q_ic k_jc f_c` of a filter, [I, J]."""
    if IS_FILTER:
        return scale * tl.sum(q[:, None, :] * k[None, :, :] * f, 2)
    else:
        return scale * product(q, tl.trans(k), PRECISION)


@triton.jit
def scores(q, k, f, scale, IS_FILTER: tl.constexpr, PRECISION: tl.constexpr):
    """`S_ij`, [I, J]."""
    s = products(q, k, f, scale, IS_FILTER, PRECISION)
    if IS_FILTER:
        return s
    else:
        return s + f


@triton.jit
def weigh_rows(p, v, IS_FILTER: tl.constexpr, PRECISION: tl.constexpr):
    """`Σ_j p_ij v_j`, [I, D]."""
    if IS_FILTER:
        return tl.sum(p[:, :, None] * v[None, :, :], 1)
    else:
        return product(p, v, PRECISION)


@triton.jit
def weigh_columns(p, v, IS_FILTER: tl.constexpr, PRECISION: tl.constexpr):
    """`Σ_i p_ij v_i`, [J, D]."""
    if IS_FILTER:
        return tl.sum(p[:, :, None] * v[:, None, :], 0)
    else:
        return product(tl.trans(p), v, PRECISION)


@triton.jit
def inner_rows(a, b, IS_FILTER: tl.constexpr, PRECISION: tl.constexpr):
    """`a_i·b_j`, [I, J]."""
    if IS_FILTER:
        return tl.sum(a[:, None, :] * b[None, :, :], 2)
    else:
        return product(a, tl.trans(b), PRECISION)


@triton.jit
def pull_q(e, k, f, IS_FILTER: tl.constexpr, PRECISION: tl.constexpr):
    """Adjoint of `products` in `q`, without κ: `Σ_j e_ij k_j [f]`, [I, D]."""
    if IS_FILTER:
        return tl.sum(e[:, :, None] * f * k[None, :, :], 1)
    else:
        return product(e, k, PRECISION)


@triton.jit
def pull_k(e, q, f, IS_FILTER: tl.constexpr, PRECISION: tl.constexpr):
    """Adjoint of `products` in `k`, without κ: `Σ_i e_ij q_i [f]`, [J, D]."""
    if IS_FILTER:
        return tl.sum(e[:, :, None] * f * q[:, None, :], 0)
    else:
        return product(tl.trans(e), q, PRECISION)


@triton.jit
def pull_f(e, q, k, scale, IS_FILTER: tl.constexpr):
    """Adjoint of the scores in `f`: `e_ij`, or `κ e_ij q_ic k_jc`."""
    if IS_FILTER:
        return (scale * e)[:, :, None] * q[:, None, :] * k[None, :, :]
    else:
        return e


@triton.jit
def over_channels(x, IS_FILTER: tl.constexpr):
    """Sums what the channels of a head give, [I, J]."""
    if IS_FILTER:
        return tl.sum(x, 2)
    else:
        return x


@triton.jit
def per_channel(x, IS_FILTER: tl.constexpr):
    """A number of the pair, for all channels of a filter: `[I, J]` as f is shaped."""
    if IS_FILTER:
        return x[:, :, None]
    else:
        return x


# The normalizers.


@triton.jit
def without_padding(s, real_j, IS_DONE: tl.constexpr, IS_LINEAR: tl.constexpr):
    """Scores, 0 or -∞ where the key is padding; `IS_DONE` where the table's rows did that."""
    if IS_DONE:
        return s
    elif IS_LINEAR:
        return tl.where(real_j[None, :], s, 0)
    else:
        return s + tl.where(real_j, 0.0, -float("inf"))[None, :]


@triton.jit
def weights(s, log_sum, pairs, IS_DONE: tl.constexpr, IS_LINEAR: tl.constexpr):
    """`P_ij` from the scores and `L_i`, spread over keys; 0 where either atom is padding."""
    if IS_LINEAR:
        return s if IS_DONE else tl.where(pairs, s, 0)
    else:
        p = tl.exp2(s * LOG2E - log_sum * LOG2E)
        return p if IS_DONE else tl.where(pairs, p, 0)
