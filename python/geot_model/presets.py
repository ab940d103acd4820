"""Sizes of GeoT, as arguments by name: `GeoT(1, **preset("tiny"))` but for the basis."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "embed_dim": 128,
        "num_heads": 8,
        "num_layers": 4,
        "attention_scale": True,
        "basis": {"num_basis": 64, "r_max": 10.0},
        "r_max": 13.0,
        "num_knots": 256,
    },
    "base": {
        "embed_dim": 512,
        "num_heads": 32,
        "num_layers": 8,
        "attention_scale": True,
        "basis": {"num_basis": 128, "r_max": 12.0},
        "r_max": 15.0,
        "num_knots": 512,
    },
    "published": {
        "embed_dim": 1024,
        "num_heads": 64,
        "num_layers": 8,
        "attention_scale": True,
        "basis": {"num_basis": 300, "r_max": 29.9, "gamma": 10.0},
        "r_max": 31.0,
        "num_knots": 2048,
    },
}
"""Preset to arguments of `GeoT`, plain values: of the basis, those of `GaussianBasis`.

"published" is the network of Kwak et al. (ACS Omega 2023) for QM9.
"""


def preset(name: str, **changes: Any) -> dict[str, Any]:
    """Gives the arguments of a preset, with changes.

    Raises:
        ValueError: There is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return {**PRESETS[name], **changes}
