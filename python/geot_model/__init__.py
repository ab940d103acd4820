"""GeoT on top of geot_kernels: molecules in, properties and attention maps out.

    from geot_model import explain_molecule, load_checkpoint, read_molecules

Names are imported when they are first used, so that `import geot_model` costs nothing and what
one does not use (RDKit, Lightning) need not be there.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
    from .dataset import Settings
    from .draw import atom_labels, draw_heatmap, draw_pairs, strongest_pairs
    from .explain import Explanation, aggregate_attention, explain_molecule
    from .model import GeoT
    from .molecule import perceive_bonds, read_molecules
    from .molecules import Molecule, Molecules, pad_batch
    from .qm9 import TARGETS, load_qm9, random_split
    from .training import train

_MODULES = {
    "checkpoint": ("Checkpoint", "CheckpointError", "load_checkpoint", "save_checkpoint"),
    "dataset": ("Settings",),
    "draw": ("atom_labels", "draw_heatmap", "draw_pairs", "strongest_pairs"),
    "explain": ("Explanation", "aggregate_attention", "explain_molecule"),
    "model": ("GeoT",),
    "molecule": ("perceive_bonds", "read_molecules"),
    "molecules": ("Molecule", "Molecules", "pad_batch"),
    "qm9": ("TARGETS", "load_qm9", "random_split"),
    "training": ("train",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "TARGETS",
    "Checkpoint",
    "CheckpointError",
    "Explanation",
    "GeoT",
    "Molecule",
    "Molecules",
    "Settings",
    "aggregate_attention",
    "atom_labels",
    "draw_heatmap",
    "draw_pairs",
    "explain_molecule",
    "load_checkpoint",
    "load_qm9",
    "pad_batch",
    "perceive_bonds",
    "random_split",
    "read_molecules",
    "save_checkpoint",
    "strongest_pairs",
    "train",
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
