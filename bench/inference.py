"""Predictions for all of QM9: molecules a second, and where the time goes.

    python -m bench.inference [--preset tiny] [--molecules 130831]

All of `geot_model.prediction.predict` is timed, from packed arrays to values in units, with as
many threads as PyTorch takes; weights are random, which costs the same as others. Parts are
shares of the processor time of PyTorch's operators, by its profiler, in a run of some thousand
molecules; and making batches, as a share of all. Results go into `inference.csv`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from geot_kernels.radial import GaussianBasis
from geot_model import prediction
from geot_model.checkpoint import Card
from geot_model.model import GeoT
from geot_model.molecules import Molecules
from geot_model.prediction import predict
from geot_model.presets import PRESETS, preset
from geot_model.qm9 import load_qm9
from geot_model.targets import TargetScaler

from . import rows, timing

PROFILED = 5_000  # molecules
ROUNDS = 3
PARTS = {
    "attention": ("geot",),
    "matrix_products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear"),
    "normalization": ("aten::native_layer_norm", "aten::layer_norm"),
}
KEY = ("preset", "targets", "molecules", "device", "threads")
COLUMNS = (
    *KEY,
    *("seconds", "molecules_per_s", "reading_s", "share_of_batches"),
    *(f"share_of_{name}" for name in (*PARTS, "other_operators")),
    *("rounds", "other_cores"),
    *("machine", "processor", "python", "torch", "triton", "cuda", "geot_kernels", "commit"),
)


def network(name: str, molecules: Molecules) -> GeoT:
    """A network with random weights that can predict."""
    torch.manual_seed(0)
    config = preset(name)
    options: dict[str, Any] = {**config, "basis": GaussianBasis(**config["basis"])}
    model = GeoT(1, readout="mean", **options).eval()
    scaler = TargetScaler.fit(molecules, ("gap",), ("mean",), {"gap": "none"})
    model.card = Card(config, scaler, molecules.elements, molecules.max_atoms, (), {})
    return model


def parts(model: GeoT, molecules: Molecules) -> dict[str, float]:
    """Shares of the time of PyTorch's operators, by what they are for."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        predict(model, molecules)
    spent = dict.fromkeys((*PARTS, "other_operators"), 0.0)
    for event in profiled.key_averages():
        kinds = [n for n, names in PARTS.items() if event.key.startswith(names)]
        spent[kinds[0] if kinds else "other_operators"] += event.self_cpu_time_total
    whole = sum(spent.values())
    return {name: value / whole for name, value in spent.items()}


def packing(model: GeoT, molecules: Molecules) -> float:
    """Seconds that it takes to make the batches of a prediction."""
    spent = 0.0
    pack = prediction.pack

    def timed(*arguments: Any) -> Any:
        nonlocal spent
        start = time.perf_counter()
        batch = pack(*arguments)
        spent += time.perf_counter() - start
        return batch

    with mock.patch.object(prediction, "pack", timed):
        predict(model, molecules)
    return spent


def measure(name: str, count: int | None) -> dict[str, str]:
    """The row of a preset."""
    start = time.perf_counter()
    molecules = load_qm9(full=True)
    reading = time.perf_counter() - start
    molecules = molecules if count is None else molecules[:count]
    model = network(name, molecules)
    predict(model, molecules[:PROFILED])
    others = timing.watch()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        predict(model, molecules)
        seconds.append(time.perf_counter() - start)
    busy = others()
    batches = packing(model, molecules)
    spent = float(np.median(seconds))
    row: dict[str, Any] = {
        **{"preset": name, "targets": 1, "molecules": len(molecules)},
        **{"seconds": f"{spent:.4g}", "molecules_per_s": f"{len(molecules) / spent:.0f}"},
        **{"reading_s": f"{reading:.3g}", "share_of_batches": f"{batches / spent:.3f}"},
        **{f"share_of_{n}": f"{v:.3f}" for n, v in parts(model, molecules[:PROFILED]).items()},
        **{"rounds": ROUNDS, "other_cores": busy},
        **{k: v for k, v in rows.where("cpu").items() if k in COLUMNS},
    }
    return {name: str(value) for name, value in row.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and writes the row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--molecules", type=int, help="the first ones alone")
    asked = parser.parse_args(arguments)
    row = measure(asked.preset, asked.molecules)
    rows.Rows(rows.folder("cpu") / "inference.csv", COLUMNS, KEY).add([row])
    for name, value in row.items():
        print(f"{name:26}{value}")


if __name__ == "__main__":
    main()
