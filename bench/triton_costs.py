"""The Triton kernels as cases of `static_cost`: launched for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.sass import L1_LOOKUP_QM9, SHARED_LOOKUP, Mark
from geot_kernels.backends import load
from geot_kernels.backends.inputs import Inputs, Tangent
from geot_kernels.backends.triton import radial
from geot_kernels.backends.triton.tiles import (
    Tiles,
    backward_tiles,
    forward_tiles,
    second_backward_tiles,
)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GATHERS = (Mark(radial.look_up, L1_LOOKUP_QM9),)
WORD_GATHERS = (Mark(radial.linear, SHARED_LOOKUP, "LDS"),)


def inputs(atoms: int, dtype: torch.dtype, heads: int = 8, dim: int = 32) -> Inputs:
    """A bias with softmax, a table of 1024 knots, no mask; enough pairs for a table's rows."""
    batch = max((1 << 18) // (atoms * atoms * heads) + 1, 2)
    q = torch.zeros(batch, atoms, heads, dim, dtype=dtype)
    knots = torch.zeros(1, 1024, 2, heads)
    geometry = (torch.zeros(batch, atoms, 3), knots, None, None, None, None, None, -1)
    return Inputs(q, q, q, *geometry, 0.0, 12.0, dim**-0.5, "bias", "softmax")


def forward(x: Inputs, forward_only: bool) -> Callable[[], object]:
    """Launches the forward pass."""
    return lambda: load("triton").attention(x, forward_only)


def backward(x: Inputs) -> Callable[[], object]:
    """Launches the backward pass for all gradients but the table's."""
    row = torch.zeros(x.q.shape[:-1])
    needs = [True] * 4 + [False] * 2
    return lambda: load("triton").attention_bwd(x, x.q, None, x.q, row, needs)


def second_backward(x: Inputs) -> Callable[[], object]:
    """Launches the second backward pass of a force step, for all but the table's gradient."""
    row = torch.zeros(x.q.shape[:-1])
    needs = [True, False] + [True] * 4 + [False] * 2
    tangent = Tangent(None, None, None, x.positions, None, None)
    return lambda: load("triton").attention_bwd_bwd(x, tangent, x.q, None, x.q, row, needs)


def backward_round(tiles: Tiles, atoms: int) -> int | tuple[int, int]:
    """Pairs of a round of the loop over tiles, and of that over heads around it."""
    if tiles.kept:
        return tiles.block_j * tiles.block_i * tiles.kept
    return tiles.block_j * tiles.block_i, tiles.block_j * atoms


def bias_cases(atoms: int, numbers: str) -> list[tuple]:
    """`(name, launch, pairs, kernel, plain pass, marks)` of one size and dtype."""
    dtype = DTYPES[numbers]
    x = inputs(atoms, dtype)
    title = f"{numbers} D=32 N={atoms}"
    tiles = forward_tiles(atoms, 32, False, dtype.itemsize)
    pairs: int | tuple[int, int] = tiles.block_i * tiles.block_j
    if not tiles.is_whole:
        pairs = tiles.block_i * tiles.block_j, tiles.block_i * atoms
    takes_words = numbers == "bf16" and atoms > 32
    if not takes_words or atoms > 128:
        cases = [(f"forward {title}", forward(x, False), pairs, "fwd", "forward", GATHERS)]
    else:  # gradients or not: the backward pass finds the sums of P again
        cases = [(f"forward {title}", forward(x, False), pairs, "fwd", "forward", WORD_GATHERS)]
    if takes_words and atoms > 128:
        words = f"forward only {title}"
        cases.append((words, forward(x, True), pairs, "fwd", "forward", WORD_GATHERS))
    if atoms <= 128:
        tiles = backward_tiles(atoms, 32, False, dtype.itemsize)
        pairs = backward_round(tiles, atoms)
        cases.append((f"backward {title}", backward(x), pairs, "bwd", "backward", GATHERS))
        tiles = second_backward_tiles(atoms, 32, False)
        pairs = backward_round(tiles, atoms)
        if tiles.is_whole:
            launch = second_backward(x)
            cases.append((f"second backward {title}", launch, pairs, "bwd_bwd", "", GATHERS))
    return cases
