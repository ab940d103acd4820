"""The forms of a table that kernels of a bias read (`radial` says what for).

**Rows.** The cubic of interval `g`, `f = c_0 + c_1 t + c_2 t² + c_3 t³`, is row `g + 2` of a
channel. Rows 0 and 1 have the constant below the table, row `G + 2` that above it, so a coordinate
needs no test, only a clamp: where it is exactly `r_min`, rounding to even picks row 2. Row `G + 3`
is for pairs with padding: -∞, which takes them out of a softmax, or 0; row `G + 4` for distances
that are not numbers, and says so.

**Words.** A linear table of at least 2048 intervals, values in units of 1/32767 of the channel's
range: `Y` in the upper 16 bits, `Y_next - Y + 32768` in the lower. Then the unit and what `Y = 0`
stands for, float32 each, and two words of nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pair import Constant
from .radial import KNOTS, VALUE, combine

_WORDS = 2048
MAX_WORDS = 4096
_PIECE = Constant(1024)  # of a channel's words, at a time


@triton.jit
def _interval(knots_ptr, table, g, c, num_intervals, num_channels, there):
    """`y_0`, `s_0`, `y_1`, `s_1` of an interval."""
    at = knots_ptr + (table * (num_intervals + 1) + g) * (2 * num_channels) + c
    y_0 = tl.load(at, mask=there, other=0.0)
    s_0 = tl.load(at + num_channels, mask=there, other=0.0)
    y_1 = tl.load(at + 2 * num_channels, mask=there, other=0.0)
    return y_0, s_0, y_1, tl.load(at + 3 * num_channels, mask=there, other=0.0)


@triton.jit(do_not_specialize=("num_tables", "num_intervals", "num_channels"))
def _rows_kernel(
    knots_ptr,  # [P, G+1, 2, C]
    rows_ptr,  # [C, P, G+5, 4]
    num_tables,
    num_intervals,
    num_channels,
    of_padding,
    BLOCK: tl.constexpr,
):
    """Coefficients from knots."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c, row = offs % num_channels, offs // num_channels
    table, row = row // (num_intervals + 5), row % (num_intervals + 5)
    there = table < num_tables
    g = tl.minimum(tl.maximum(row - 2, 0), num_intervals - 1)
    y_0, s_0, y_1, s_1 = _interval(knots_ptr, table, g, c, num_intervals, num_channels, there)
    rise = y_1 - y_0
    inside = (row >= 2) & (row < num_intervals + 2)
    at = rows_ptr + ((c * num_tables + table) * (num_intervals + 5) + row) * 4
    c_0 = tl.where(row > num_intervals + 1, y_1, y_0)
    c_0 = tl.where(row > num_intervals + 2, of_padding, c_0)
    c_0 = tl.where(row > num_intervals + 3, float("nan"), c_0)
    tl.store(at, c_0, mask=there)
    tl.store(at + 1, tl.where(inside, s_0, 0), mask=there)
    tl.store(at + 2, tl.where(inside, 3 * rise - 2 * s_0 - s_1, 0), mask=there)
    tl.store(at + 3, tl.where(inside, s_0 + s_1 - 2 * rise, 0), mask=there)


@triton.jit
def _fine_value(knots_ptr, n, c, fine, num_intervals, num_channels):
    """The cubic at fine knot `n`, `fine` for each interval."""
    g = tl.minimum(n // fine, num_intervals - 1)
    t = (n - g * fine).to(tl.float32) / fine
    y_0, s_0, y_1, s_1 = _interval(knots_ptr, 0, g, c, num_intervals, num_channels, n >= 0)
    return combine((y_0, s_0, y_1 - y_0, s_1), t, VALUE, KNOTS)


@triton.jit(do_not_specialize=("num_intervals", "num_channels", "fine"))
def _words_kernel(
    knots_ptr,  # [1, G+1, 2, C]
    words_ptr,  # [C, W + 4]
    num_intervals,
    num_channels,
    fine,
    W: tl.constexpr,
):
    """A channel's words."""
    c = tl.program_id(0)
    lowest = tl.load(knots_ptr + c)
    highest = lowest
    for start in range(0, W, _PIECE):
        n = tl.minimum(start + tl.arange(0, _PIECE), num_intervals * fine)
        f = _fine_value(knots_ptr, n, c, fine, num_intervals, num_channels)
        lowest, highest = tl.minimum(lowest, tl.min(f, 0)), tl.maximum(highest, tl.max(f, 0))
    span = highest - lowest
    unit = tl.where(span > 0, span, 1.0) / 32767
    words_ptr += c * (W + 4)
    for start in range(0, W, _PIECE):
        offs = start + tl.arange(0, _PIECE)
        n = tl.minimum(offs, num_intervals * fine)
        f = _fine_value(knots_ptr, n, c, fine, num_intervals, num_channels)
        n = tl.minimum(offs + 1, num_intervals * fine)
        f_next = _fine_value(knots_ptr, n, c, fine, num_intervals, num_channels)
        y = tl.floor((f - lowest) / unit + 0.5).to(tl.int32)
        rise = tl.floor((f_next - lowest) / unit + 0.5).to(tl.int32) - y
        tl.store(words_ptr + offs, (y << 16) | (rise + 32768))
    tl.store(words_ptr + W, unit.to(tl.int32, bitcast=True))
    tl.store(words_ptr + W + 1, lowest.to(tl.int32, bitcast=True))


def rows_of(knots: Tensor, of_padding: float) -> Tensor:
    """The rows `[C, P, G+5, 4]` of knots `[P, G+1, 2, C]`."""
    tables, knots_of_each, _, channels = knots.shape
    rows = knots.new_empty(channels, tables, knots_of_each + 4, 4)
    block = 128
    _rows_kernel[(-(-rows.numel() // (4 * block)),)](
        knots,
        rows,
        tables,
        knots_of_each - 1,
        channels,
        of_padding,
        BLOCK=block,
        num_warps=4,
    )
    return rows


def words_of(knots: Tensor) -> tuple[Tensor, int]:
    """The words `[C, W + 4]` of knots `[1, G+1, 2, C]`, and how many make an interval."""
    intervals, channels = knots.shape[1] - 1, knots.shape[3]
    fine = max(_WORDS // intervals, 1)
    size = MAX_WORDS if intervals > _WORDS else _WORDS
    words = torch.empty(channels, size + 4, dtype=torch.int32, device=knots.device)
    _words_kernel[(channels,)](knots, words, intervals, channels, fine, W=size, num_warps=4)
    return words, fine
