"""A trained model in one file, `model.safetensors`: weights, and in the header, as JSON, a card.

The card says how the network is made, what it predicts, and on what it was trained. Nothing in
the file is code, so any file can be read safely. A digest over card and weights finds damage.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import geot_kernels
from geot_kernels.radial import GaussianBasis

from .model import GeoT
from .targets import TargetScaler

FILE = "model.safetensors"
"""Name of the file in the folder of a run."""

_FORMAT = "geot-model"
_VERSION = 1
_EXPECTED = f"a model written by 'geot train' ({FILE})"
_MOST_KNOTS = 2**16  # of a table, whose size no weight in the file tells


class CheckpointError(ValueError):
    """A file is not a model that can be used; the message names it and says why."""


@dataclass(frozen=True)
class Card:
    """What it takes to make a network and to use it, but its weights; plain values.

    Attributes:
        config: Arguments of `GeoT` but `num_targets`, `elements`, `readout` and `backend`; `basis`
            as those of `GaussianBasis` (`num_basis`, `r_max`, `gamma`), or None.
        scaler: Of the targets: their names, units and read-outs too.
        elements: Atomic numbers in the training molecules, sorted.
        max_atoms: Size of the largest training molecule.
        held_out: Names of the molecules that training and the choice of the model never saw.
        training: How it was trained (data, seed, epochs, ...), plain values to read.
    """

    config: dict[str, Any]
    scaler: TargetScaler
    elements: tuple[int, ...]
    max_atoms: int
    held_out: tuple[str, ...]
    training: dict[str, Any]


_CARD = TypeAdapter(Card)


def build_model(card: Card, *, device: torch.device | str = "cpu") -> GeoT:
    """Make the network of a card, with new weights and the fastest kernels of the device.

    Raises:
        TypeError: `card.config` has something else than arguments of `GeoT`.
        ValueError: A number or a name in it is wrong.
    """
    options = dict(card.config)
    exact = options.get("radial") == "exact"  # which only the reference can do
    if (basis := options.pop("basis", None)) is not None:
        options["basis"] = GaussianBasis(**basis)
    model = GeoT(
        len(card.scaler.names),
        elements=card.elements,
        readout=card.scaler.readouts,
        backend=None if exact else _backend(torch.device(device)),
        **options,
    )
    return model.to(device)


def _backend(device: torch.device) -> str | None:
    """None where fused kernels can run, else "eager", which then comes without a warning."""
    reasons = geot_kernels.available_backends(device)
    fused = any(reasons[name] is None for name in ("triton", "cuda", "cpu"))
    return None if fused else "eager"


def save_model(model: GeoT, card: Card, path: str | Path) -> None:
    """Write a model; an old file stays whole until the new one is.

    Args:
        model: What `build_model(card)` made; its weights are written in float32.
        card: What is written with them.
        path: The file.

    Raises:
        ValueError: A number in the card is not finite.
        OSError: The file cannot be written.
    """
    tensors = {name: _plain(value) for name, value in model.state_dict().items()}
    content = {"format": _FORMAT, "version": _VERSION, "card": asdict(card)}
    content["sha256"] = _digest(json.dumps(content["card"], allow_nan=False), tensors)
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        save_file(tensors, unfinished, {"geot": json.dumps(content)})
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _plain(value: Tensor) -> Tensor:
    """A copy on the CPU, in float32 if it is of floating-point numbers."""
    value = value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype)
    return value.clone(memory_format=torch.contiguous_format)


def load_model(path: str | Path, *, device: torch.device | str | None = None) -> GeoT:
    """Read a trained model.

    Args:
        path: What `save_model` wrote, or a folder with such a file called `model.safetensors`.
        device: Where to; None: a GPU if there is one.

    Returns:
        The model, in `eval()`, with its `card` and the fastest kernels of the device.

    Raises:
        CheckpointError: There is no such file, or it is damaged, or something else.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE
    metadata, tensors = _read(path)
    card = _card(path, metadata, tensors)
    _check_config(path, card.config, tensors)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.empty(0, device=device)  # raises where there is no such device
    try:
        model = build_model(card, device=device).float()
    except Exception as error:  # arguments of any type can raise anything
        raise _error(path, f"card.config: {error}") from error
    _check_weights(path, model.state_dict(), tensors)
    model.load_state_dict(tensors)
    model.card = card
    return model.eval()


def _error(path: Path, found: str) -> CheckpointError:
    return CheckpointError(f"{path}: {found}; expected {_EXPECTED}")


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a safetensors file."""
    if not path.is_file():
        raise _error(path, "no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # bytes that are no such file can raise anything
        raise _error(path, _what_is(path)) from error
    return metadata, tensors


def _what_is(path: Path) -> str:
    """What a file is that is not safetensors, by its first bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not start:
        return "an empty file"
    if start.startswith(b"PK\x03\x04"):
        return "a file of PyTorch, perhaps a state of training (read by 'geot train --resume')"
    if start.startswith(b"\x80"):
        return "a pickle, which is never opened"
    return "damaged, or no model"


def _card(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Card:
    """The card in the metadata of a file, checked."""
    try:
        content = json.loads(metadata.get("geot", ""))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise _error(path, "damaged, or a safetensors file of something else")
    version = content.get("version")
    if isinstance(version, int) and version > _VERSION:
        raise CheckpointError(
            f"{path}: version {version} of the format, which a newer geot-kernels wrote; "
            f"expected at most {_VERSION}"
        )
    try:
        text = json.dumps(content.get("card"), allow_nan=False)
    except (ValueError, RecursionError):
        raise _error(path, "card: numbers that are not finite") from None
    if content.get("sha256") != _digest(text, tensors):
        raise _error(path, "damaged: it is not what was written")
    if version != _VERSION:
        raise _error(path, f"version {version!r} of the format")
    try:
        # As JSON, where tuples are lists and keys are text.
        return _CARD.validate_json(text, strict=True)
    except ValidationError as error:
        raise _error(path, _one_line(error)) from None


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a card and of tensors with their names, types and shapes."""
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _one_line(error: ValidationError, where: str = "card") -> str:
    """The first thing that is wrong in a card, or in a part of it."""
    problem = error.errors()[0]
    where = ".".join(map(str, (where, *problem["loc"])))
    if problem["type"] == "value_error":
        return f"{where}.{problem['ctx']['error']}"
    if problem["type"] == "missing":
        return f"{where}: missing"
    what = problem["msg"].replace("Input should be", "not")
    return f"{where}: {what}: {problem['input']!r:.40}"


def _check_config(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise where an argument has the wrong type, or a size is larger than the weights have."""
    for name, kind in get_type_hints(GeoT.__init__).items():
        if name in config and name != "basis":
            try:
                TypeAdapter(kind).validate_python(config[name], strict=True)
            except ValidationError as error:
                raise _error(path, _one_line(error, f"card.config.{name}")) from None
    # Before memory is taken for them.
    layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    limits = {"num_layers": len(layers), "num_knots": _MOST_KNOTS}
    basis = config.get("basis")
    for name, value in {**config, **(basis if isinstance(basis, dict) else {})}.items():
        most = limits.get(name, largest)
        if isinstance(value, int) and value > most:
            raise _error(path, f"card.config.{name}: {value}, but the file's is at most {most}")


def _check_weights(
    path: Path, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Raise unless the tensors can be the weights of the card's network."""
    for name in sorted(expected.keys() | tensors.keys()):
        want, got = (_described(state.get(name)) for state in (expected, tensors))
        if want != got:
            raise _error(path, f"{name}: {got} where the card asks for {want}")
        if tensors[name].is_floating_point() and not tensors[name].isfinite().all():
            raise _error(path, f"{name}: numbers that are not finite")
    if not torch.equal(expected["type_of"].cpu(), tensors["type_of"]):
        raise _error(path, "type_of: not the elements of the card")


def _described(value: Tensor | None) -> str:
    return "none" if value is None else f"{value.dtype} {list(value.shape)}"
