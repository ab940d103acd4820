"""Our GeoT against numbers of the published one (tests/golden/README.md): attention, layer, model.

The golden numbers are float32 of TensorFlow. Errors are relative to the largest value of the
array, over real atoms only: a padded row of theirs holds what their network computes for it. Their
cotangents, and so all their gradients, are 0 in padded rows; ours must be 0 there exactly.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from geot_kernels import reference
from geot_model import published
from geot_model.model import QM9_ELEMENTS, GeoT, GeoTLayer

GOLDEN = Path(__file__).parent / "golden"
ATTENTIONS = ("attention_schnet", "attention_schnet_scale", "attention_schnet_scale_atom")
LAYERS = ("layer_sequential", "layer_parallel")
MODELS = ("model_sequential", "model_parallel_scale")
# The filters themselves, and tables of them: their slopes are good to 2e-5 of the largest one.
TOLERANCES = {"exact": 2e-5, "table": 1e-4}
BACKENDS = {"exact": "reference", "table": "eager"}

every_radial = pytest.mark.parametrize("radial", TOLERANCES)


class Golden:
    """One file: arrays as tensors, weights apart, and molecules as our network takes them."""

    def __init__(self, name):
        with np.load(GOLDEN / f"{name}.npz") as file:
            arrays = {key: file[key] for key in file}
        self.published = arrays
        self.weights = published.collect(arrays)
        numeric = {key: a for key, a in arrays.items() if a.dtype.kind in "fib"}
        self.arrays = {key: torch.from_numpy(a) for key, a in numeric.items()}
        self.numbers, self.mask = self.arrays["atomic_numbers"], ~self.arrays["padding"]
        self.positions = self.arrays["positions"].clone().requires_grad_()
        self.types = None
        if any("atom_embedding" in key for key in self.weights):
            self.types = (self.numbers[..., None] == torch.tensor(QM9_ELEMENTS)).int().argmax(-1)

    def layer(self, num_heads, radial, backend=None, prefix=""):
        """A layer of their sizes, with which of the options their arrays tell."""
        return GeoTLayer(
            64,
            num_heads,
            ffn_dim=96,
            parallel="layernorm2.gamma" not in self.weights,
            attention_scale=f"{prefix}attention_scale" in self.weights,
            num_types=None if self.types is None else len(QM9_ELEMENTS),
            radial=radial,
            backend=backend or BACKENDS[radial],
        )

    def relative_error(self, name, ours):
        """Largest error over real atoms, relative to the largest number, of array `name`."""
        theirs, rows = self.arrays[name], self.mask
        if name in ("attention", "grad_distance"):
            rows = rows[:, :, None] & rows[:, None, :]
        if name == "attention":
            theirs, ours = (x.movedim(1, -1) for x in (theirs, ours))
        if name == "prediction":
            rows = torch.ones(theirs.shape, dtype=torch.bool)
        assert ours.shape == theirs.shape
        if name != "output":
            assert not ours[~rows].any(), f"{name}: not 0 in padded rows"
        theirs, ours = theirs[rows].double(), ours[rows].detach().double()
        return float((ours - theirs).abs().max() / theirs.abs().max())


def attention(golden, num_heads, radial, backend=None):
    module = golden.layer(num_heads, radial, backend).attention
    module.load_state_dict(published.attention_state(golden.weights, QM9_ELEMENTS))
    return module


def layer(golden, num_heads, radial, backend=None):
    module = golden.layer(num_heads, radial, backend, "attention.")
    module.load_state_dict(published.layer_state(golden.weights, QM9_ELEMENTS))
    return module


def module_errors(golden, module):
    """Errors of output, attention weights and gradients of an attention or a layer."""
    x = golden.arrays["x"].clone().requires_grad_()
    out, weights = module(
        x, golden.positions, golden.mask, atom_types=golden.types, need_weights=True
    )
    loss = (out * golden.arrays["cotangent"]).sum()
    grad_x, grad_positions = torch.autograd.grad(loss, (x, golden.positions))
    ours = {
        "output": out,
        "attention": weights,
        "grad_x": grad_x,
        "grad_positions": grad_positions,
    }
    return {name: golden.relative_error(name, value) for name, value in ours.items()}


def model(golden, radial, backend=None):
    offset = float(golden.arrays["output_offset"])
    backend = backend or BACKENDS[radial]
    return GeoT.from_published(golden.published, 4, offset, radial, backend=backend)


def model_errors(golden, network):
    """Errors of the predictions and of the gradient of the first one."""
    prediction = network(golden.numbers, golden.positions, golden.mask)
    (grad,) = torch.autograd.grad(prediction[:, 0].sum(), golden.positions)
    ours = {"prediction": prediction, "grad_positions": grad}
    return {name: golden.relative_error(name, value) for name, value in ours.items()}


def distance_error(golden, monkeypatch, compute):
    """Error of the gradient with respect to the matrix of distances, by the reference formulas.

    In float64, where what is left is the error of the table (and of TensorFlow's float32).
    """
    positions = reference.zero_padding(golden.positions.detach().double(), golden.mask)
    dist = reference.distances(positions, positions).requires_grad_()
    monkeypatch.setattr(reference, "distances", lambda *_: dist)
    (grad,) = torch.autograd.grad(compute(), dist)
    return golden.relative_error("grad_distance", grad)


def assert_within(errors, radial):
    assert all(error < TOLERANCES[radial] for error in errors.values()), errors


@every_radial
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_the_published_one(name, radial):
    golden = Golden(name)
    heads = golden.arrays["attention"].shape[1]
    assert_within(module_errors(golden, attention(golden, heads, radial)), radial)


@every_radial
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_the_published_one(name, radial):
    golden = Golden(name)
    heads = golden.arrays["attention"].shape[1]
    assert_within(module_errors(golden, layer(golden, heads, radial)), radial)


@every_radial
@pytest.mark.parametrize("name", MODELS)
def test_model_is_the_published_one(name, radial):
    golden = Golden(name)
    assert_within(model_errors(golden, model(golden, radial)), radial)


@every_radial
@pytest.mark.parametrize("name", ATTENTIONS + LAYERS)
def test_gradient_of_distances_is_the_published_one(name, radial, monkeypatch):
    golden = Golden(name)
    make = attention if name in ATTENTIONS else layer
    module = make(golden, golden.arrays["attention"].shape[1], radial, "reference").double()
    x = golden.arrays["x"].double()

    def loss():
        out, _ = module(x, golden.positions, golden.mask, atom_types=golden.types)
        return (out * golden.arrays["cotangent"]).sum()

    error = distance_error(golden, monkeypatch, loss)
    assert_within({"grad_distance": error}, radial)


@every_radial
@pytest.mark.parametrize("name", MODELS)
def test_gradient_of_distances_in_the_model_is_the_published_one(name, radial, monkeypatch):
    golden = Golden(name)
    network = model(golden, radial, "reference").double()

    def loss():
        return network(golden.numbers, golden.positions, golden.mask)[:, 0].sum()

    error = distance_error(golden, monkeypatch, loss)
    assert_within({"grad_distance": error}, radial)


@pytest.mark.parametrize("name", ATTENTIONS + LAYERS + MODELS)
def test_published_cotangents_and_gradients_are_zero_in_padded_rows(name):
    golden = Golden(name)
    for key, array in golden.arrays.items():
        if key == "cotangent" or key.startswith("grad_"):
            assert not array[~golden.mask].any()
