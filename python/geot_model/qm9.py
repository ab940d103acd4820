"""QM9: small organic molecules of H, C, N, O, F and twelve properties, at B3LYP/6-31G(2df,p).

A sample of 3,000 molecules ships with the package (`qm9_sample.npz`, written by
`scripts/make_qm9_sample.py`); all 130,831 come from the package qm9pack. What both have is the
same, bit for bit. qm9pack leaves out the 3,054 of QM9's 133,885 molecules that failed its authors'
consistency check, so the sample has none of them either.

Source:
    Ramakrishnan, Dral, Rupp, von Lilienfeld, Scientific Data 1, 140022 (2014),
    doi:10.1038/sdata.2014.22, as packed by qm9pack 1.0.3 (MIT License, Copyright (c) 2024 Raghu).
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .molecules import Molecules, pointers

TARGETS: dict[str, str] = {
    "mu": "Debye",
    "alpha": "Å^3",
    "homo": "eV",
    "lumo": "eV",
    "gap": "eV",
    "r2": "Å^2",
    "zpve": "eV",
    "U0": "eV",
    "U": "eV",
    "H": "eV",
    "G": "eV",
    "Cv": "cal/(mol K)",
}
"""The twelve usual targets, name to unit, in the usual order."""

HARTREE = 27.211386245988  # eV, CODATA 2018
_BOHR = 0.529177210903  # Å, CODATA 2018

# Target: column of qm9pack, and what turns its unit into that of TARGETS.
_COLUMNS: dict[str, tuple[str, float]] = {
    "mu": ("Dipole_debye", 1.0),
    "alpha": ("Polarizability_bohr3", _BOHR**3),
    "homo": ("HOMO_au", HARTREE),
    "lumo": ("LUMO_au", HARTREE),
    "gap": ("HOMO_LUMO_gap_au", HARTREE),
    "r2": ("R2_bohr2", _BOHR**2),
    "zpve": ("ZPVE_au", HARTREE),
    "U0": ("InternalEnergy_0K_au", HARTREE),
    "U": ("InternalEnergy_298K_au", HARTREE),
    "H": ("Enthalphy_298K_au", HARTREE),
    "G": ("GibbsFreeEnergy_298K_au", HARTREE),
    "Cv": ("Heatcapacity_Cv_cal_mol_K", 1.0),
}

_ELEMENTS = (1, 6, 7, 8, 9)
_ATOMS: dict[str, tuple[float, ...]] = {  # hartree
    "U0": (-0.500273, -37.846772, -54.583861, -75.064579, -99.718730),
    "U": (-0.498857, -37.845355, -54.582445, -75.063163, -99.717314),
    "H": (-0.497912, -37.844411, -54.581501, -75.062219, -99.716370),
    "G": (-0.510927, -37.861317, -54.598897, -75.079532, -99.733544),
}

PUBLISHED_REFERENCES: dict[str, dict[int, float]] = {
    "zpve": dict.fromkeys(_ELEMENTS, 0.0),
    "Cv": dict.fromkeys(_ELEMENTS, 2.981),
    **{
        name: {z: energy * HARTREE for z, energy in zip(_ELEMENTS, energies, strict=True)}
        for name, energies in _ATOMS.items()
    },
}
"""What single atoms have of QM9's targets, as its authors give it (atomref.txt): target to atomic
number to value, in the units of `TARGETS`."""

_ATOMIC_NUMBERS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}


def load_qm9(full: bool = False) -> Molecules:
    """Load QM9, in the order of its index: the sample that ships with the package, or all of it.

    Args:
        full: False for the 3,000 molecules of the sample, True for all 130,831, read from
            the 226 MB of CSV in qm9pack (some seconds).

    Returns:
        The molecules, named "gdb_<index>" with the index that QM9 gives them, from 1. SMILES are
        those that it gives, of the structures from GDB-17; some changed their bonds when relaxed.

    Raises:
        ModuleNotFoundError: `full` without qm9pack.
    """
    return _read_qm9pack(qm9pack_folder()) if full else _read_sample()


def _names(index: Iterable[int]) -> NDArray[np.str_]:
    return np.array([f"gdb_{i}" for i in index])


def _read_sample() -> Molecules:
    with np.load(Path(__file__).with_name("qm9_sample.npz"), allow_pickle=False) as file:
        return Molecules(
            numbers=file["numbers"],
            positions=file["positions"],
            ptr=file["ptr"],
            targets=dict(zip(file["target_names"].tolist(), file["targets"], strict=True)),
            names=_names(file["index"]),
            units=TARGETS,
            smiles=file["smiles"],
        )


def qm9pack_folder() -> Path:
    """Folder of the CSV files of QM9, in the package qm9pack."""
    # Only found, not imported: its __init__ needs pkg_resources, which setuptools no longer has.
    spec = importlib.util.find_spec("qm9pack")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "load_qm9(full=True) reads the package qm9pack, which is not installed: "
            "pip install qm9pack",
            name="qm9pack",
        )
    return Path(spec.origin).parent / "data"


def _read_qm9pack(folder: Path) -> Molecules:
    index: list[int] = []
    smiles: list[str] = []
    sizes: list[int] = []
    symbols: list[str] = []
    coordinates: list[str] = []
    properties: list[list[str]] = []
    for path in sorted(folder.glob("qm9_part*.csv")):
        with path.open(newline="", encoding="ascii") as file:
            for row in csv.DictReader(file):
                index.append(int(row["Index"]))
                smiles.append(row["SMILES"])
                sizes.append(int(row["N_atoms"]))
                symbols.append(row["Elements"][1:-1].replace("'", ""))  # "['C','H','H']"
                coordinates.append(row["XYZ_Ang"])  # "[[x,y,z],[x,y,z],...]"
                properties.append([row[column] for column, _ in _COLUMNS.values()])
    values = np.array(properties, np.float64).T  # [12, M]
    return Molecules(
        numbers=_atomic_numbers(symbols),
        positions=_parse_positions(coordinates),
        ptr=pointers(np.array(sizes)),
        targets={
            name: column * factor
            for (name, (_, factor)), column in zip(_COLUMNS.items(), values, strict=True)
        },
        names=_names(index),
        units=TARGETS,
        smiles=np.array(smiles),
    )


def _atomic_numbers(symbols: list[str]) -> NDArray[np.uint8]:
    atoms = ",".join(symbols).split(",")
    return np.array([_ATOMIC_NUMBERS[symbol] for symbol in atoms], np.uint8)


def _parse_positions(coordinates: list[str]) -> NDArray[np.float32]:
    text = ",".join(coordinates).replace("[", "").replace("]", "")
    return np.fromstring(text, sep=",").astype(np.float32).reshape(-1, 3)
