"""GeoT on top of geot_kernels: molecules in, properties and attention maps out.

    from geot_model import GeoT, read

    model = GeoT.load("geot-run")
    print(model.predict(read("molecules.sdf").molecules).values)

Names are imported when they are first used, so that `import geot_model` costs nothing and what
one does not use (RDKit, Lightning) need not be there.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batches import Batch, Batches
    from .bonds import perceive_bonds
    from .checkpoint import Card, CheckpointError, load_model, save_model
    from .draw import atom_labels, draw_heatmap, draw_pairs, strongest_pairs
    from .model import GeoT
    from .molecules import Molecule, Molecules, pad_batch
    from .prediction import Prediction, predict, write_csv
    from .presets import PRESETS, preset
    from .qm9 import TARGETS, load_qm9
    from .readers import Data, read
    from .results import TargetError, measure
    from .settings import Settings, SettingsError
    from .splits import Split, split
    from .targets import TargetScaler
    from .training import Outcome, load_split, train

_MODULES = {
    "batches": ("Batch", "Batches"),
    "bonds": ("perceive_bonds",),
    "checkpoint": ("Card", "CheckpointError", "load_model", "save_model"),
    "draw": ("atom_labels", "draw_heatmap", "draw_pairs", "strongest_pairs"),
    "model": ("GeoT",),
    "molecules": ("Molecule", "Molecules", "pad_batch"),
    "prediction": ("Prediction", "predict", "write_csv"),
    "presets": ("PRESETS", "preset"),
    "qm9": ("TARGETS", "load_qm9"),
    "readers": ("Data", "read"),
    "results": ("TargetError", "measure"),
    "settings": ("Settings", "SettingsError"),
    "splits": ("Split", "split"),
    "targets": ("TargetScaler",),
    "training": ("Outcome", "load_split", "train"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "PRESETS",
    "TARGETS",
    "Batch",
    "Batches",
    "Card",
    "CheckpointError",
    "Data",
    "GeoT",
    "Molecule",
    "Molecules",
    "Outcome",
    "Prediction",
    "Settings",
    "SettingsError",
    "Split",
    "TargetError",
    "TargetScaler",
    "atom_labels",
    "draw_heatmap",
    "draw_pairs",
    "load_model",
    "load_qm9",
    "load_split",
    "measure",
    "pad_batch",
    "perceive_bonds",
    "predict",
    "preset",
    "read",
    "save_model",
    "split",
    "strongest_pairs",
    "train",
    "write_csv",
]


def __getattr__(name: str) -> Any:
    """Import the module that has the name."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
