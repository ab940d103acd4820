"""The molecules of a training run: settings, split, and batches of molecules of one size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .molecules import Molecules, pad_batch
from .qm9 import TARGETS, load_qm9, random_split

DATA = ("qm9-sample", "qm9")
FRACTIONS = (0.85, 0.05, 0.10)
"""Shares of training, validation (which model is best) and test (the table)."""

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""Atomic numbers, positions, mask (as `pad_batch`), and targets."""


@dataclass(frozen=True)
class Settings:
    """What a training run depends on; the same settings give the same model.

    Attributes:
        data: "qm9-sample", the 3,000 molecules that ship with the package, or "qm9".
        targets: What to predict, names of `qm9.TARGETS`.
        molecules: How many molecules to draw from the data at random; None for all.
        epochs: Passes over the training molecules.
        batch_size: Molecules in a step.
        learning_rate: The highest, after the warm-up.
        weight_decay: Of AdamW.
        seed: Of the weights, the split and the order of the batches.
        embed_dim: Width of the network.
        num_heads: Heads of each attention, a divisor of `embed_dim`.
        num_layers: Layers.
        attention_scale: Whether each attention has GeoT's learned scale.
        num_gaussians: Gaussians of the filters' radial basis, evenly spaced up to `r_max`.
        filter_hidden: Width of the filters' hidden layer.
        r_max: Where the filters' tables end, Å. QM9's largest distance is 12.04 Å.
        num_knots: Of those tables.

    Raises:
        ValueError: A setting is out of its range, or contradicts another.
    """

    data: str = "qm9-sample"
    targets: tuple[str, ...] = ("homo", "lumo", "gap")
    molecules: int | None = None
    epochs: int = 100
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    seed: int = 0
    embed_dim: int = 64
    num_heads: int = 4
    num_layers: int = 4
    attention_scale: bool = True
    num_gaussians: int = 128
    filter_hidden: int = 64
    r_max: float = 13.0
    num_knots: int = 256

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.data not in DATA:
            raise ValueError(f"data: expected one of {', '.join(DATA)}, got '{self.data}'")
        for name in self.targets:
            if name not in TARGETS:
                raise ValueError(f"targets: expected names of {', '.join(TARGETS)}, got '{name}'")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            got = ", ".join(self.targets) or "none"
            raise ValueError(f"targets: expected one or several different ones, got {got}")
        least = {"epochs": 1, "batch_size": 1, "embed_dim": 1, "num_heads": 1, "num_layers": 1}
        for name, least_value in least.items():
            if getattr(self, name) < least_value:
                got = getattr(self, name)
                raise ValueError(f"{name}: expected at least {least_value}, got {got}")
        if self.molecules is not None and self.molecules < _FEWEST:
            raise ValueError(f"molecules: expected at least {_FEWEST}, got {self.molecules}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a number > 0, got {self.learning_rate}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected 0 to 2^32 - 1, got {self.seed}")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim: expected a multiple of num_heads={self.num_heads}, "
                f"got {self.embed_dim}"
            )

    def model_config(self) -> dict[str, Any]:
        """What a `Checkpoint` says of the network."""
        basis = {"num_basis": self.num_gaussians, "r_max": self.r_max}
        return {
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "num_layers": self.num_layers,
            "attention_scale": self.attention_scale,
            "basis": basis,
            "filter_hidden": self.filter_hidden,
            "r_max": self.r_max,
            "num_knots": self.num_knots,
        }


_FEWEST = 20  # molecules of which a tenth is 2 and a twentieth 1


@dataclass(frozen=True, eq=False)
class Split:
    """The molecules of a run.

    Attributes:
        train: For the weights, and all that is fitted or averaged.
        validation: For the choice of the best epoch.
        test: For the table of errors and nothing else.
    """

    train: Molecules
    validation: Molecules
    test: Molecules

    @classmethod
    def load(cls, settings: Settings) -> Split:
        """Read the data and split it: the same for the same data, `molecules` and seed.

        Raises:
            ModuleNotFoundError: The data "qm9" without the package qm9pack.
            ValueError: There are fewer molecules than asked for.
        """
        molecules = load_qm9(full=settings.data == "qm9")
        if settings.molecules is not None:
            if settings.molecules > len(molecules):
                raise ValueError(
                    f"molecules: expected at most {len(molecules)}, got {settings.molecules}"
                )
            order = np.random.RandomState(settings.seed).permutation(len(molecules))
            molecules = molecules[np.sort(order[: settings.molecules])]
        train, validation, test = random_split(len(molecules), FRACTIONS, settings.seed)
        return cls(molecules[train], molecules[validation], molecules[test])


def target_matrix(molecules: Molecules, targets: tuple[str, ...]) -> NDArray[np.float64]:
    """Stack targets: float64 [M, T], in the units of `TARGETS`."""
    return np.stack([molecules.targets[name] for name in targets], axis=1)


class Batches:
    """Batches of molecules of about one size, so that little of a batch is padding.

    Attributes:
        epoch: Chooses the batches, the same for the same seed and epoch.

    Args:
        molecules: What to make batches of.
        targets: float32 [M, T].
        batch_size: Molecules in a batch, the last one may have fewer.
        seed: None: the molecules come by size, the same batches in each epoch.
    """

    def __init__(
        self, molecules: Molecules, targets: Tensor, batch_size: int, seed: int | None = None
    ) -> None:
        self.molecules, self.targets, self.batch_size = molecules, targets, batch_size
        self.seed, self.epoch = seed, 0
        self._sizes = np.diff(molecules.ptr)

    def rows(self) -> list[NDArray[np.int64]]:
        """Choose the molecules of each batch."""
        count = len(self.molecules)
        cuts = range(self.batch_size, count, self.batch_size)
        if self.seed is None:
            return np.split(np.argsort(self._sizes, kind="stable"), cuts)
        random = np.random.RandomState([self.seed, self.epoch])
        order = random.permutation(count)
        batches = np.split(order[np.argsort(self._sizes[order], kind="stable")], cuts)
        return [batches[i] for i in random.permutation(len(batches))]

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.molecules) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Give atomic numbers, positions, mask (as `pad_batch`) and targets of each batch."""
        for rows in self.rows():
            yield *pad_batch(self.molecules[rows]), self.targets[torch.from_numpy(rows)]


def elements_of(split: Split) -> tuple[int, ...]:
    """Atomic numbers in a data set, sorted."""
    parts = (split.train, split.validation, split.test)
    return tuple(sorted({element for part in parts for element in part.elements}))
