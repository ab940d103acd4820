"""Batches of molecules, packed one after the other without padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .molecules import Molecules, pointers


class Batch(NamedTuple):
    """Molecules as `GeoT` takes them packed, and what is to be learned of them.

    Attributes:
        numbers: Atomic numbers, int64 `[T]`.
        positions: Å, float32 `[T, 3]`.
        ptr: First row of each molecule and, last, `T`: int64 `[B+1]`.
        max_atoms: Size of the largest molecule.
        targets: float32 `[B, targets]`, NaN where one is not known.
        known: How many targets are known in the batch, of all processes together.
    """

    numbers: Tensor
    positions: Tensor
    ptr: Tensor
    max_atoms: int
    targets: Tensor
    known: int


class Batches:
    """Batches of molecules, the same for the same seed and epoch.

    With a seed they are random, as a gradient must not lean to one size: packed, small molecules
    do not wait for large ones anyway. `bucket` makes sizes within a batch alike where they should
    be: molecules are shuffled, those of so many batches at a time are sorted by size and cut into
    batches, and these come in random order.

    Attributes:
        epoch: Chooses the batches.

    Args:
        molecules: What to make batches of.
        targets: float32 `[M, targets]`; None for none.
        batch_size: Molecules in a batch, of all processes together; the last may have fewer.
        seed: None: the molecules come by size, the same batches in each epoch.
        bucket: Batches whose molecules are sorted by size together; 1: batches are random.
        rank: Which share of each batch is given, where several processes train together.
        world: Their number.
    """

    def __init__(
        self,
        molecules: Molecules,
        targets: Tensor | None,
        batch_size: int,
        seed: int | None = None,
        *,
        bucket: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.molecules, self.batch_size, self.seed = molecules, batch_size, seed
        self.bucket = bucket
        self.targets = torch.empty(len(molecules), 0) if targets is None else targets
        self.rank, self.world = rank, world
        self.epoch = 0
        self._sizes = np.diff(molecules.ptr)

    def rows(self) -> list[NDArray[np.int64]]:
        """Choose the molecules of each batch, of all processes together."""
        count, size = len(self.molecules), self.batch_size
        cuts = range(size, count, size)
        if self.seed is None:
            return [*np.split(np.argsort(self._sizes, kind="stable"), cuts)] if count else []
        random = np.random.RandomState([self.seed, self.epoch])
        order = random.permutation(count)
        pool = np.arange(count) // (self.bucket * size)
        batches = np.split(order[np.lexsort((self._sizes[order], pool))], cuts) if count else []
        return [batches[i] for i in random.permutation(len(batches))]

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.molecules) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Give this process' share of each batch."""
        for rows in self.rows():
            known = int(self.targets[torch.from_numpy(rows)].isfinite().sum())
            yield pack(self.molecules, rows[self.rank :: self.world], self.targets, known)


def pack(
    molecules: Molecules,
    rows: NDArray[np.int64],
    targets: Tensor | None = None,
    known: int = 0,
) -> Batch:
    """Lay some molecules one after the other.

    Args:
        molecules: Where they are.
        rows: Which ones, `[B]`.
        targets: Of all molecules, float32 `[M, targets]`; None for none.
        known: As in `Batch`.
    """
    sizes = np.diff(molecules.ptr)[rows]
    ptr = pointers(sizes)
    atoms = np.repeat(molecules.ptr[rows] - ptr[:-1], sizes) + np.arange(ptr[-1])
    chosen = torch.empty(len(rows), 0) if targets is None else targets[torch.from_numpy(rows)]
    return Batch(
        torch.from_numpy(molecules.numbers[atoms].astype(np.int64)),
        torch.from_numpy(molecules.positions[atoms]),
        torch.from_numpy(ptr),
        int(sizes.max(initial=0)),
        chosen,
        known,
    )
