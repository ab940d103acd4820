"""The command `geot`, also `python -m geot_model`."""

from __future__ import annotations

import os


def main() -> None:
    """Runs the command, or says what to install for it."""
    _wait_briefly()
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"geot: {error.name} is not installed; the command needs the extra 'model': "
            "pip install 'geot-kernels[model]'"
        ) from None
    app()


def _wait_briefly() -> None:
    """Has PyTorch's threads (libgomp's) wait for each other asleep, but for the first moment.

    Awake, as by default for milliseconds, they keep the cores from those they wait for wherever
    other processes run, and a step takes seconds. libgomp reads this when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


if __name__ == "__main__":
    main()
