"""Write the sample of QM9 that ships with geot_model: 3,000 molecules, drawn at random.

Run it with geot_model and qm9pack installed: `python scripts/make_qm9_sample.py [file]`. The file
is a stored `geot_model.molecules.Molecules`, exact to the last bit:

    numbers       uint8    [T]       atomic numbers
    positions     float32  [T, 3]    Å
    ptr           int64    [M+1]     molecule m is rows ptr[m]:ptr[m+1]
    index         int32    [M]       number of the molecule in QM9, from 1, rising
    smiles        str      [M]       as QM9 gives it
    targets       float64  [12, M]   in the order and units of the next two
    target_names  str      [12]
    target_units  str      [12]
    source        str                publication, package, licence
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from geot_model.molecules import Molecules
from geot_model.qm9 import TARGETS, load_qm9

COUNT = 3000
SEED = 9
OUTPUT = Path(__file__).parents[1] / "python" / "geot_model" / "qm9_sample.npz"
SOURCE = (
    "QM9: Ramakrishnan, Dral, Rupp, von Lilienfeld, Scientific Data 1, 140022 (2014), "
    "doi:10.1038/sdata.2014.22; packed by qm9pack 1.0.3 (MIT License, Copyright (c) 2024 Raghu)"
)


def draw_sample(everything: Molecules) -> dict[str, Any]:
    """Return the arrays of the file: `COUNT` molecules, all equally likely, in QM9's order."""
    # numpy froze the stream of RandomState; that of default_rng may change with a release.
    chosen = np.random.RandomState(SEED).permutation(len(everything))[:COUNT]
    sample = everything[np.sort(chosen)]
    return {
        "numbers": sample.numbers,
        "positions": sample.positions,
        "ptr": sample.ptr,
        "index": np.array([int(name.removeprefix("gdb_")) for name in sample.names], np.int32),
        "smiles": sample.smiles,
        "targets": np.stack([sample.targets[name] for name in TARGETS]),
        "target_names": np.array(list(TARGETS)),
        "target_units": np.array(list(TARGETS.values())),
        "source": np.array(SOURCE),
    }


def main() -> None:
    """Write the file named on the command line, or the one that ships."""
    parser = argparse.ArgumentParser(description="Write the sample of QM9 for geot_model.")
    parser.add_argument("output", nargs="?", type=Path, default=OUTPUT)
    output = parser.parse_args().output
    np.savez_compressed(output, **draw_sample(load_qm9(full=True)))
    print(f"{output.name}: {output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
