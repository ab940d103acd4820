"""A trained model in a file: what it is made of, what it predicts, and on what it was trained."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import geot_kernels
from geot_kernels.radial import GaussianBasis

from .model import GeoT

_FORMAT = "geot-checkpoint"
_VERSION = 1
_EXPECTED = "a model written by 'geot train' (best.pt)"


class CheckpointError(ValueError):
    """A file is not a model that can be used; the message names it and says why."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained GeoT and what it takes to use it.

    Attributes:
        config: Arguments of `GeoT` but `num_targets`, `elements` and `backend`, as plain values;
            `basis` as those of `GaussianBasis` (`num_basis`, `r_max`, `gamma`), or None.
        state_dict: Parameters and buffers of the model.
        targets: Name to unit of what it predicts, in the order of its outputs.
        mean: `[T]` float64, in those units: prediction = output * std + mean.
        std: `[T]` float64.
        elements: Atomic numbers it was made for, sorted.
        max_atoms: Size of the largest molecule it was trained on.
        held_out: Names of the molecules that training and the choice of the model never saw.
        training: How it was trained (data, seed, epochs, ...), plain values to read.
    """

    config: dict[str, Any]
    state_dict: dict[str, Tensor]
    targets: dict[str, str]
    mean: Tensor
    std: Tensor
    elements: tuple[int, ...]
    max_atoms: int
    held_out: tuple[str, ...]
    training: dict[str, Any]

    def model(self, device: torch.device | str = "cpu") -> GeoT:
        """Make the model, in `eval()`, with the fastest kernels of the device.

        Raises:
            ValueError: `config` and `state_dict` contradict each other.
        """
        model = build_model(self.config, len(self.targets), self.elements, device=device)
        try:
            model.load_state_dict(self.state_dict)
        except RuntimeError as error:
            raise ValueError(f"the weights do not fit the model: {error}") from error
        return model.eval()

    def predict(self, model: GeoT, numbers: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Compute predictions in the units of `targets`.

        Args:
            model: What `model()` made.
            numbers: int [B, N], 0 for padding.
            positions: float32 [B, N, 3], Å.
            mask: bool [B, N], True = real atom.

        Returns:
            float64 [B, T], on the CPU; not differentiable.
        """
        device = next(model.parameters()).device
        with torch.no_grad():
            output: Tensor = model(numbers.to(device), positions.to(device), mask.to(device))
        return output.cpu().double() * self.std + self.mean


def build_model(
    config: dict[str, Any],
    num_targets: int,
    elements: tuple[int, ...],
    *,
    device: torch.device | str = "cpu",
) -> GeoT:
    """Make a GeoT from plain values (`Checkpoint.config`), with new weights."""
    options = dict(config)
    if (basis := options.pop("basis", None)) is not None:
        options["basis"] = GaussianBasis(**basis)
    backend = _backend(torch.device(device))
    return GeoT(num_targets, elements=elements, backend=backend, **options).to(device)


def _backend(device: torch.device) -> str | None:
    """None where fused kernels can run, else "eager", which then comes without a warning."""
    reasons = geot_kernels.available_backends(device)
    fused = any(reasons[name] is None for name in ("triton", "cuda", "cpu"))
    return None if fused else "eager"


def save_checkpoint(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write a checkpoint; an old file stays whole until the new one is.

    Args:
        checkpoint: What to write.
        path: The file.
    """
    content: dict[str, Any] = {"format": _FORMAT, "version": _VERSION}
    for field in fields(checkpoint):
        content[field.name] = getattr(checkpoint, field.name)
    state = {name: value.detach().cpu() for name, value in checkpoint.state_dict.items()}
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    torch.save(content | {"state_dict": state}, unfinished)
    os.replace(unfinished, path)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint, and nothing but tensors and plain values from it.

    Args:
        path: What `save_checkpoint` wrote.

    Raises:
        CheckpointError: There is no such file, or it is damaged, or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected {_EXPECTED}")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load itself does not look at the checksums
        if damaged is not None:
            raise zipfile.BadZipFile(damaged)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint can raise anything
        raise CheckpointError(f"{path}: damaged or no checkpoint; expected {_EXPECTED}") from error
    _check(path, content)
    checkpoint = Checkpoint(**{field.name: content[field.name] for field in fields(Checkpoint)})
    try:
        checkpoint.model()
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: a checkpoint that contradicts itself; expected {_EXPECTED}"
        ) from error
    return checkpoint


def _check(path: Path, content: Any) -> None:
    """Raise unless a file's content has the form of a checkpoint."""
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        what = "no model"
        if isinstance(content, dict) and "pytorch-lightning_version" in content:
            what = "a state of training, which only 'geot train --resume' reads"
        raise CheckpointError(f"{path}: {what}; expected {_EXPECTED}")
    if content.get("version") != _VERSION:
        raise CheckpointError(
            f"{path}: expected version {_VERSION} of the format, got {content.get('version')}"
        )
    kinds: dict[str, type] = {
        "config": dict,
        "state_dict": dict,
        "targets": dict,
        "mean": Tensor,
        "std": Tensor,
        "elements": tuple,
        "max_atoms": int,
        "held_out": tuple,
        "training": dict,
    }
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            got = type(content.get(name)).__name__
            raise CheckpointError(f"{path}: {name}: expected {kind.__name__}, got {got}")
    for name in ("mean", "std"):
        expected, shape = [len(content["targets"])], list(content[name].shape)
        if shape != expected:
            raise CheckpointError(f"{path}: {name}: expected {expected}, got {shape}")
