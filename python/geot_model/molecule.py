"""Molecules read from files of SMILES, SDF or XYZ, and the bonds that coordinates imply.

A molecule that cannot be read is reported with its place in the file and the others are still
read. RDKit's own messages on stderr are silenced: their content is in the reports.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rdkit import Chem, rdBase
from rdkit.Chem import AllChem, rdDetermineBonds, rdDistGeom, rdForceFieldHelpers
from rdkit.Geometry import Point3D

from .molecules import Molecule

_ACCEPTED = "SMILES (.smi, .txt), SDF (.sdf) or XYZ (.xyz)"
_NUM_ELEMENTS = 118
_EMBED_SEED = 2024
_EMBED_TIMEOUT_S = 60
_RELAX_STEPS = 2000
_FRAGMENT_GAP = 2.5  # Å between fragments of one SMILES before they are relaxed
# Covalent radii are multiplied by these. RDKit's own rule bonds atoms across small rings, which
# leaves 6 % of our 3,000 molecules of QM9 without bond orders; 1.15 leaves none.
_BOND_REACHES = (1.15, 1.3)
# The search for bond orders is exponential in the number of atoms with several valences: on some
# molecules of 40 atoms it does not end (RDKit issue 9227). QM9's need fewer than 30 tries.
_BOND_ORDER_TRIES = 10_000


def perceive_bonds(
    numbers: npt.ArrayLike, positions: npt.ArrayLike, *, smiles: str | None = None
) -> Chem.Mol | None:
    """Bonds of a molecule from its coordinates, whatever they are, in bounded time.

    Atoms closer than 1.15 times the sum of their covalent radii are bonded; where no neutral
    molecule comes of that (H2, stretched bonds), those closer than 1.3 times. Bond orders and
    charges are those of `smiles` where it describes the same graph (in any order of atoms), else
    they are searched for with total charge 0, else every bond is single.

    Args:
        numbers: [n] integers, atomic numbers.
        positions: [n, 3], Å.
        smiles: the molecule's SMILES, if known.

    Returns:
        A molecule with atoms in the order given, hydrogens explicit, and a 3-D conformer; None
        where there is nothing to build one from: no atoms, an unknown element, a position that
        is not finite.
    """
    z = np.asarray(numbers)
    xyz = np.asarray(positions, dtype=np.float64)
    known = bool(((z >= 1) & (z <= _NUM_ELEMENTS)).all())
    if z.size == 0 or not known or not np.isfinite(xyz).all():
        return None
    with rdBase.BlockLogs():
        graphs = [_connected(z, xyz, reach) for reach in _BOND_REACHES]
        answers = itertools.chain(
            (_orders_from_smiles(graph, smiles) for graph in graphs),
            (_searched_orders(graph) for graph in graphs),
        )
        return next((mol for mol in answers if mol is not None), graphs[-1])


def _bare_atoms(z: npt.NDArray[np.int64], xyz: npt.NDArray[np.float64]) -> Chem.RWMol:
    """Atoms with a conformer and no bonds."""
    mol = Chem.RWMol()
    conformer = Chem.Conformer(len(z))
    for i, number in enumerate(z):
        atom = Chem.Atom(int(number))
        atom.SetNoImplicit(True)
        mol.AddAtom(atom)
        conformer.SetAtomPosition(i, Point3D(*map(float, xyz[i])))
    mol.AddConformer(conformer)
    return mol


def _connected(z: npt.NDArray[np.int64], xyz: npt.NDArray[np.float64], reach: float) -> Chem.Mol:
    """Which atoms are bonded, every bond single; no bonds where RDKit fails."""
    mol = _bare_atoms(z, xyz)
    try:
        rdDetermineBonds.DetermineConnectivity(mol, useVdw=True, covFactor=reach)
    except (ValueError, RuntimeError):
        mol = _bare_atoms(z, xyz)
    mol.UpdatePropertyCache(strict=False)
    return mol.GetMol()


def _orders_from_smiles(graph: Chem.Mol, smiles: str | None) -> Chem.Mol | None:
    """Bond orders and charges of `smiles` on the graph; None where the two do not match."""
    template = Chem.MolFromSmiles(smiles) if smiles else None
    if template is None:
        return None
    template = Chem.AddHs(template)
    if template.GetNumAtoms() != graph.GetNumAtoms():
        return None
    assign: Any = AllChem.AssignBondOrdersFromTemplate  # has no types
    try:
        mol: Chem.Mol = assign(template, graph)
    except (ValueError, RuntimeError):
        return None
    return mol


def _searched_orders(graph: Chem.Mol) -> Chem.Mol | None:
    """Bond orders by a bounded search for a neutral molecule; None where none is found."""
    mol = Chem.Mol(graph)
    try:
        rdDetermineBonds.DetermineBondOrders(mol, charge=0, maxIterations=_BOND_ORDER_TRIES)
    except (ValueError, RuntimeError):
        return None
    return mol


def read_molecules(path: str | Path) -> tuple[list[Molecule], list[str]]:
    """Molecules of a file, and what could not be read.

    * `.smi`, `.txt`: one SMILES a line, then, after whitespace, a name if there is one. Blank
      lines and lines that begin with `#` are skipped. Hydrogens are added and a 3-D structure is
      made by ETKDGv3 with a fixed seed, then MMFF94 (UFF where that lacks parameters). How the
      parts of a SMILES with a dot lie to each other is not known: they are set side by side and
      relaxed.
    * `.sdf`: 3-D records. Hydrogens that a record leaves out are added.
    * `.xyz`: one frame or several; columns after the coordinates are ignored.

    Args:
        path: the file; its suffix says what it is.

    Returns:
        The molecules in the order of the file, and for each that could not be read a line like
        `molecules.smi:3: cannot parse SMILES 'C1CC'` (XYZ: the line in the file, SDF: the record).

    Raises:
        ValueError: if the suffix is none of the above.
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    entries = {".smi": _smiles, ".txt": _smiles, ".sdf": _sdf, ".xyz": _xyz}
    reader = entries.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: expected {_ACCEPTED}, got suffix '{path.suffix}'")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {_ACCEPTED}")
    molecules, problems = [], []
    with rdBase.BlockLogs():
        for entry in reader(path.read_text(encoding="utf-8-sig", errors="replace"), path):
            if isinstance(entry, Molecule):
                molecules.append(entry)
            else:
                problems.append(entry)
    return molecules, problems


def _smiles(text: str, path: Path) -> Iterator[Molecule | str]:
    """Molecules and problems of a file of SMILES, in order."""
    for number, line in enumerate(text.split("\n"), start=1):
        smiles, *name = line.split(maxsplit=1) or [""]
        if not smiles or smiles.startswith("#"):
            continue
        try:
            mol = _embedded(_parsed_smiles(smiles))
        except ValueError as problem:
            yield f"{path}:{number}: {problem}"
        else:
            yield _molecule(mol, name[0].strip() if name else f"{path.stem}-{number}", smiles)


def _parsed_smiles(smiles: str) -> Chem.Mol:
    """A SMILES with its hydrogens."""
    mol = Chem.MolFromSmiles(smiles)
    if mol is None:
        why = _chemistry_problem(Chem.MolFromSmiles(smiles, sanitize=False))
        raise ValueError(f"cannot parse SMILES '{smiles}'{why}")
    _refuse_dummies(mol)
    return Chem.AddHs(mol)


def _chemistry_problem(unsanitized: Chem.Mol | None) -> str:
    """What RDKit objects to in a molecule whose syntax it can read, ready to be appended."""
    problems = Chem.DetectChemistryProblems(unsanitized) if unsanitized is not None else ()
    return f": {problems[0].Message()}" if problems else ""


def _refuse_dummies(mol: Chem.Mol) -> None:
    """Raise if an atom is no element (`*`, an R group)."""
    if any(atom.GetAtomicNum() == 0 for atom in mol.GetAtoms()):
        raise ValueError("has a dummy atom, which is no element")


def _embedded(mol: Chem.Mol) -> Chem.Mol:
    """The same molecule with a relaxed 3-D structure."""
    parameters: Any = rdDistGeom.ETKDGv3()  # its stubs forbid assignment
    parameters.randomSeed = _EMBED_SEED
    parameters.timeout = _EMBED_TIMEOUT_S
    if rdDistGeom.EmbedMolecule(mol, parameters) < 0:
        parameters.useRandomCoords = True
        if rdDistGeom.EmbedMolecule(mol, parameters) < 0:
            raise ValueError("no 3-D structure found")
    _set_fragments_apart(mol)
    if rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
        rdForceFieldHelpers.MMFFOptimizeMolecule(mol, maxIters=_RELAX_STEPS)
    elif rdForceFieldHelpers.UFFHasAllMoleculeParams(mol):
        rdForceFieldHelpers.UFFOptimizeMolecule(mol, maxIters=_RELAX_STEPS)
    return mol


def _set_fragments_apart(mol: Chem.Mol) -> None:
    """Shift fragments along x: RDKit embeds each around the origin, one on top of the other."""
    conformer = mol.GetConformer()
    xyz = conformer.GetPositions()
    edge = -np.inf
    for fragment in Chem.GetMolFrags(mol):
        atoms = list(fragment)
        shift = max(0.0, edge + _FRAGMENT_GAP - xyz[atoms, 0].min())
        xyz[atoms, 0] += shift
        edge = xyz[atoms, 0].max()
    for i, point in enumerate(xyz):
        conformer.SetAtomPosition(i, Point3D(*map(float, point)))


def _molecule(mol: Chem.Mol, name: str, smiles: str | None) -> Molecule:
    """Elements and coordinates of an RDKit molecule."""
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], dtype=np.int64)
    positions = mol.GetConformer().GetPositions().astype(np.float32)
    return Molecule(numbers, positions, name, smiles)


def _sdf(text: str, path: Path) -> Iterator[Molecule | str]:
    """Molecules and problems of an SDF, in order."""
    records: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.startswith("$$$$"):
            records.append([])
        else:
            records[-1].append(line)
    if not "".join(records[-1]).strip():
        records.pop()
    for number, lines in enumerate(records, start=1):
        name = lines[0].strip() or f"{path.stem}-{number}"
        try:
            mol = _parsed_mol_block("\n".join(lines))
        except ValueError as problem:
            yield f"{path}: record {number}: {problem}"
        else:
            yield _molecule(mol, name, Chem.MolToSmiles(Chem.RemoveHs(mol)))


def _parsed_mol_block(block: str) -> Chem.Mol:
    """One record of an SDF with every hydrogen and 3-D coordinates."""
    mol = Chem.MolFromMolBlock(block, removeHs=False)
    if mol is None:
        why = _chemistry_problem(Chem.MolFromMolBlock(block, sanitize=False, removeHs=False))
        raise ValueError(f"cannot parse the mol block{why}")
    if mol.GetNumAtoms() == 0:
        raise ValueError("has no atoms")
    _refuse_dummies(mol)
    if mol.GetNumAtoms() > 1 and not mol.GetConformer().Is3D():
        raise ValueError("has no 3-D coordinates (all z are 0 and the header does not say 3D)")
    return Chem.AddHs(mol, addCoords=True)


class _BadLine(ValueError):
    """A line of an XYZ file that is not what it should be."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def _xyz(text: str, path: Path) -> Iterator[Molecule | str]:
    """Molecules and problems of an XYZ file, in order; after a problem, on to the next count."""
    lines = text.rstrip().split("\n")
    start, frame = 0, 0
    while start < len(lines):
        if not lines[start].strip():
            start += 1
            continue
        frame += 1
        try:
            numbers, positions = _xyz_frame(lines, start)
        except _BadLine as problem:
            yield f"{path}:{problem.line + 1}: {problem}"
            start = max(problem.line, start + 1)
            while start < len(lines) and not lines[start].strip().isdecimal():
                start += 1
        else:
            comment = lines[start + 1].split("\t")[0].strip()
            name = comment if comment and "=" not in comment else f"{path.stem}-{frame}"
            yield Molecule(numbers, positions, name)
            start += len(numbers) + 2


def _xyz_frame(
    lines: list[str], start: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Elements [n] and positions [n, 3] (Å) of the frame whose count stands at `start`."""
    count = lines[start].strip()
    if not count.isdecimal() or int(count) == 0:
        raise _BadLine(start, f"expected the number of atoms, got '{count}'")
    numbers: list[int] = []
    positions: list[list[float]] = []
    for here in range(start + 2, start + 2 + int(count)):
        if here >= len(lines):
            raise _BadLine(start, f"expected {count} atoms, the file ends after {len(numbers)}")
        number, position = _xyz_atom(lines, here)
        numbers.append(number)
        positions.append(position)
    return np.array(numbers, dtype=np.int64), np.array(positions, dtype=np.float32)


def _xyz_atom(lines: list[str], here: int) -> tuple[int, list[float]]:
    """Atomic number and position (Å) on one line of a frame."""
    symbol, *columns = lines[here].split() or [""]
    number = _atomic_numbers().get(symbol.capitalize())
    try:
        # QM9's own files write exponents as `1.2*^-6`.
        position = [float(column.replace("*^", "e")) for column in columns[:3]]
    except ValueError:
        position = []
    if number is None or len(position) != 3 or not np.isfinite(position).all():
        raise _BadLine(here, f"expected 'element x y z', got '{lines[here].strip()}'")
    return number, position


@functools.cache
def _atomic_numbers() -> dict[str, int]:
    """Atomic number of each element by its symbol, and by itself as XYZ files may write it."""
    table = Chem.GetPeriodicTable()
    elements = range(1, _NUM_ELEMENTS + 1)
    symbols = {table.GetElementSymbol(number): number for number in elements}
    return symbols | {str(number): number for number in elements}
