"""Write `examples/gaps.csv`, the data of docs/tutorial.md: SMILES and gaps of molecules of QM9.

Run it with geot_model and qm9pack installed: `python scripts/make_example.py`.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from geot_model.qm9 import HARTREE, qm9pack_folder

COUNT = 2000
SEED = 7
OUTPUT = Path(__file__).parents[1] / "examples" / "gaps.csv"


def main() -> None:
    """Write molecules drawn at random, in QM9's order."""
    found = []
    for path in sorted(qm9pack_folder().glob("qm9_part*.csv")):
        with path.open(newline="", encoding="ascii") as file:
            found += [
                (f"gdb_{row['Index']}", row["SMILES"], float(row["HOMO_LUMO_gap_au"]) * HARTREE)
                for row in csv.DictReader(file)
            ]
    chosen = np.sort(np.random.RandomState(SEED).permutation(len(found))[:COUNT])
    OUTPUT.parent.mkdir(exist_ok=True)
    with OUTPUT.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["name", "smiles", "gap [eV]"])
        writer.writerows(
            (name, smiles, f"{gap:.3f}") for name, smiles, gap in map(found.__getitem__, chosen)
        )


if __name__ == "__main__":
    main()
