"""Write the molecular geometries that the benchmarks run on: `bench/geometries/*.npz`.

    python scripts/make_bench_geometries.py [--only NAME ...] [--protein-pdb FILE]

    drug_like   128 molecules of three files of RDKit, 20 to 100 atoms; ETKDGv3, then MMFF94
    pcqm_like   256 of NCI's first 5,000, as in RDKit, of the size of PCQM4Mv2; the same
    aspirin     64 frames of Langevin dynamics at 500 K, MMFF94
    protein     PDB entry 4ZHL as deposited, without water; heavy atoms only

Each file is a set of M molecules of T atoms in all:

    numbers    uint8    [T]      atomic numbers
    positions  float32  [T, 3]   Å, the mean of each molecule at 0
    ptr        int64    [M+1]    molecule m is rows ptr[m]:ptr[m+1]
    source     str               where the molecules and their positions are from

Only this script needs RDKit (its wheel, version 2026.9.1, which has its Data and Contrib folders),
and the protein not even that: `--protein-pdb` names the file `Tests/PDB/4ZHL.cif` of the source
distribution of biopython 1.88. Seeds are fixed: a second run gives the same bytes. Another
version of RDKit, or another processor, may give other conformers.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rdkit
from numpy.typing import NDArray
from rdkit import Chem, RDConfig, RDLogger
from rdkit.Chem import AllChem

OUTPUT = Path(__file__).parents[1] / "bench" / "geometries"
SEED = 9
CONFORMER = "one conformer each, by ETKDGv3 and MMFF94"

WEHI = "Data/Pains/test_data/wehi_mols.csv"
ZINC = "Contrib/SA_Score/data/zim.100.txt"
CHEMBL = "Contrib/fraggle/data/ChEMBL_11265_actives.smi"
NCI = "Data/NCI/first_5K.smi"
DRUG_LIKE = {WEHI: 64, ZINC: 32, CHEMBL: 32}  # molecules of each file
DRUG_LIKE_ATOMS = range(20, 101)  # hydrogens included
PCQM_LIKE_COUNT = 256
PCQM_LIKE_HEAVY = range(8, 23)  # 14.2 on average; those of PCQM4Mv2 have about 14
ELEMENTS = {"H", "C", "N", "O", "F", "Si", "P", "S", "Cl", "Br", "I"}

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
FRAMES, BETWEEN, WARM_UP = 64, 400, 10_000  # frames, steps from one to the next, steps before
TIME_STEP = 0.5  # fs
FRICTION = 0.01  # 1/fs
KT = 500 * 0.0019872043  # kcal/mol at 500 K
ACCELERATION = 4.184e-4  # Å/fs² of 1 kcal/mol/Å on 1 g/mol

PROTEIN_ELEMENTS = {"C": 6, "N": 7, "O": 8, "S": 16}

Frame = tuple[NDArray[np.uint8], NDArray[np.float64]]  # atomic numbers [N], positions [N, 3], Å


def smiles(path: str) -> list[str]:
    """Return the SMILES of a file of RDKit, salts and mixtures left out."""
    top, rest = path.split("/", 1)
    folder = {"Data": RDConfig.RDDataDir, "Contrib": RDConfig.RDContribDir}[top]
    with (Path(folder) / rest).open(encoding="utf-8", newline="") as file:
        if path.endswith(".csv"):
            found = [row[0] for row in csv.reader(file) if row]
        else:
            found = [line.split()[0] for line in file if line.strip()]
    return [text for text in found if text != "smiles" and "." not in text]


def conformer(mol: Chem.Mol) -> Chem.Mol | None:
    """Return the molecule with hydrogens and positions, None where RDKit finds none."""
    mol = Chem.AddHs(mol)
    if not AllChem.MMFFHasAllMoleculeParams(mol):
        return None
    parameters = AllChem.ETKDGv3()
    parameters.randomSeed = SEED
    if AllChem.EmbedMolecule(mol, parameters) != 0:
        return None
    return mol if AllChem.MMFFOptimizeMolecule(mol, maxIters=5000) == 0 else None


def frame(mol: Chem.Mol) -> Frame:
    """Return the atomic numbers and positions of a molecule."""
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], np.uint8)
    return numbers, mol.GetConformer().GetPositions()


def draw(path: str, atoms: range, heavy: range) -> Iterator[Frame]:
    """Yield molecules of a file with so many atoms, in random order, none twice."""
    found, seen = smiles(path), set()
    # numpy froze the stream of RandomState; that of default_rng may change with a release.
    for i in np.random.RandomState(SEED).permutation(len(found)):
        mol = Chem.MolFromSmiles(found[i])
        if mol is None or mol.GetNumAtoms() not in heavy:
            continue
        if mol.GetNumAtoms(onlyExplicit=False) not in atoms or Chem.GetFormalCharge(mol) != 0:
            continue
        if {atom.GetSymbol() for atom in mol.GetAtoms()} - ELEMENTS:
            continue
        if (name := Chem.MolToSmiles(mol)) in seen or (mol := conformer(mol)) is None:
            continue
        seen.add(name)
        yield frame(mol)


def take(count: int, frames: Iterator[Frame]) -> list[Frame]:
    """Return the first `count`."""
    taken = [one for one, _ in zip(frames, range(count), strict=False)]
    if len(taken) < count:
        raise ValueError(f"expected {count} molecules, found {len(taken)}")
    return taken


def drug_like() -> tuple[list[Frame], str]:
    """Return molecules of a screening library, of ZINC and of a series of ChEMBL."""
    frames = []
    for path, count in DRUG_LIKE.items():
        frames += take(count, draw(path, DRUG_LIKE_ATOMS, range(1, 101)))
    files = ", ".join(f"{count} of {path}" for path, count in DRUG_LIKE.items())
    return frames, f"RDKit {rdkit.__version__} (BSD-3-Clause): {files}; {CONFORMER}"


def pcqm_like() -> tuple[list[Frame], str]:
    """Return molecules of NCI that are as large as those of PCQM4Mv2."""
    frames = take(PCQM_LIKE_COUNT, draw(NCI, range(1, 101), PCQM_LIKE_HEAVY))
    return frames, (
        f"not PCQM4Mv2, but molecules of its size: {PCQM_LIKE_COUNT} of {NCI} in RDKit "
        f"{rdkit.__version__} (BSD-3-Clause) with {PCQM_LIKE_HEAVY.start} to "
        f"{PCQM_LIKE_HEAVY.stop - 1} heavy atoms; {CONFORMER}"
    )


def aspirin() -> tuple[list[Frame], str]:
    """Return frames of Langevin dynamics of one molecule in vacuum, split as BAOAB.

    B: velocities by half a step, A: positions by half a step, O: friction and noise, A, B.
    Leimkuhler, Matthews, Applied Mathematics Research eXpress 2013, 34 (2013).
    """
    mol = conformer(Chem.MolFromSmiles(ASPIRIN))
    if mol is None:
        raise ValueError("aspirin: no conformer")
    force_field = AllChem.MMFFGetMoleculeForceField(mol, AllChem.MMFFGetMoleculeProperties(mol))
    numbers, x = frame(mol)
    mass = np.array([[atom.GetMass()] for atom in mol.GetAtoms()])  # [N, 1], g/mol

    def acceleration(x: NDArray[np.float64]) -> NDArray[np.float64]:
        mol.GetConformer().SetPositions(x)
        force_field.Initialize()  # or it keeps the distances of the step before
        return -ACCELERATION * np.reshape(force_field.CalcGrad(), x.shape) / mass  # kcal/mol/Å

    noise = np.random.RandomState(SEED)
    thermal = np.sqrt(ACCELERATION * KT / mass)  # Å/fs
    kept = np.exp(-FRICTION * TIME_STEP)
    v, a, frames = thermal * noise.standard_normal(x.shape), acceleration(x), []
    for step in range(1, WARM_UP + FRAMES * BETWEEN + 1):
        v = v + TIME_STEP / 2 * a
        x = x + TIME_STEP / 2 * v
        v = kept * v + np.sqrt(1 - kept**2) * thermal * noise.standard_normal(x.shape)
        x = x + TIME_STEP / 2 * v
        a = acceleration(x)
        v = v + TIME_STEP / 2 * a
        if step > WARM_UP and (step - WARM_UP) % BETWEEN == 0:
            frames.append((numbers, x))
    return frames, (
        f"aspirin, {FRAMES} frames, {BETWEEN * TIME_STEP:g} fs from one to the next, of Langevin "
        f"dynamics at 500 K with the MMFF94 of RDKit {rdkit.__version__}; not MD17"
    )


def protein(path: Path) -> tuple[list[Frame], str]:
    """Return the polymer atoms of the one model of an mmCIF file."""
    columns: list[str] = []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("_atom_site."):
            columns.append(line.strip().removeprefix("_atom_site."))
        elif line.startswith("ATOM "):
            rows.append(dict(zip(columns, line.split(), strict=True)))
    if any(row["label_alt_id"] != "." for row in rows):
        raise ValueError(f"{path.name}: expected one place for each atom")
    numbers = np.array([PROTEIN_ELEMENTS[row["type_symbol"]] for row in rows], np.uint8)
    positions = np.array([[float(row[f"Cartn_{axis}"]) for axis in "xyz"] for row in rows])
    return [(numbers, positions)], (
        "PDB entry 4ZHL (CC0): murinised human urokinase with the peptide mupain-1-IG, X-ray "
        "diffraction at 2.06 Å; heavy atoms of both chains, no water; from the source "
        "distribution of biopython 1.88"
    )


def pack(frames: list[Frame], source: str) -> dict[str, Any]:
    """Return the arrays of a file."""
    sizes = [len(numbers) for numbers, _ in frames]
    return {
        "numbers": np.concatenate([numbers for numbers, _ in frames]),
        "positions": np.concatenate([x - x.mean(0) for _, x in frames]).astype(np.float32),
        "ptr": np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        "source": np.array(source),
    }


def main() -> None:
    """Write the files named on the command line, or all."""
    parser = argparse.ArgumentParser(description="Write the geometries of the benchmarks.")
    made = {"drug_like": drug_like, "pcqm_like": pcqm_like, "aspirin": aspirin}
    names = [*made, "protein"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--protein-pdb", type=Path, help="4ZHL.cif of biopython's sources")
    arguments = parser.parse_args()
    if "protein" in arguments.only and arguments.protein_pdb is None:
        parser.error("protein: --protein-pdb is missing")
    RDLogger.DisableLog("rdApp.*")
    OUTPUT.mkdir(exist_ok=True)
    for name in arguments.only:
        frames, source = protein(arguments.protein_pdb) if name == "protein" else made[name]()
        output = OUTPUT / f"{name}.npz"
        np.savez_compressed(output, **pack(frames, source))
        sizes = [len(numbers) for numbers, _ in frames]
        print(
            f"{output.name}: {len(sizes)} molecules of {np.mean(sizes):.1f} atoms, {min(sizes)} "
            f"to {max(sizes)}; {output.stat().st_size} bytes"
        )


if __name__ == "__main__":
    main()
