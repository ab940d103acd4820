"""The command `geot`, also `python -m geot_model`."""

from __future__ import annotations


def main() -> None:
    """Runs the command, or says what to install for it."""
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"geot: {error.name} is not installed; the command needs the extra 'model': "
            "pip install 'geot-kernels[model]'"
        ) from None
    app()


if __name__ == "__main__":
    main()
