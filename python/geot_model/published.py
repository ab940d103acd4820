"""The arrays of the published GeoT, a TensorFlow network: names, shapes, and their place in ours.

A published array is called, say, `layer0.attention.query.kernel`; a kernel is `[in, out]`, where
PyTorch's weight is `[out, in]`. Sizes and variants follow from names and shapes: no `layernorm2`
means feed-forward beside the attention; `attention_scale` and `atom_embedding` are there or not,
in all layers alike.

Source: https://github.com/oleneyl/geometry-aware-transformer (Kwak et al., ACS Omega 2023,
arXiv 2106.15516).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

NUM_ROWS = 100  # of the embedding of the nodes: atomic numbers 0 (padding) to 99
NUM_GAUSSIANS = 300
TYPE_DIM = 64  # width of the atom embedding in the filters

# A shape is a string with a letter for each axis: E width of the network, F of the feed-forward,
# W of the filters' hidden layer, M of the read-out's, T targets; and numbers that are fixed:
_FIXED = {"Z": NUM_ROWS, "G": NUM_GAUSSIANS, "A": TYPE_DIM, "P": NUM_GAUSSIANS + TYPE_DIM}
_NETWORK = {
    "embedding": "ZE",
    "mlp_1.kernel": "EM",
    "mlp_1.bias": "M",
    "output_dense.kernel": "MT",
    "output_dense.bias": "T",
}
_LAYER = {
    **{f"attention.{name}.kernel": "EE" for name in ("query", "key", "value", "out")},
    **{f"attention.{name}.bias": "E" for name in ("query", "key", "value", "out")},
    "attention.filter_1.kernel": "GW",
    "attention.filter_1.bias": "W",
    "attention.filter_2.kernel": "WE",
    "attention.filter_2.bias": "E",
    "ffn_1.kernel": "EF",
    "ffn_1.bias": "F",
    "ffn_2.kernel": "FE",
    "ffn_2.bias": "E",
    "layernorm1.gamma": "E",
    "layernorm1.beta": "E",
}
_SEQUENTIAL = {"layernorm2.gamma": "E", "layernorm2.beta": "E"}
_SCALE = {"attention.attention_scale": ""}
_ATOMS = {"attention.atom_embedding": "RA", "attention.filter_1.kernel": "PW"}


def collect(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Makes tensors of published arrays.

    Args:
        weights: Names to arrays, numpy or torch, such as an opened npz. Where some names begin
            with `w:`, only those are weights.

    Returns:
        Names, without `w:`, to tensors on the CPU.

    Raises:
        ValueError: An array has no floating-point numbers.
    """
    prefix = "w:" if any(name.startswith("w:") for name in weights) else ""
    return {
        name.removeprefix(prefix): _tensor(name, weights[name])
        for name in weights
        if name.startswith(prefix)
    }


def _tensor(name: str, array: Any) -> Tensor:
    if isinstance(array, Tensor):
        tensor = array.detach().cpu()
    else:
        array = np.array(array)
        if array.dtype.kind not in "f":
            raise ValueError(f"{name}: expected floating-point numbers, got {array.dtype}")
        tensor = torch.from_numpy(array)
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected floating-point numbers, got {tensor.dtype}")
    return tensor


def read_settings(arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    """Reads off the published arrays what network they make, and checks them.

    Args:
        arrays: What `collect` made.

    Returns:
        Arguments of `GeoT`: `num_targets`, `embed_dim`, `num_layers`, `ffn_dim`, `readout_dim`,
        `filter_hidden`, `parallel`, `attention_scale`, `atom_embedding`.

    Raises:
        ValueError: An array is missing, unexpected or of the wrong shape; it names the array.
    """
    indices = [int(match[1]) for name in arrays if (match := re.match(r"layer(\d+)\.", name))]
    num_layers = 1 + max(indices, default=0)
    optional = {
        "sequential": any(".layernorm2." in name for name in arrays),
        "scale": any(name.endswith(".attention_scale") for name in arrays),
        "atoms": any(name.endswith(".atom_embedding") for name in arrays),
    }
    layer = dict(_LAYER)
    for there, names in zip(optional.values(), (_SEQUENTIAL, _SCALE, _ATOMS), strict=True):
        layer |= names if there else {}
    shapes = dict(_NETWORK)
    for index in range(num_layers):
        shapes |= {f"layer{index}.{name}": shape for name, shape in layer.items()}
    sizes = _sizes(arrays, shapes)
    return {
        "num_targets": sizes["T"],
        "embed_dim": sizes["E"],
        "num_layers": num_layers,
        "ffn_dim": sizes["F"],
        "readout_dim": sizes["M"],
        "filter_hidden": sizes["W"],
        "parallel": not optional["sequential"],
        "attention_scale": optional["scale"],
        "atom_embedding": optional["atoms"],
    }


def _sizes(arrays: Mapping[str, Tensor], shapes: Mapping[str, str]) -> dict[str, int]:
    """Finds the size of each letter, the one that most arrays have, and checks all arrays."""
    for name in shapes:
        if name not in arrays:
            raise ValueError(f"{name}: expected an array of this name, got none")
    for name in arrays:
        if name not in shapes:
            raise ValueError(f"{name}: expected no array of this name, got {_shape(arrays[name])}")
    votes: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for name, letters in shapes.items():
        if arrays[name].ndim == len(letters):
            for letter, size in zip(letters, arrays[name].shape, strict=True):
                votes[letter][size] += 1
    sizes = {letter: count.most_common(1)[0][0] for letter, count in votes.items()} | _FIXED
    for name, letters in shapes.items():
        expected = [sizes.get(letter, letter) for letter in letters]
        if _shape(arrays[name]) != expected:
            written = ", ".join(map(str, expected))
            raise ValueError(f"{name}: expected [{written}], got {_shape(arrays[name])}")
    return sizes


def _shape(array: Tensor) -> list[int]:
    return list(array.shape)


def network_state(arrays: Mapping[str, Tensor], elements: Sequence[int]) -> dict[str, Tensor]:
    """Makes the parameters of `GeoT` from published arrays that `read_settings` has checked.

    Args:
        arrays: What `collect` made.
        elements: Atomic numbers, in the order of the model's atom types; they choose rows of the
            atom embedding.

    Returns:
        Names to tensors for `load_state_dict`.

    Raises:
        ValueError: The atom embedding has no row for an element.
    """
    state = {"embedding.weight": arrays["embedding"]}
    for ours, name in (("readout.pooled.0", "mlp_1"), ("readout.pooled.2", "output_dense")):
        state |= _dense(arrays, name, ours)
    layers = {int(name[5 : name.index(".")]) for name in arrays if name.startswith("layer")}
    for index in layers:
        layer = layer_state(_below(arrays, f"layer{index}."), elements)
        state |= {f"layers.{index}.{name}": value for name, value in layer.items()}
    return state


def layer_state(arrays: Mapping[str, Tensor], elements: Sequence[int]) -> dict[str, Tensor]:
    """Makes the parameters of a `GeoTLayer`; names without `layer0.`, else as `network_state`."""
    attention = attention_state(_below(arrays, "attention."), elements)
    state = {f"attention.{name}": value for name, value in attention.items()}
    for ours, name in (("ffn.0", "ffn_1"), ("ffn.2", "ffn_2")):
        state |= _dense(arrays, name, ours)
    for norm in ("1", "2"):
        if f"layernorm{norm}.gamma" in arrays:
            state[f"norm{norm}.weight"] = arrays[f"layernorm{norm}.gamma"]
            state[f"norm{norm}.bias"] = arrays[f"layernorm{norm}.beta"]
    return state


def attention_state(arrays: Mapping[str, Tensor], elements: Sequence[int]) -> dict[str, Tensor]:
    """Makes the parameters of `FusedGeoAttention`; names without `layer0.attention.`."""
    three = ("query", "key", "value")
    state = {
        "in_proj.weight": torch.cat([arrays[f"{name}.kernel"].T for name in three]),
        "in_proj.bias": torch.cat([arrays[f"{name}.bias"] for name in three]),
        **_dense(arrays, "out", "out_proj"),
        **_dense(arrays, "filter_1", "radial.layers.0"),
        **_dense(arrays, "filter_2", "radial.layers.1"),
    }
    if "attention_scale" in arrays:
        state["attention_scale"] = arrays["attention_scale"]
    if "atom_embedding" in arrays:
        rows = arrays["atom_embedding"]
        if max(elements) >= len(rows):
            raise ValueError(
                f"atom_embedding: expected a row for element {max(elements)}, got {_shape(rows)}"
            )
        state["radial.type_embedding.weight"] = rows[list(elements)]
    return state


def _dense(arrays: Mapping[str, Tensor], name: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.weight": arrays[f"{name}.kernel"].T, f"{ours}.bias": arrays[f"{name}.bias"]}


def _below(arrays: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
