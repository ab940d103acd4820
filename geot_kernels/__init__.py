"""Fused geometry-biased attention for molecular models.

    O_i = Σ_j P_ij v_j,    S_ij = κ q_i·k_j + f_h(|x_i - x_j|)

with learned radial functions `f` of the distance, computed from positions, differentiable twice.
"""

from . import radial
from .attention import attention_weights, check_inputs, geo_attention
from .backends import available_backends
from .module import FusedGeoAttention
from .radial import GaussianSum
from .table import RadialTable, TableError, table_error, tabulate

__all__ = [
    "FusedGeoAttention",
    "GaussianSum",
    "RadialTable",
    "TableError",
    "attention_weights",
    "available_backends",
    "check_inputs",
    "geo_attention",
    "radial",
    "table_error",
    "tabulate",
]
__version__ = "0.1.0"
