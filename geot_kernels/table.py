"""A radial function as a table: a C² cubic spline on uniform knots, and its interpolation.

    z = z_g + t h,  0 <= t <= 1
    f(z) = (1+2t)(1-t)² y_g + t(1-t)² s_g + t²(3-2t) y_{g+1} + t²(t-1) s_{g+1}

Whatever network makes a radial function, it is a function of one number. So a step evaluates it
at about a thousand knots with ordinary PyTorch (`tabulate`), and everything else interpolates.
Gradients flow back through the knots into the network.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

RadialFunction = Callable[..., Tensor]

_ROOT = math.sqrt(3.0) - 2.0  # ρ, the decaying root of ρ² + 4ρ + 1 = 0
_BLOCK = {torch.float32: 16, torch.float64: 32}  # taps on each side: |ρ|^16 = 7e-10, 5e-19
_END_SLOPE = (-25 / 12, 48 / 12, -36 / 12, 16 / 12, -3 / 12)  # of y_0..y_4, fourth order
MIN_KNOTS = len(_END_SLOPE)
_FLOAT32_KNOTS = 1024  # beyond, rounding in float32 spoils f''


@dataclass(frozen=True, eq=False)
class RadialTable:
    """Values and slopes of a radial function at uniform knots, as `tabulate` makes them.

    A pytree: it can be an argument of `torch.export`, `make_fx` and `torch.compile`d functions.

    Attributes:
        knots: `[P, num_knots, 2, C]`, float32 or float64: value, and slope times the distance of
            two knots, in the unit of the function. Channel `h*D + c` belongs to head `h`.
            Differentiable, twice.
        r_min: Radial coordinate of the first knot, Å.
        r_max: Radial coordinate of the last knot, Å.
        pair_index: `[T, T]` int64, symmetric: the pair `p` of two atom types; None without types.
        affine: `[P', 2]`, `(m, c)` of each pair: the radial coordinate is `m d + c`;
            None for `d` itself. Differentiable, twice.
    """

    knots: Tensor
    r_min: float
    r_max: float
    pair_index: Tensor | None = None
    affine: Tensor | None = None

    @property
    def num_channels(self) -> int:
        """Radial channels `C`."""
        return self.knots.shape[-1]

    @property
    def num_knots(self) -> int:
        """Knots of each function, `G + 1`."""
        return self.knots.shape[1]

    def __call__(
        self, dist: Tensor, types_i: Tensor | None = None, types_j: Tensor | None = None
    ) -> Tensor:
        """Evaluates the tabulated function: distances `[...]`, Å, to `[..., C]`.

        Differentiable in the distances, the knots and the affine map; the derivatives are those
        of the piecewise cubic, so the third one jumps at the knots.

        Args:
            dist: `[...]`, Å.
            types_i: `[...]` int, needed where the table has a `pair_index`.
            types_j: `[...]` int, likewise.

        Raises:
            ValueError: `types_i` or `types_j` is missing.
        """
        pair = None
        if self.pair_index is not None:
            if types_i is None or types_j is None:
                raise ValueError("types_i, types_j: expected atom types, got None")
            pair = self.pair_index[types_i, types_j]
        z, _ = radial_coordinate(dist, self.affine, pair)
        if self.knots.shape[0] == 1:
            pair = None
        return interpolate(self.knots, z, pair, self.r_min, self.r_max)


torch.export.register_dataclass(RadialTable, serialized_type_name="geot_kernels.RadialTable")


def radial_coordinate(
    dist: Tensor, affine: Tensor | None, pair: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Computes `z = m_p d + c_p` and returns it with `m_p` (None where the map is absent)."""
    if affine is None:
        return dist, None
    m, c = affine.unbind(-1)
    if pair is not None:
        m, c = m[pair], c[pair]
    return m * dist + c, m.expand_as(dist)


def hermite(t: Tensor) -> Tensor:
    """Weights of `(y_g, s_g, y_{g+1}, s_{g+1})` in `f`: `[...]` to `[..., 4]`."""
    u = 1 - t
    return torch.stack(((1 + 2 * t) * u * u, t * u * u, t * t * (3 - 2 * t), -t * t * u), -1)


def hermite_slope(t: Tensor) -> Tensor:
    """Weights in `h f'`: `[...]` to `[..., 4]`."""
    rise = 6 * t * (1 - t)
    return torch.stack((-rise, (3 * t - 4) * t + 1, rise, (3 * t - 2) * t), -1)


def hermite_curvature(t: Tensor) -> Tensor:
    """Weights in `h² f''`: `[...]` to `[..., 4]`."""
    bend = 12 * t - 6
    return torch.stack((bend, 6 * t - 4, -bend, 6 * t - 2), -1)


def locate(z: Tensor, r_min: float, r_max: float, intervals: int) -> tuple[Tensor, Tensor]:
    """Finds the interval `g` (int64) and the fraction `t` in it; differentiable in `z`.

    Below `r_min` and beyond `r_max` the fraction stays at the end, so the function is constant
    there. A `z` that is not a number gives a valid interval and a fraction that is not a number.
    """
    u = ((z - r_min) * (intervals / (r_max - r_min))).clamp(0, intervals)
    g = u.detach().long().clamp(0, intervals - 1)
    return g, u - g


def knot_rows(g: Tensor, pair: Tensor | None, num_knots: int) -> Tensor:
    """Rows of `knots.flatten(0, 2)` that an interval reads: `[...]` to `[..., 4]`."""
    first = 2 * g if pair is None else 2 * (pair * num_knots + g)
    return first.unsqueeze(-1) + torch.arange(4, device=g.device)


def interpolate(
    knots: Tensor, z: Tensor, pair: Tensor | None, r_min: float, r_max: float
) -> Tensor:
    """Evaluates the spline of `knots [P, G+1, 2, C]` at `z [...]`: `[..., C]`.

    Differentiable to any order in `knots` and, as a piecewise cubic, in `z`.
    """
    num_knots = knots.shape[1]
    g, t = locate(z, r_min, r_max, num_knots - 1)
    rows = knots.flatten(0, 2)[knot_rows(g, pair, num_knots)]  # [..., 4, C]
    y0, s0, y1, s1 = rows.unbind(-2)
    # The weights of y_g and y_{g+1} sum to 1. Written so, no derivative is a difference of large
    # numbers, which would cost float32 a digit.
    _, ramp, rise, end = hermite(t).unsqueeze(-1).unbind(-2)
    return y0 + ramp * s0 + rise * (y1 - y0) + end * s1


def spline_slopes(values: Tensor) -> Tensor:
    """Computes the slopes, times the knots' distance, of the C² spline through `values [G+1, C]`.

        s_{g-1} + 4 s_g + s_{g+1} = 3 (y_{g+1} - y_{g-1}),   s_0 one-sided,   s_G = 0

    The inverse of the tridiagonal matrix is `ρ^|i-j| / (2 sqrt 3)` away from the ends, and
    mirroring the values at both ends gives it there too (the method of images). So the slopes are
    a convolution with 33 taps
    (float64: 65), done as products of one small matrix with overlapping blocks of
    rows; what the one-sided slope adds decays from the lower end as `ρ^g`.

    Linear in `values`, so differentiable to any order. Needs five values at least.
    """
    last, dtype, device = values.shape[0] - 1, values.dtype, values.device
    block = _BLOCK[dtype]
    blocks = -(-values.shape[0] // block)
    mirrored = torch.cat(
        (
            values[_mirror(torch.arange(-block, 0, device=device), last)],
            values,
            values[_mirror(torch.arange(last + 1, (blocks + 1) * block, device=device), last)],
        )
    )
    windows = mirrored.unfold(0, 3 * block, block).transpose(1, 2)  # [blocks, 3 block, C]
    constants = _spline_constants.__wrapped__ if is_traced() else _spline_constants
    taps, ramp = constants(last, dtype, device)
    slopes = (taps @ windows).flatten(0, 1)[: last + 1]
    near = len(ramp)
    return torch.cat((slopes[:near] + ramp @ values[:5], slopes[near:]))


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _spline_constants(
    last: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Taps `[block, 3 block]`, and what the first 5 values add to the first slopes `[near, 5]`."""
    block = _BLOCK[dtype]
    row = torch.arange(block, dtype=torch.float64, device=device)
    reach = torch.arange(3 * block, dtype=torch.float64, device=device) - block - row[:, None]
    taps = 3 * (_ROOT ** (reach - 1).abs() - _ROOT ** (reach + 1).abs()) / (2 * math.sqrt(3.0))
    near = row[: last + 1]
    decay = (_ROOT**near - _ROOT ** (2 * last - near)) / (1 - _ROOT ** (2 * last))
    end = torch.tensor(_END_SLOPE, dtype=torch.float64, device=device)
    return taps.to(dtype), (decay[:, None] * end).to(dtype)


def is_traced() -> bool:
    """Whether tensors may be shadows of others: under compilers, tracers and `vmap`."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _mirror(index: Tensor, last: int) -> Tensor:
    """Reflects indices into `0..last` at both ends, as often as it takes."""
    index = index % (2 * last)
    return torch.where(index > last, 2 * last - index, index)


def tabulate(
    fn: RadialFunction,
    r_max: float = 12.0,
    num_knots: int = 1024,
    *,
    r_min: float = 0.0,
    num_types: int | None = None,
    affine: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> RadialTable:
    """Tabulates a radial function at uniform knots: the C² cubic spline through its values.

        z_g = r_min + g h,  h = (r_max - r_min) / (num_knots - 1)

    Below `r_min` and beyond `r_max` the table is constant, and its slope at `r_max` is 0, so
    forces stay continuous where a distance passes `r_max`: choose it beyond the largest distance
    or where the function has died away. `table_error` says how good a table is.

    Differentiable, twice and more, to the parameters of `fn` and to `affine`. Autocast is off
    inside. `fn` runs in float32 up to 1024 knots and in float64 beyond (where float32 rounding
    would spoil the second derivative): a Module, or a pytree of tensors such as `GaussianSum`, is
    called with its parameters cast for the call; any other function must follow the dtype of
    its argument.

    One table for each pair of types costs memory and time in proportion: `C = 1024`, 15 pairs and
    1024 knots take 126 MB.

    Args:
        fn: Distances `[M]`, Å, to `[M, C]`: a Module or any function. With `num_types=T` and no
            `affine`, `fn(distances [M], types_i [M], types_j [M])`, symmetric in the types.
        r_max: Radial coordinate of the last knot, Å.
        num_knots: Number of knots, 5 at least.
        r_min: Radial coordinate of the first knot, Å.
        num_types: Number of atom types `T`: one table for each of `T(T+1)/2` pairs, numbered as
            `torch.triu_indices(T, T)`; with `affine` one table in all.
        affine: `[P, 2]`, `(m, c)` for each pair of types: `fn` is a function of `m d + c`.
        dtype: Of the table, float32 or float64; None takes that of the parameters of `fn`
            (float32 for 16-bit ones), else the default dtype.
        device: Of the table; None takes that of the parameters of `fn` or of `affine`, else the
            default device.

    Returns:
        A `RadialTable`; `knots [P, num_knots, 2, C]`.

    Raises:
        ValueError: A range, a number or a shape is wrong, or `fn` cannot be evaluated in float64.

    Source: spline interpolation of pair functions, as DeePMD-kit does it for its networks
    (Lu et al., J. Chem. Theory Comput. 2022); the end conditions are this library's own.
    """
    _check_range(r_min, r_max, num_knots)
    parameters = _tensors(fn)
    if dtype is None:
        dtype = _table_dtype(parameters)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    if device is None:
        owner = parameters[0] if parameters else affine
        device = owner.device if owner is not None else torch.get_default_device()
    device = torch.device(device)
    compute = torch.float64 if num_knots > _FLOAT32_KNOTS else dtype
    pair_index = None if num_types is None else number_pairs(num_types, device)
    pairs = 1 if num_types is None else num_types * (num_types + 1) // 2
    if affine is not None and affine.shape != (pairs, 2):
        raise ValueError(f"affine: expected [P={pairs}, 2], got {list(affine.shape)}")

    knots = torch.linspace(r_min, r_max, num_knots, dtype=compute, device=device)
    arguments: tuple[Tensor, ...] = (knots,)
    tables = 1
    if num_types is not None and affine is None:
        tables = pairs
        types = torch.triu_indices(num_types, num_types, device=device)
        types_i, types_j = types.repeat_interleave(num_knots, dim=1).unbind(0)
        arguments = (knots.repeat(pairs), types_i, types_j)
    with autocast_off(device.type):
        values = _evaluate(fn, arguments)  # [tables * num_knots, C]
        values = values.view(tables, num_knots, -1).transpose(0, 1).reshape(num_knots, -1)
        slopes = spline_slopes(values)
        both = torch.stack((values, slopes), dim=1).to(dtype)  # [num_knots, 2, tables * C]
    both = both.view(num_knots, 2, tables, -1).permute(2, 0, 1, 3).contiguous()
    if affine is not None:
        affine = affine.to(device=device, dtype=dtype)
    return RadialTable(both, float(r_min), float(r_max), pair_index, affine)


def autocast_off(device: str) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast, also for the device "meta", which has none."""
    if device == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def _check_range(r_min: float, r_max: float, num_knots: int) -> None:
    if not r_max > 0:
        raise ValueError(f"r_max: expected a number > 0, got {r_max}")
    if not r_max > r_min:
        raise ValueError(f"r_min: expected a number < r_max={r_max}, got {r_min}")
    if not (math.isfinite(r_max) and math.isfinite(r_min)):
        raise ValueError(f"r_min, r_max: expected finite numbers, got {r_min}, {r_max}")
    if num_knots < MIN_KNOTS:
        raise ValueError(f"num_knots: expected at least {MIN_KNOTS}, got {num_knots}")


def number_pairs(num_types: int, device: torch.device) -> Tensor:
    """Numbers the pairs of types, symmetric, as `torch.triu_indices` does: int64 `[T, T]`."""
    if num_types < 1:
        raise ValueError(f"num_types: expected at least 1, got {num_types}")
    low = torch.arange(num_types, device=device)[:, None]
    first, second = torch.minimum(low, low.T), torch.maximum(low, low.T)
    return first * num_types - first * (first - 1) // 2 + second - first


def _tensors(fn: RadialFunction) -> list[Tensor]:
    """The floating-point tensors that belong to `fn`."""
    if isinstance(fn, nn.Module):
        owned: list[Any] = [*fn.parameters(), *fn.buffers()]
    else:
        owned = pytree.tree_leaves(fn)
    return [x for x in owned if isinstance(x, Tensor) and x.is_floating_point()]


def _table_dtype(parameters: list[Tensor]) -> torch.dtype:
    if not parameters:
        return torch.get_default_dtype()
    double = any(p.dtype == torch.float64 for p in parameters)
    return torch.float64 if double else torch.float32


def _evaluate(fn: RadialFunction, arguments: tuple[Tensor, ...]) -> Tensor:
    """Calls `fn` with its parameters in the dtype of the distances."""
    dist = arguments[0]

    def cast(x: Any) -> Any:
        return x.to(dist.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    try:
        if all(p.dtype == dist.dtype for p in _tensors(fn)):
            values = fn(*arguments)
        elif isinstance(fn, nn.Module):
            state = {name: cast(x) for name, x in fn.named_parameters()}
            state |= {name: cast(x) for name, x in fn.named_buffers()}
            values = torch.func.functional_call(fn, state, arguments)
        else:
            values = pytree.tree_map(cast, fn)(*arguments)
    except RuntimeError as error:
        if dist.dtype == torch.float64 and not isinstance(fn, nn.Module):
            raise ValueError(
                "fn: could not be evaluated in float64, which more than "
                f"{_FLOAT32_KNOTS} knots need: pass a Module, or a function that follows the "
                f"dtype of its argument ({error})"
            ) from error
        raise
    if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != len(dist):
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"fn: expected [M={len(dist)}, C] from distances [M], got {got}")
    return values.to(dist.dtype)


@dataclass(frozen=True)
class TableError:
    """Largest errors of a table between its knots, and what would be enough knots.

    Attributes:
        value: Largest `|f_table - f|`, in the unit of the function.
        slope: Largest `|f'_table - f'|`, per Å.
        curvature: Largest `|f''_table - f''|`, per Å².
        max_value: Largest `|f|`.
        max_slope: Largest `|f'|`.
        max_curvature: Largest `|f''|`.
        end_slope: `|f'|` at `r_max`, which the table replaces by 0: the function is cut there.
        num_knots: The smallest power of two (at least 64) whose slopes, extrapolated with the
            third power of the knots' distance, are good to the tolerance.
    """

    value: float
    slope: float
    curvature: float
    max_value: float
    max_slope: float
    max_curvature: float
    end_slope: float
    num_knots: int

    def __str__(self) -> str:
        pairs = (
            ("f", self.value, self.max_value),
            ("f'", self.slope, self.max_slope),
            ("f''", self.curvature, self.max_curvature),
        )
        parts = [f"{name} {error:.1e} of {most:.1e}" for name, error, most in pairs]
        return f"{', '.join(parts)}; {self.end_slope:.1e} cut at r_max; try {self.num_knots} knots"


_SAMPLES = 8  # points an interval
_END_INTERVALS = 16  # the last ones feel the slope 0 at r_max; it decays as ρ a knot
_SLICE = 512  # intervals evaluated at once


def table_error(fn: RadialFunction, table: RadialTable, tolerance: float = 1e-4) -> TableError:
    """Measures a table against its function between the knots, rounding included.

    `fn` and its first and second derivative are evaluated in float64 at eight points of each
    interval; the last 16 intervals, which feel that the slope at `r_max` is 0, are left out
    (`end_slope` says what is cut there). Not differentiable.

    Args:
        fn: What was given to `tabulate`.
        table: What `tabulate` made of it.
        tolerance: Wanted error of the slopes (so of the forces), relative to the largest slope.

    Returns:
        A `TableError`.

    Raises:
        ValueError: `fn` does not give the table's number of channels.
    """
    intervals = table.num_knots - 1
    h = (table.r_max - table.r_min) / intervals
    inner = max(intervals - _END_INTERVALS, 1)
    errors, largest = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    end_slope = 0.0
    typed = table.pair_index is not None and table.affine is None
    for pair in range(table.knots.shape[0]):
        types = _types_of(pair, table) if typed else ()
        knots = table.knots[pair : pair + 1].detach().double()
        tabulated = RadialTable(knots, table.r_min, table.r_max)
        for start in range(0, inner, _SLICE):
            steps = torch.arange(start, min(start + _SLICE, inner), device=knots.device)
            t = torch.arange(_SAMPLES, device=knots.device) / _SAMPLES
            z = table.r_min + h * (steps[:, None] + t.double()).flatten()
            exact = _derivatives(fn, z, types)
            spline = _derivatives(tabulated, z, ())
            if exact[0].shape != spline[0].shape:
                raise ValueError(
                    f"fn: expected {table.num_channels} channels, got {exact[0].shape[-1]}"
                )
            for order in range(3):
                error = float((spline[order] - exact[order]).abs().max())
                errors[order] = max(errors[order], error)
                largest[order] = max(largest[order], float(exact[order].abs().max()))
        end = torch.full((1,), table.r_max, dtype=torch.float64, device=knots.device)
        end_slope = max(end_slope, float(_derivatives(fn, end, types)[1].abs().max()))
    allowed = tolerance * largest[1]
    excess = errors[1] / allowed if allowed > 0 else 0.0
    wanted = max(table.num_knots * excess ** (1 / 3), 64.0)
    enough: int = 2 ** math.ceil(math.log2(wanted) - 1e-9)
    return TableError(
        value=errors[0],
        slope=errors[1],
        curvature=errors[2],
        max_value=largest[0],
        max_slope=largest[1],
        max_curvature=largest[2],
        end_slope=end_slope,
        num_knots=enough,
    )


def _types_of(pair: int, table: RadialTable) -> tuple[int, int]:
    assert table.pair_index is not None
    i, j = (table.pair_index == pair).nonzero()[0].tolist()
    return i, j


def _derivatives(
    fn: RadialFunction, z: Tensor, types: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluates `f`, `f'` and `f''` at `z [M]`, `[M, C]` each, in the dtype of `z`.

    A derivative for each channel from reverse mode alone: the gradient of `Σ w_mc f_c(z_m)` in
    `z` is linear in `w`, and its gradient in `w` is `f'`.
    """

    def derivative(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def df(z: Tensor) -> Tensor:
            values = f(z) + 0 * z.unsqueeze(-1)  # a constant function has a derivative too
            w = torch.ones_like(values, requires_grad=True)
            (slope,) = torch.autograd.grad(values, z, w, create_graph=True)
            return torch.autograd.grad(slope.sum(), w, create_graph=True)[0]

        return df

    ids = tuple(torch.full(z.shape, t, dtype=torch.int64, device=z.device) for t in types)

    def value(z: Tensor) -> Tensor:
        return _evaluate(fn, (z, *ids))

    slope = derivative(value)
    with torch.enable_grad(), autocast_off(z.device.type):
        z = z.detach().requires_grad_()
        return value(z).detach(), slope(z).detach(), derivative(slope)(z).detach()
