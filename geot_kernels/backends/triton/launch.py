"""From the operators' inputs to a kernel's arguments."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...reference import compute_dtype
from ..gpu import contiguous, molecules_and_atoms
from ..inputs import Inputs
from .radial import GAUSSIANS, KNOTS, ROWS, WORDS
from .tables import MAX_WORDS, rows_of, words_of
from .tiles import backward_tiles, power_of_two, scatter_tiles

RUN_TIME = (  # arguments whose values no kernel is compiled for
    *(f"stride_{x}{dim}" for x in "qkv" for dim in "bnh"),
    *("num_atoms", "num_blocks", "num_groups", "heads_per_group"),
    *("num_rows", "num_column_blocks", "num_heads"),
    *("num_types", "num_tables", "num_intervals"),
)
_REACH = 2**31
_PAIRS_FOR_ROWS = 1 << 18  # from here on a launch that reorders the table pays
_ATOMS_FOR_WORDS = 33  # fewer pairs do not pay for a table in shared memory
_MIN_PROGRAMS = 2  # for each multiprocessor, before heads share a program


class Problem:
    """What the kernels of all passes are called with.

    Attributes:
        atoms: Atoms of the largest molecule, padding included.
        molecules: `B`.
        tensors: positions, radial, affine, mask, ptr, types, pair_index.
        numbers: Those of the types and the table.
        constants: Compile-time arguments.
    """

    def __init__(self, inputs: Inputs) -> None:
        q = inputs.q
        self.inputs, self.device = inputs, q.device
        self.is_filter, self.is_linear = inputs.score == "filter", inputs.normalizer == "linear"
        self.heads, self.head_dim = q.shape[-2:]
        self.dtype = compute_dtype(q.dtype)
        self.rows = q.shape[:-2].numel()
        self.molecules, self.atoms = molecules_and_atoms(inputs)
        self.features = tuple(self._addressable(x) for x in (q, inputs.k, inputs.v))
        strides = [_strides(x, inputs.ptr is not None) for x in self.features]
        self.strides = tuple(n for three in strides for n in three)
        radial = inputs.radial.contiguous()
        self.is_table = radial.ndim == 4
        intervals = radial.shape[1] - 1 if self.is_table else 1
        self.num_gaussians = 0 if self.is_table else radial.shape[1]
        self.intervals = intervals
        self.per_h = intervals / (inputs.r_max - inputs.r_min) if self.is_table else 0.0
        self.radial = radial
        self.tables = radial.shape[0] if self.is_table else 1
        self.channels = radial.shape[-1] if self.is_table else radial.shape[0] - 2
        self.tensors = (
            inputs.positions.contiguous(),
            radial,
            contiguous(inputs.affine),
            contiguous(inputs.mask),
            contiguous(inputs.ptr),
            contiguous(inputs.atom_types) if inputs.pair_index is not None else None,
            contiguous(inputs.pair_index),
        )
        self.num_types = 1 if inputs.pair_index is None else inputs.pair_index.shape[0]
        self.numbers = (
            self.num_types,
            self.tables,
            intervals,
            inputs.r_min,
            inputs.r_max,
            self.per_h,
            inputs.scale,
        )
        self.form = GAUSSIANS if not self.is_table else KNOTS
        if self.is_table and not self.is_filter and self.num_pairs() >= _PAIRS_FOR_ROWS:
            self.form = ROWS
        self.block_d = power_of_two(max(self.head_dim, 1 if self.is_filter else 16))
        self.constants: dict[str, Any] = {
            "C": self.channels,
            "H": self.heads,
            "D": self.head_dim,
            "K": self.num_gaussians,
            "RADIAL": self.form.value,
            "IS_FILTER": self.is_filter,
            "IS_LINEAR": self.is_linear,
            "BLOCK_D": self.block_d,
            "ALIGN": _alignment(self.head_dim, *self.strides),
            "PRECISION": precision(),
        }

    def _addressable(self, x: Tensor) -> Tensor:
        """Channels side by side, and offsets inside a molecule of at most 32 bits."""
        *_, stride_n, stride_h, stride_d = x.stride()
        reach = self.atoms * stride_n + self.heads * stride_h
        if (stride_d == 1 or x.shape[-1] == 1) and reach < _REACH:
            return x
        return x.contiguous()

    def num_pairs(self) -> int:
        """Pairs of all heads, at most."""
        return self.molecules * self.atoms**2 * self.heads

    def normalises_again(self) -> bool:
        """Whether a forward pass may read the table to 16 bits, gradients wanted or not.

        They are wanted of the table itself: a backward pass whose tiles have whole rows finds the
        sums of P again, and asks nothing of `L` but its size.
        """
        if self.is_linear:
            return False
        tiles = backward_tiles(self.atoms, self.block_d, False, 2)
        rows = scatter_tiles(self.atoms, self.block_d, False)
        return tiles.is_whole and rows.block_j >= self.atoms

    def of_table(self, is_forward: bool = False, forward_only: bool = False) -> None:
        """Brings the table into the form that the kernels read fastest."""
        if self.form is not ROWS:
            return
        takes_words = is_forward and self.inputs.q.itemsize == 2 and self.tables == 1
        takes_words &= self.atoms >= _ATOMS_FOR_WORDS and self.intervals <= MAX_WORDS
        if takes_words and (forward_only or self.normalises_again()):
            table, fine = words_of(self.radial)
            self.constants |= {"RADIAL": WORDS.value, "K": table.shape[1] - 4}
            numbers = list(self.numbers)
            numbers[2], numbers[5] = self.intervals * fine, self.per_h * fine
            self.numbers = tuple(numbers)
        else:
            table = rows_of(self.radial, 0.0 if self.is_linear else -math.inf)
        self.tensors = (self.tensors[0], table, *self.tensors[2:])

    def groups(self, programs: int) -> tuple[int, int]:
        """Into how many groups heads are divided over programs, and heads of a group.

        Args:
            programs: How many there would be with all heads in each.
        """
        wanted = _MIN_PROGRAMS * multiprocessors(self.device)
        groups = min(self.heads, -(-wanted // max(programs, 1)))
        per_group = -(-self.heads // groups)
        return -(-self.heads // per_group), per_group

    def adds_by_atomics(self) -> bool:
        """Whether the radial function's gradient is summed pair by pair, of a bias' table."""
        return self.is_table and not self.is_filter

    def of_gradients(self) -> dict[str, int]:
        """Compile-time arguments that only the backward passes take."""
        return {
            "BLOCK_T": power_of_two(max(self.num_types, 16)),
        }

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A result, to be written everywhere."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)


def precision() -> str:
    """How float32 features are multiplied."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return 132  # interpreted, or compiled for no GPU at hand
    return torch.cuda.get_device_properties(device).multi_processor_count


def _strides(x: Tensor, is_packed: bool) -> tuple[int, int, int]:
    """Those of molecule, atom and head."""
    strides = x.stride()
    return (0, *strides[:2]) if is_packed else strides[:3]


def _alignment(*strides: int) -> int:
    """The power of two, at most 16, that divides all strides."""
    bits = 16
    for n in strides:
        bits |= n
    return bits & -bits
