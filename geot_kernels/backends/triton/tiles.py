"""Which tiles a pass uses: the only place where sizes are chosen.

Chosen from the static costs (docs/triton.md) so that nothing spills on sm_90 and shared memory
suffices on sm_80; nothing is tuned at run time.
"""

from __future__ import annotations

from typing import NamedTuple

_FILTER_ELEMENTS = 2048  # of a tile [I, J, D]: 16 numbers a thread of 4 warps


class Tiles(NamedTuple):
    """Sizes of a pass: `I` query atoms by `J` key atoms, warps, and whether `J` takes all keys."""

    block_i: int
    block_j: int
    num_warps: int
    is_whole: bool
    keeps: bool = False

    @property
    def kept(self) -> int:
        """Tiles of a molecule whose distances a program of the backward pass keeps, or 0."""
        return -(-self.block_j // self.block_i) if self.is_whole and self.keeps else 0

    @property
    def is_one_tile(self) -> bool:
        """Whether a tile takes a molecule's pairs."""
        return self.is_whole and self.block_i == self.block_j


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def forward_tiles(atoms: int, block_d: int, is_filter: bool) -> Tiles:
    """Tiles for molecules of at most `atoms` atoms."""
    keys = max(power_of_two(atoms), 16)
    if is_filter:
        return filter_tiles(keys, block_d)
    if keys <= 16:
        return Tiles(16, 16, 1, True)
    if keys <= 32:
        return Tiles(32, 32, 2, True)
    if keys <= 64:
        return Tiles(32, 64, 2, True)
    if keys <= 128:
        return Tiles(32, 128, 4, True)
    return Tiles(64, 64, 4, False)


def backward_tiles(atoms: int, block_d: int, is_filter: bool) -> Tiles:
    """Tiles for molecules of at most `atoms` atoms."""
    keys = max(power_of_two(atoms), 16)
    if is_filter:
        return filter_tiles(keys, block_d)
    if keys <= 16:
        return Tiles(16, 16, 1, True, True)
    if keys <= 32:
        return Tiles(32, 32, 4, True, True)
    if keys <= 64:
        return Tiles(32, 64, 4, True, True)
    if keys <= 128:
        return Tiles(32, 128, 8, True, True)
    return Tiles(64, 64, 4, False)


def second_backward_tiles(atoms: int, block_d: int, is_filter: bool) -> Tiles:
    """Tiles for molecules of at most `atoms` atoms."""
    keys = max(power_of_two(atoms), 16)
    if is_filter:
        return filter_tiles(keys, block_d)
    if keys <= 16:
        return Tiles(16, 16, 1, True)
    if keys <= 32:
        return Tiles(32, 32, 4, True)
    if keys <= 64:
        return Tiles(64, 64, 8, True)
    return Tiles(32, 64, 8, False)


def scatter_tiles(atoms: int) -> Tiles:
    """Tiles for what is added to a bias' table, pair by pair."""
    keys = min(max(power_of_two(atoms), 16), 128)
    return Tiles(16, keys, 1 if keys == 16 else 2 if keys == 32 else 4 if keys == 64 else 8, False)


def weights_tiles(atoms: int, block_d: int, is_filter: bool) -> Tiles:
    """Tiles for molecules of at most `atoms` atoms."""
    keys = max(power_of_two(atoms), 16)
    if is_filter:
        return filter_tiles(keys, block_d)
    return Tiles(min(keys, 32), min(keys, 64), 4 if keys > 32 else 2, keys <= 64)


def filter_tiles(keys: int, block_d: int) -> Tiles:
    """Tiles of a filter, whose numbers are `[I, J, D]`."""
    block_j = max(min(keys, 32, _FILTER_ELEMENTS // block_d), 1)
    block_i = max(min(keys, _FILTER_ELEMENTS // (block_d * block_j)), 1)
    return Tiles(block_i, block_j, 4, block_j >= keys)
