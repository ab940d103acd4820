"""Measurements, each one a command: `python -m bench.calls`."""
