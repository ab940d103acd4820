"""Measurements, each one a command: `pytest bench/ --benchmark`, `python -m bench.gpu`."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("geot_model") is None:  # a checkout that nothing was installed from
    sys.path.append(str(Path(__file__).parents[1] / "python"))
