"""Checks of arguments, and the operators' inputs made of them.

`make_inputs` reads shapes, dtypes and devices only, so tracing, CUDA graphs and asynchronous
launches survive it. `check_values` reads values and waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .backends.inputs import Inputs
from .radial import GaussianSum
from .reference import compute_dtype
from .table import RadialTable

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_metadata(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    radial: Callable[..., Tensor],
    *,
    mask: Tensor | None,
    ptr: Tensor | None,
    max_atoms: int | None,
    atom_types: Tensor | None,
    score: str,
    normalizer: str,
    scale: float | None,
    attention_scale: Tensor | None,
) -> None:
    """Checks shapes, dtypes, devices and combinations of the arguments of `geo_attention`.

    Raises:
        TypeError: An argument is no tensor, or of the wrong dtype.
        ValueError: A shape, a device, a name or a combination is wrong.
    """
    layout = "[B, N, H, D]" if ptr is None else "[T, H, D]"
    _expect_tensor("q", q, layout)
    if q.ndim != (4 if ptr is None else 3):
        raise ValueError(f"q: expected {layout}, got {list(q.shape)}")
    if q.dtype not in _FLOATS:
        raise TypeError(f"q: expected float32, float64, bfloat16 or float16, got {q.dtype}")
    sizes = list(zip(layout[1:-1].split(", "), q.shape, strict=True))
    _expect("k", k, sizes, q.device, q.dtype)
    _expect("v", v, sizes, q.device, q.dtype)
    *atoms, (_, heads), (_, channels) = sizes
    if heads < 1 or channels < 1:
        raise ValueError(f"q: expected H >= 1 and D >= 1, got {list(q.shape)}")
    _expect("positions", positions, [*atoms, ("", 3)], q.device)
    if positions.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"positions: expected float32 or float64 (16 bits cannot hold a geometry), "
            f"got {positions.dtype}"
        )
    if ptr is None:
        if max_atoms is not None:
            raise ValueError(f"max_atoms: expected None without ptr, got {max_atoms}")
        if mask is not None:
            _expect("mask", mask, atoms, q.device, torch.bool, "True = real atom")
    else:
        _check_packed(ptr, max_atoms, mask, q.device)
    check_policies(score, normalizer)
    if atom_types is not None:
        _expect("atom_types", atom_types, atoms, q.device)
        if atom_types.dtype not in _INTS:
            raise TypeError(f"atom_types: expected integers, got {atom_types.dtype}")
    expected = heads if score == "bias" else heads * channels
    meaning = f"C={expected} channels ({'H' if score == 'bias' else 'H*D'}) for score {score!r}"
    if isinstance(radial, RadialTable):
        _check_table(radial, expected, meaning, atom_types, q.device)
    elif isinstance(radial, GaussianSum):
        _check_gaussians(radial, expected, meaning, score, q.device)
    if scale is not None and not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"scale: expected a number, got {type(scale).__name__}")
    if attention_scale is not None:
        _check_attention_scale(attention_scale, heads, q.device)


def check_policies(score: str, normalizer: str) -> None:
    """Raises a ValueError where there is no score or normalizer of that name."""
    if score not in ("bias", "filter"):
        raise ValueError(f"score: expected 'bias' or 'filter', got {score!r}")
    if normalizer not in ("softmax", "linear"):
        raise ValueError(f"normalizer: expected 'softmax' or 'linear', got {normalizer!r}")


def _expect(
    name: str,
    x: Any,
    sizes: Sequence[tuple[str, int]],
    device: torch.device,
    dtype: torch.dtype | None = None,
    meaning: str = "",
) -> None:
    """Checks one tensor; `sizes` are its sizes with their names."""
    if isinstance(x, Tensor) and (dtype is None or x.dtype == dtype):
        if tuple(x.shape) != tuple(size for _, size in sizes):
            raise ValueError(f"{name}: expected {_written(sizes)}, got {list(x.shape)}")
        if x.device != device:
            raise ValueError(f"{name}: expected on {device} like q, got on {x.device}")
        return
    kind = "a tensor" if dtype is None else str(dtype).removeprefix("torch.")
    got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
    shape = f"{_written(sizes)}{', ' if meaning else ''}{meaning}"
    raise TypeError(f"{name}: expected {kind} {shape}, got {got}")


def _expect_tensor(name: str, x: Any, layout: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}, got {type(x).__name__}")


def _written(sizes: Sequence[tuple[str, int]]) -> str:
    parts = [f"{name}={size}" if name else str(size) for name, size in sizes]
    return f"[{', '.join(parts)}]"


def _check_packed(ptr: Any, max_atoms: Any, mask: Any, device: torch.device) -> None:
    if not isinstance(ptr, Tensor):
        raise TypeError(f"ptr: expected an int tensor [B+1], got {type(ptr).__name__}")
    if ptr.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ptr: expected int64 or int32, got {ptr.dtype}")
    if ptr.ndim != 1 or ptr.shape[0] < 1:
        raise ValueError(f"ptr: expected [B+1], got {list(ptr.shape)}")
    if ptr.device != device:
        raise ValueError(f"ptr: expected on {device} like q, got on {ptr.device}")
    if mask is not None:
        raise ValueError("mask: expected None with ptr (packed rows are all real), got a mask")
    if max_atoms is None:
        return
    integer = isinstance(max_atoms, (Integral, torch.SymInt)) and not isinstance(max_atoms, bool)
    if not integer or max_atoms < 0:
        raise ValueError(f"max_atoms: expected an int >= 0, got {max_atoms!r}")


def _check_table(
    table: RadialTable, channels: int, meaning: str, atom_types: Any, device: torch.device
) -> None:
    knots, index = table.knots, table.pair_index
    _expect_tensor("radial.knots", knots, "[P, G+1, 2, C]")
    if knots.ndim != 4 or knots.shape[2] != 2 or knots.shape[1] < 2:
        raise ValueError(f"radial.knots: expected [P, G+1, 2, C], got {list(knots.shape)}")
    if knots.shape[3] != channels:
        raise ValueError(f"radial: expected {meaning}, got {knots.shape[3]}")
    if knots.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"radial.knots: expected float32 or float64, got {knots.dtype}")
    if knots.device != device:
        raise ValueError(f"radial: expected on {device} like q, got on {knots.device}")
    if not 0 < table.r_max < float("inf"):
        raise ValueError(f"radial.r_max: expected a number > 0, got {table.r_max}")
    if not float("-inf") < table.r_min < table.r_max:
        raise ValueError(f"radial.r_min: expected < r_max={table.r_max}, got {table.r_min}")
    pairs = 1
    if index is not None:
        _expect_tensor("radial.pair_index", index, "[T, T]")
        if index.ndim != 2:
            raise ValueError(f"radial.pair_index: expected [T, T], got {list(index.shape)}")
        types = index.shape[0]
        pairs = types * (types + 1) // 2
        _expect("radial.pair_index", index, [("T", types), ("T", types)], device)
        if index.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"radial.pair_index: expected int64 or int32, got {index.dtype}")
        if atom_types is None:
            raise ValueError(
                "atom_types: expected integers for each atom, since radial has a pair_index, "
                "got None"
            )
    if knots.shape[0] not in (1, pairs):
        expected = "P=1 without a pair_index" if index is None else f"P=1 or P={pairs}"
        raise ValueError(f"radial.knots: expected {expected}, got P={knots.shape[0]}")
    if table.affine is not None:
        _expect("radial.affine", table.affine, [("P", pairs), ("", 2)], device)


def _check_gaussians(
    radial: GaussianSum, channels: int, meaning: str, score: str, device: torch.device
) -> None:
    if score != "bias":
        raise ValueError(
            f"radial: expected a RadialTable for score {score!r}, got a GaussianSum, which is for "
            "score 'bias': tabulate(gaussians) makes one"
        )
    _expect_tensor("radial.centers", radial.centers, "[K]")
    _expect_tensor("radial.weights", radial.weights, "[C, K]")
    if radial.centers.ndim != 1:
        raise ValueError(f"radial.centers: expected [K], got {list(radial.centers.shape)}")
    count = radial.centers.shape[0]
    _expect("radial.centers", radial.centers, [("K", count)], device)
    _expect("radial.gammas", radial.gammas, [("K", count)], device)
    if radial.weights.ndim != 2 or radial.weights.shape[0] != channels:
        raise ValueError(f"radial: expected {meaning}, got weights {list(radial.weights.shape)}")
    _expect("radial.weights", radial.weights, [("C", channels), ("K", count)], device)


def _check_attention_scale(s: Any, heads: int, device: torch.device) -> None:
    if not isinstance(s, Tensor):
        raise TypeError(f"attention_scale: expected a tensor, [] or [H], got {type(s).__name__}")
    if s.shape not in ((), (1,), (heads,)):
        raise ValueError(f"attention_scale: expected [] or [H={heads}], got {list(s.shape)}")
    if not s.is_floating_point():
        raise TypeError(f"attention_scale: expected floating point, got {s.dtype}")
    if s.device != device:
        raise ValueError(f"attention_scale: expected on {device} like q, got on {s.device}")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Rounds queries, keys and values as `scaled_dot_product_attention` does under autocast."""
    device, dtype = tensors[0].device.type, tensors[0].dtype
    if device == "meta" or dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def make_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    radial: RadialTable | GaussianSum,
    *,
    mask: Tensor | None,
    ptr: Tensor | None,
    max_atoms: int | None,
    atom_types: Tensor | None,
    score: str,
    normalizer: str,
    scale: float | None,
) -> Inputs:
    """Brings checked arguments into the form of the operators; differentiable."""
    compute = compute_dtype(q.dtype)
    affine, pair_index, r_min, r_max = None, None, 0.0, 0.0
    if isinstance(radial, RadialTable):
        parameters, pair_index = radial.knots, radial.pair_index
        affine, r_min, r_max = radial.affine, radial.r_min, radial.r_max
    else:
        centers, gammas, weights = (
            x.to(compute) for x in (radial.centers, radial.gammas, radial.weights)
        )
        parameters = torch.cat((centers[None], gammas[None], weights))
    return Inputs(
        q,
        k,
        v,
        positions.to(compute),
        parameters.to(compute),
        None if affine is None else affine.to(compute),
        mask,
        ptr,
        None if pair_index is None else atom_types,
        pair_index,
        -1 if max_atoms is None else max_atoms,
        r_min,
        r_max,
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        score,
        normalizer,
    )


def check_values(inputs: Inputs) -> None:
    """Checks what only values can tell; waits for the device.

    Raises:
        ValueError: `ptr` does not rise from 0 to the number of rows, a molecule is larger than
            `max_atoms`, a type is out of range, or a real atom's position is not finite.
    """
    positions, ptr, types = inputs.positions, inputs.ptr, inputs.atom_types
    if ptr is not None:
        _check_ptr(ptr, len(positions), inputs.max_atoms)
    real = positions if inputs.mask is None else positions[inputs.mask]
    if not bool(real.isfinite().all()):
        bad = ~positions.isfinite().all(-1)
        if inputs.mask is not None:
            bad &= inputs.mask
        first = bad.nonzero()[0].tolist()
        raise ValueError(
            "positions: expected finite numbers for real atoms, got "
            f"{positions[tuple(first)].tolist()} at {first}"
        )
    if types is not None and inputs.pair_index is not None:
        real_types = types if inputs.mask is None else types[inputs.mask]
        count = inputs.pair_index.shape[0]
        wrong = real_types[(real_types < 0) | (real_types >= count)]
        if len(wrong):
            raise ValueError(f"atom_types: expected 0..{count - 1}, got {int(wrong[0])}")
        pairs = max(len(inputs.radial), 1 if inputs.affine is None else len(inputs.affine))
        index = inputs.pair_index
        if not bool(((index >= 0) & (index < pairs)).all()) or not bool((index == index.T).all()):
            raise ValueError(
                f"radial.pair_index: expected symmetric, 0..{pairs - 1}, got {index.tolist()}"
            )


def _check_ptr(ptr: Tensor, rows: int, max_atoms: int) -> None:
    steps = ptr.diff()
    if int(ptr[0]) != 0 or int(ptr[-1]) != rows or bool((steps < 0).any()):
        falls = (steps < 0).nonzero().flatten().tolist()
        where = f", falling to {int(ptr[falls[0] + 1])} at {falls[0] + 1}" if falls else ""
        got = ptr.tolist() if len(ptr) <= 8 else f"{int(ptr[0])}, ..., {int(ptr[-1])}"
        raise ValueError(f"ptr: expected to rise from 0 to T={rows}, got {got}{where}")
    largest = int(steps.max()) if len(steps) else 0
    if 0 <= max_atoms < largest:
        raise ValueError(f"max_atoms: expected at least {largest}, the largest, got {max_atoms}")
