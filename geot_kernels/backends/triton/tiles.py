"""Which tiles a pass uses: the only place where sizes are chosen.

Chosen offline for sm_90 (docs/triton.md): the cheapest tile of a few by instructions, among those
whose registers do not spill for molecules of at most 128 atoms; tests/test_triton_compile.py holds
them to it. Nothing is tuned at run time.
"""

from __future__ import annotations

from typing import NamedTuple

_FILTER_ELEMENTS = 2048  # of a tile [I, J, D]: 16 numbers a thread of 4 warps


class Tiles(NamedTuple):
    """Sizes of a pass: `I` query atoms by `J` key atoms, and warps.

    Attributes:
        block_i: `I`.
        block_j: `J`.
        num_warps: Of a program.
        is_whole: Whether `J` takes all keys of a molecule.
        keeps: Whether a program of the backward pass keeps the distances of all its tiles.
    """

    block_i: int
    block_j: int
    num_warps: int
    is_whole: bool
    keeps: bool = False

    @property
    def kept(self) -> int:
        """Tiles of a molecule whose distances a program of the backward pass keeps, or 0."""
        return -(-self.block_j // self.block_i) if self.keeps else 0


# By keys (the molecule's atoms, rounded up; `MANY`: more than 128), for heads of at most 32, 64
# and 128 channels: [I, J, warps]. Where `J` is less than the molecule, a tile is not whole.
MANY = 256
_FORWARD_16 = {
    16: ((16, 16, 1), (16, 16, 1), (16, 16, 1)),
    32: ((32, 32, 2), (32, 32, 2), (32, 32, 2)),
    64: ((64, 64, 4), (64, 64, 4), (32, 64, 4)),
    128: ((64, 64, 4), (64, 64, 4), (64, 64, 8)),
    MANY: ((64, 64, 4), (64, 64, 4), (64, 64, 8)),
}
_FORWARD_32 = {
    16: ((16, 16, 1), (16, 16, 1), (16, 16, 2)),
    32: ((32, 32, 2), (32, 32, 4), (32, 32, 4)),
    64: ((32, 64, 4), (16, 64, 4), (16, 64, 8)),
    128: ((16, 128, 8), (16, 128, 8), (16, 64, 8)),
    MANY: ((32, 32, 4), (32, 32, 4), (32, 32, 8)),
}
_BACKWARD_16 = {
    16: ((16, 16, 1), (16, 16, 1), (16, 16, 2)),
    32: ((32, 32, 2), (32, 32, 4), (32, 32, 4)),
    64: ((16, 64, 4), (16, 64, 8), (16, 64, 8)),
    128: ((16, 128, 8), (32, 32, 4), (16, 16, 4)),
    MANY: ((64, 64, 4), (32, 32, 4), (16, 16, 4)),
}
_BACKWARD_32 = {
    16: ((16, 16, 1), (16, 16, 2), (16, 16, 4)),
    32: ((16, 32, 4), (16, 32, 4), (16, 32, 8)),
    64: ((16, 64, 8), (16, 64, 8), (16, 64, 8)),
    128: ((16, 128, 8), (16, 16, 4), (16, 16, 2)),
    MANY: ((32, 32, 4), (16, 16, 4), (16, 16, 2)),
}
_SCATTER = {
    16: ((16, 16, 2), (16, 16, 4), (16, 16, 4)),
    32: ((16, 32, 4), (16, 32, 8), (16, 32, 8)),
    64: ((16, 64, 4), (16, 64, 8), (16, 64, 8)),
    128: ((16, 128, 8), (16, 64, 8), (16, 64, 8)),
    MANY: ((16, 64, 8), (16, 64, 8), (16, 64, 8)),
}
_SECOND_BACKWARD = {
    16: ((16, 16, 2), (16, 16, 4), (16, 16, 4)),
    32: ((16, 32, 4), (16, 32, 8), (16, 32, 8)),
    64: ((16, 64, 8), (16, 64, 8), (16, 16, 4)),
    128: ((16, 16, 4), (16, 16, 4), (16, 16, 4)),
    MANY: ((32, 32, 4), (16, 16, 4), (16, 16, 4)),
}
_SECOND_SCATTER = {
    16: ((16, 16, 4), (16, 16, 4), (16, 16, 4)),
    32: ((16, 32, 8), (16, 32, 8), (16, 32, 8)),
    64: ((16, 32, 8), (16, 32, 8), (16, 32, 8)),
    128: ((16, 16, 4), (16, 16, 4), (16, 16, 4)),
    MANY: ((16, 16, 4), (16, 16, 4), (16, 16, 4)),
}


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def _chosen(table: dict[int, tuple[tuple[int, int, int], ...]], atoms: int, block_d: int) -> Tiles:
    keys = min(max(power_of_two(atoms), 16), MANY)
    block_i, block_j, num_warps = table[keys][0 if block_d <= 32 else 1 if block_d <= 64 else 2]
    return Tiles(block_i, block_j, num_warps, block_j >= atoms)


def forward_tiles(atoms: int, block_d: int, is_filter: bool, itemsize: int) -> Tiles:
    """Tiles for molecules of at most `atoms` atoms and features of `itemsize` bytes."""
    if is_filter:
        return filter_tiles(atoms, block_d)
    return _chosen(_FORWARD_16 if itemsize == 2 else _FORWARD_32, atoms, block_d)


def backward_tiles(atoms: int, block_d: int, is_filter: bool, itemsize: int) -> Tiles:
    """Likewise of the backward pass."""
    if is_filter:
        return filter_tiles(atoms, block_d)
    tiles = _chosen(_BACKWARD_16 if itemsize == 2 else _BACKWARD_32, atoms, block_d)
    keeps = tiles.is_whole and (atoms <= 16 or (itemsize == 2 and atoms <= 64 and block_d <= 32))
    return tiles._replace(keeps=keeps)


def second_backward_tiles(atoms: int, block_d: int, is_filter: bool) -> Tiles:
    """Likewise of the second backward pass, in float32."""
    if is_filter:
        return filter_tiles(atoms, block_d)
    return _chosen(_SECOND_BACKWARD, atoms, block_d)


def scatter_tiles(atoms: int, block_d: int, is_second: bool) -> Tiles:
    """Tiles for what is added to a bias' table, pair by pair: `I` rows a program, never whole."""
    table = _SECOND_SCATTER if is_second else _SCATTER
    return _chosen(table, atoms, block_d)._replace(is_whole=False)


def weights_tiles(atoms: int, block_d: int, is_filter: bool) -> Tiles:
    """Tiles of `attention_weights`."""
    if is_filter:
        return filter_tiles(atoms, block_d)
    keys = max(power_of_two(atoms), 16)
    return Tiles(min(keys, 32), min(keys, 32), 4 if keys > 16 else 1, False)


def filter_tiles(atoms: int, block_d: int) -> Tiles:
    """Tiles of a filter, whose numbers are `[I, J, D]`."""
    keys = max(power_of_two(atoms), 16)
    block_j = max(min(keys, 32, _FILTER_ELEMENTS // block_d), 1)
    block_i = max(min(keys, _FILTER_ELEMENTS // (block_d * block_j)), 1)
    return Tiles(block_i, block_j, 4, block_j >= atoms)
