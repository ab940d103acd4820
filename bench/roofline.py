"""The least time a pass can take on a machine: its least traffic, its operations, and the limits.

    limit = max(least traffic / speed of a copy, operations / speed of a matrix product)

The limits are measured (`machine`), not taken from a data sheet. Traffic and operations are those
of a fused algorithm in the formulation of MATH.md, counted in `COUNTS`: a lower bound. Each tensor
is read or written once, nothing of size N² is kept, a multiply-add is two operations, exponential
and square root are one each. Exponentials, lookups in the table and sums into it are no matrix
products, so a kernel that they bind cannot come near the limit. What is not counted: padding,
launches, tabulating, and reading a tensor again because the caches are smaller than it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import rows, timing

MACHINE_COLUMNS = (
    *("measure", "dtype", "value", "unit", "lower_quartile", "upper_quartile"),
    "other_cores",
    *("device", "threads", "machine", "processor", "python", "torch", "triton", "cuda"),
    *("geot_kernels", "commit"),
)
MACHINE_KEY = ("measure", "dtype", "device", "threads")
ROUNDS = 9
COPIED = {"cuda": (1_000_000_000, 256_000_000), "cpu": (256_000_000, 64_000_000)}  # bytes, quick
MATRIX = {"cuda": (8192, 4096), "cpu": (2048, 1024)}


# What a pass asks for.


@dataclass(frozen=True)
class Count:
    """Operations and tensors of one part of a pass.

    Attributes:
        feature: Operations for each ordered pair, head and channel of it.
        head: For each ordered pair and head.
        radial: For each unordered pair and radial channel (`C`: H, or H*D for a filter).
        geometry: For each unordered pair.
        features: Tensors of the size of q that are read or written.
        row: Numbers for each atom and head.
        positions: Tensors of the size of positions.
        tables: Tables.
    """

    feature: int = 0
    head: int = 0
    radial: int = 0
    geometry: int = 0
    features: int = 0
    row: int = 0
    positions: int = 0
    tables: int = 0


COUNTS = {
    "bias": {
        # q·k 2, P·v 2; softmax: maximum, difference, exp, sum, scale 5; f 8; d, its interval and
        # weights 10. Reads q, k, v, x, f; writes O, L.
        "forward": Count(4, 5, 8, 10, features=4, row=1, positions=1, tables=1),
        # q·k again 2, dO·v 2, dv 2, dq 2, dk 2; P again 2, E 2, both directions added 1.
        # Reads q, k, v, O, dO, L, x, f; writes dq, dk, dv.
        "backward": Count(10, 5, 8, 10, features=8, row=1, positions=1, tables=1),
        # f' 8, b 2; (b_ij + b_ji) u_ij, added to both atoms 10. Writes dx.
        "positions": Count(radial=10, geometry=10, positions=1),
        # The weights of a lookup, times g, into four numbers 8. Writes df.
        "table": Count(radial=8, tables=1),
        # Only ẋ is there, and no gradient of x or dO is asked for. Sweep 1, for ρ and ε: q·k 2,
        # dO·v 2; P 2, Ṡ 1, sums 5. Sweep 2: both products 4, dq 2, dk 2, dv 2; P 2, Ṡ 1, G 4, E 2,
        # S̄ 2, Ṗ 2. In each f 8, f' 8; d 10, ẋ·u 8. Sums: f 8, f' 9, both directions 2.
        # Reads q, k, v, O, dO, L, x, ẋ, f; writes dq, dk, dv, df.
        "second": Count(14, 21, 51, 36, features=8, row=1, positions=2, tables=2),
    },
    "filter": {
        # Σ q f k 3, P·v 2; f 8; distance and weights 10. Reads q, k, v, x, f; writes O.
        "forward": Count(5, 0, 8, 10, features=4, positions=1, tables=1),
        # k f 1, q·(k f) 2, dO·v 2, dv 2, dq 2, E q 1, dk 2, g 1, both directions added 1.
        # Reads q, k, v, dO, x, f; writes dq, dk, dv.
        "backward": Count(14, 0, 8, 10, features=7, positions=1, tables=1),
        "positions": Count(radial=10, geometry=10, positions=1),
        "table": Count(radial=8, tables=1),
        # Only ẋ: S̄ = 0, E = A. k f̃ 1, q·(k f̃) 2, dO·v 2, dv 2, dq 2, E q 1, dk 2, g̃ 1, both
        # directions added 1; f' 8, f̃ 1, sum 9; d 10, ẋ·u 8. Reads ẋ too, writes also df.
        "second": Count(14, 0, 18, 18, features=7, positions=2, tables=2),
    },
}
"""Parts of a pass, for each score with its normalizer: bias and softmax, filter and linear.

Formulas: MATH.md 1 (forward), 2 (backward, positions, table), 3 (second), 4 (8 operations for f,
f' or their adjoint). Recomputing S in a backward pass, 5 products where the forward pass has 2:
Dao, FlashAttention-2, arXiv:2307.08691, section 3.1. What depends on a distance alone is counted
once for both directions of a pair, as MATH.md 6 says of the filter.
"""

PARTS = {
    "forward": ("forward",),
    "backward": ("forward", "backward", "positions"),
    "backward+table": ("forward", "backward", "positions", "table"),
    "training": ("forward", "backward", "table"),
    "force_step": ("forward", "backward", "positions", "table", "second"),
}
"""A force step's two first backward passes, of E and of E², have the same E_ij but for a factor
known after the forward pass: one is enough."""


@dataclass(frozen=True)
class Cost:
    """What a pass must at least move, in bytes, and compute."""

    least_traffic_bytes: int
    operations: int


def cost(
    pass_name: str,
    *,
    pairs: int,
    atoms: int,
    heads: int,
    head_dim: int,
    score: str,
    table_bytes: int,
    dtype: torch.dtype,
) -> Cost:
    """What a pass must at least move and compute.

    Args:
        pass_name: Of `bench.ways.PASSES`.
        pairs: `Σ n_b²`, real atoms.
        atoms: `Σ n_b`.
        heads: `H`.
        head_dim: `D`.
        score: "bias", with softmax, or "filter", with the linear normalizer.
        table_bytes: Of the table, and of its gradient.
        dtype: Of features; positions and row statistics are float32 or wider.
    """
    parts = [COUNTS[score][name] for name in PARTS[pass_name]]
    channels = heads if score == "bias" else heads * head_dim
    wide = torch.promote_types(dtype, torch.float32).itemsize
    traffic = sum(
        part.features * atoms * heads * head_dim * dtype.itemsize
        + part.row * atoms * heads * wide
        + part.positions * atoms * 3 * wide
        + part.tables * table_bytes
        for part in parts
    )
    twice = sum(
        pairs * heads * 2 * (part.feature * head_dim + part.head)
        + pairs * (part.radial * channels + part.geometry)
        for part in parts
    )
    return Cost(traffic, twice // 2)


# What a machine gives.


def machine(
    device: str, quick: bool = False, dtypes: Sequence[str] = ("float32", "bfloat16")
) -> list[dict[str, str]]:
    """Measures a copy between arrays larger than the caches, and matrix products.

    Bytes read and written both count. On a GPU "float32" is IEEE and "tf32" stands beside it.

    Args:
        device: "cuda" or "cpu".
        quick: Smaller arrays.
        dtypes: Of the products.
    """
    if device == "cuda":
        dtypes = (*dtypes, "tf32")
    nbytes, size = COPIED[device][quick], MATRIX[device][quick]
    columns = ("copy", "float32", "GB/s")
    found = [_rate(device, _copy(device, nbytes // 4), 2 * nbytes / 1e9, columns)]
    for dtype in dtypes:
        columns = ("matrix product", dtype, "TFLOP/s")
        found.append(_rate(device, _product(device, size, dtype), 2 * size**3 / 1e12, columns))
    where = rows.where(device)
    return [{**where, **row} for row in found]


def _rate(
    device: str, call: Callable[[], Any], amount: float, columns: tuple[str, str, str]
) -> dict[str, str]:
    """How much of something a second, of calls that do an amount of it each."""
    others = timing.watch()
    times = timing.interleaved({"": call}, ROUNDS, measure=timing.stopwatch(device))[""]
    busy = others()
    found = rows.quartiles([amount / us * 1e6 for us in times])
    names = ("lower_quartile", "value", "upper_quartile")
    values = {name: f"{value:.4g}" for name, value in zip(names, found, strict=True)}
    values["other_cores"] = busy
    return {**dict(zip(("measure", "dtype", "unit"), columns, strict=True)), **values}


def _copy(device: str, numbers: int) -> Callable[[], Tensor]:
    source = torch.ones(numbers, device=device)
    to = torch.zeros_like(source)
    return lambda: to.copy_(source)


def _product(device: str, size: int, dtype: str) -> Callable[[], Tensor]:
    narrow = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    a, b = (torch.randn(size, size, device=device).to(narrow) for _ in range(2))
    out = torch.empty_like(a)
    if device != "cuda":
        return lambda: torch.mm(a, b, out=out)

    def product() -> Tensor:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
        try:
            return torch.mm(a, b, out=out)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    return product
