"""GeoT beside SchNet: the same molecules of QM9, seconds and, within a fifth, parameters.

    python -m bench.message_passing                          # every target, both networks
    python -m bench.message_passing --target gap --network geot --seconds 900

Both learn as `bench.learning` says, one thread each, from the same 10,000 molecules in the same
batches. The target is that of the molecule, of U0 less the published energies of its atoms,
divided by its spread. Read-outs are the usual ones: a sum over atoms for U0, a mean for HOMO and
gap, charges for the dipole. SchNet is torch_geometric's, with its defaults (6 interactions of 128
channels, 50 Gaussians, 10 Å) on all pairs of atoms, which are found by array operations.

Results go into `message_passing.csv`, and their curves into `message_passing_curves.csv`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geot_kernels.radial import GaussianBasis
from geot_model.batches import Batch
from geot_model.model import GeoT
from geot_model.molecules import Molecules
from geot_model.presets import preset
from geot_model.qm9 import load_qm9
from geot_model.targets import TargetScaler

from . import learning, rows

GEOT, SCHNET = "GeoT", "SchNet"
READOUTS = {"gap": "mean", "homo": "mean", "U0": "sum", "mu": "dipole"}
REFERENCES = {"U0": "published"}
LEARNING_RATE = 1e-3  # of both; with twice that, GeoT leaves its course in some trainings
TRAIN, VALIDATION, TEST = 10_000, 1_000, 10_000
SEED = 42  # of the published split, whose first molecules these are
CUTOFF = 10.0
KEY = ("target", "network", "train_molecules", "budget_s", "device", "threads")
WHERE = (
    *("machine", "processor", "python", "torch", "torch_geometric", "triton", "cuda"),
    *("geot_kernels", "commit"),
)
COLUMNS = (
    *KEY,
    *("unit", "mae", "parameters", "learning_rate", "steps", "epochs"),
    *("train_molecules_per_s", "inference_molecules_per_s", "test_molecules"),
    *WHERE,
)
CURVE_KEY = (*KEY, "point")
CURVE_COLUMNS = (*CURVE_KEY, "seconds", "steps", "validation_mae", "unit", *WHERE)


def split(molecules: Molecules) -> tuple[Molecules, Molecules, Molecules]:
    """The first molecules of the published permutation of QM9."""
    order = np.random.RandomState(SEED).permutation(len(molecules))
    ends = np.cumsum([TRAIN, VALIDATION, TEST])
    train, validation, test = np.split(order[: ends[-1]], ends[:-1])
    return molecules[train], molecules[validation], molecules[test]


def tiny(readout: str, **changes: Any) -> GeoT:
    """The preset "tiny" for one target, with changes."""
    options = preset("tiny", readout=readout, **changes)
    return GeoT(1, **{**options, "basis": GaussianBasis(**options["basis"])})


def geot(target: str) -> nn.Module:
    """The preset "tiny"."""
    return tiny(READOUTS[target])


def call_geot(network: nn.Module, batch: Batch) -> Tensor:
    """Outputs of GeoT, `[B, 1]`."""
    out: Tensor = network(batch.numbers, batch.positions, ptr=batch.ptr, max_atoms=batch.max_atoms)
    return out


def schnet(target: str) -> nn.Module:
    """torch_geometric's, with its defaults; sum, mean or dipole as for GeoT."""
    from torch_geometric.nn import SchNet

    readout = "mean" if READOUTS[target] == "mean" else "add"
    dipole = READOUTS[target] == "dipole"
    graph = all_pairs
    network = SchNet(cutoff=CUTOFF, interaction_graph=graph, readout=readout, dipole=dipole)
    return network.float()  # ase's masses are float64


def call_schnet(network: nn.Module, batch: Batch) -> Tensor:
    """Outputs of SchNet, `[B, 1]`."""
    counts = batch.ptr.diff()
    molecule = torch.arange(len(counts)).repeat_interleave(counts)
    out: Tensor = network(batch.numbers, batch.positions, molecule)
    return out


def all_pairs(positions: Tensor, molecule: Tensor) -> tuple[Tensor, Tensor]:
    """Edges `[2, pairs]` between atoms of a molecule closer than `CUTOFF`, and their lengths."""
    counts = torch.bincount(molecule)
    first = counts.cumsum(0) - counts  # atom of each molecule
    others = counts[molecule]
    source = torch.arange(len(molecule)).repeat_interleave(others)
    offset = torch.arange(len(source)) - (others.cumsum(0) - others)[source]
    target = first[molecule][source] + offset
    length = (positions[source] - positions[target]).norm(dim=-1)
    near = (source != target) & (length < CUTOFF)
    return torch.stack((source[near], target[near])), length[near]


NETWORKS = {GEOT: (geot, call_geot), SCHNET: (schnet, call_schnet)}


def measure(
    target: str, name: str, parts: tuple[Molecules, Molecules, Molecules], seconds: float
) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Trains a network and measures it: its row, and those of its curve."""
    torch.manual_seed(0)
    make, call = NETWORKS[name]
    train, validation, test = parts
    scaler = TargetScaler.fit(
        train, (target,), (READOUTS[target],), {target: REFERENCES.get(target, "none")}
    )
    network = make(target)
    found = learning.learn(
        network,
        call,
        scaler,
        train,
        validation,
        seconds=seconds,
        learning_rate=LEARNING_RATE,
        say=lambda line: print(f"{target}, {name}: {line}", flush=True),
    )
    start = time.process_time()
    error = learning.mean_absolute_error(found.network, call, scaler, test)
    inference = len(test) / (time.process_time() - start)
    key: dict[str, Any] = {
        **{"target": target, "network": name, "train_molecules": len(train)},
        **{"budget_s": f"{seconds:.0f}", "unit": train.units[target]},
        **{k: v for k, v in _where().items() if k in COLUMNS},
    }
    row = {
        **key,
        **{"mae": f"{error:.5g}", "learning_rate": f"{LEARNING_RATE:g}"},
        "parameters": sum(p.numel() for p in network.parameters()),
        **{"steps": found.steps, "epochs": f"{found.molecules / len(train):.1f}"},
        "train_molecules_per_s": f"{found.molecules / found.seconds:.0f}",
        "inference_molecules_per_s": f"{inference:.0f}",
        "test_molecules": len(test),
    }
    print(f"{target}, {name}: {error:.5g} {train.units[target]}", flush=True)
    curve = [
        {
            **key,
            **{"point": n, "seconds": f"{spent:.1f}", "steps": steps},
            "validation_mae": f"{value:.5g}",
        }
        for n, (spent, steps, value) in enumerate(found.curve, start=1)
    ]
    return _written(row), [_written(one) for one in curve]


def _written(row: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in row.items()}


def _where() -> dict[str, str]:
    import torch_geometric

    return {**rows.where("cpu"), "torch_geometric": torch_geometric.__version__}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is asked for, and writes rows as soon as they are there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", nargs="+", choices=READOUTS, default=list(READOUTS))
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seconds", type=float, default=900.0, help="of the processor, each")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    parts = split(load_qm9(full=True))
    for target in asked.target:
        for name in asked.network:
            row, curve = measure(target, name, parts, asked.seconds)
            folder = rows.folder("cpu")
            rows.Rows(folder / "message_passing.csv", COLUMNS, KEY).add([row])
            path = folder / "message_passing_curves.csv"
            rows.Rows(path, CURVE_COLUMNS, CURVE_KEY).add(curve)


if __name__ == "__main__":
    main()
