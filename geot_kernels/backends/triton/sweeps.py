"""How the programs of a backward pass divide its work, and the sums they leave to each other."""

from __future__ import annotations

from torch import Tensor

from .launch import Problem
from .radial_gradient import affine_gradient
from .tiles import Tiles, scatter_tiles


class Sweeps:
    """Programs that have key atoms, and where a tile does not take all keys, those that have rows.

    Attributes:
        column_blocks: Blocks of key atoms of a molecule.
        row_blocks: Blocks of query atoms.
        groups: Groups of heads.
        programs: All programs.
        is_row_whole: Whether a program that has rows has all their keys in a tile.
        row_programs: Programs that have whole rows, of one group of heads.
    """

    def __init__(self, problem: Problem, tiles: Tiles, only_rows: bool = False) -> None:
        self.tiles = tiles
        self.is_row_whole = only_rows and tiles.block_j >= problem.atoms
        self.column_blocks = 1 if tiles.is_whole else -(-problem.atoms // tiles.block_j)
        self.row_blocks = 0 if tiles.is_whole else -(-problem.atoms // tiles.block_i)
        if only_rows:
            self.column_blocks = 0
        self.blocks = self.column_blocks + self.row_blocks
        self.groups, self.heads_per_group = problem.groups(problem.molecules * self.blocks)
        there = problem.rows > 0 and problem.heads > 0
        self.programs = problem.molecules * self.blocks * self.groups if there else 0
        self.row_programs = problem.molecules * (1 if tiles.is_whole else self.row_blocks)

    @classmethod
    def of_rows(cls, problem: Problem, is_second: bool) -> Sweeps:
        """Programs that have rows, for the sums of a table alone."""
        return cls(
            problem, scatter_tiles(problem.atoms, problem.block_d, is_second), only_rows=True
        )


class GeometrySums:
    """What pairs give to positions and affine map, in parts that no two programs share.

    Attributes:
        rows: To query atoms, `[parts, rows, 3]`.
        columns: To key atoms, `[groups, rows, 3]`.
        affine: `[groups, rows, 2, T]`.
    """

    def __init__(
        self, problem: Problem, sweeps: Sweeps, needs_positions: bool, needs_affine: bool
    ) -> None:
        self._problem = problem
        groups, rows = sweeps.groups, problem.rows
        tiles = sweeps.tiles
        row_parts = problem.heads if tiles.is_whole and not tiles.kept else groups
        self.parts: Tensor | None = None
        self.rows: Tensor | None = None
        self.columns: Tensor | None = None
        self.affine: Tensor | None = None
        if needs_positions:
            self.parts = problem.empty(row_parts + groups, rows, 3)
            self.rows, self.columns = self.parts[:row_parts], self.parts[row_parts:]
        if needs_affine:
            types = problem.of_gradients()["BLOCK_T"]
            self.affine = problem.empty(groups, rows, 2, types)

    def positions(self) -> Tensor:
        """The gradient of the positions."""
        assert self.parts is not None
        total = self.parts[0] if len(self.parts) == 1 else self.parts.sum(0)
        return total.view(self._problem.inputs.positions.shape)

    def affine_gradient(self) -> Tensor:
        """The gradient of the affine map."""
        assert self.affine is not None
        return affine_gradient(self._problem, self.affine)
