"""Relevance of pairs of atoms: each method against its formula, deletion, batches, padding."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from geot_kernels.radial import GaussianBasis
from geot_model import relevance
from geot_model.draw import strongest_pairs
from geot_model.model import QM9_ELEMENTS, GeoT
from geot_model.molecules import Molecule, Molecules, pad_batch
from geot_model.readout import READOUTS
from geot_model.relevance import GRADIENT, METHODS, VALUE, WEIGHT

VARIANTS = {
    "sequential": {},
    "parallel": {"parallel": True},
    "bias and softmax": {"score": "bias", "normalizer": "softmax"},
    "bias and linear": {"score": "bias"},
    "filter and softmax": {"normalizer": "softmax", "attention_scale": True},
    "scale and atoms": {"attention_scale": True, "atom_embedding": True},
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
every_radial = pytest.mark.parametrize("radial", ["table", "exact"])
every_method = pytest.mark.parametrize("method", METHODS)
BUDGET = 1e-12  # of float64 numbers of size 1 to 10 after two layers, by sums in another order
STEP = 1e-5  # of central differences, whose error is about STEP² times a third derivative


def make(radial="table", **options):
    """A small network in float64 with all read-outs; biases that are 0 at first get values."""
    sizes = {"embed_dim": 8, "num_heads": 2, "num_layers": 2, "filter_hidden": 6, "ffn_dim": 10}
    sizes |= {"basis": GaussianBasis(12, 6.0), "r_max": 9.0, "num_knots": 64}
    backend = "eager" if radial == "table" else None
    options = {"backend": backend, "readout": READOUTS, "output_offset": 0.7} | sizes | options
    network = GeoT(len(options["readout"]), radial=radial, **options).double().eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.3, 0.3)
    return network


def molecule(n):
    numbers = torch.tensor(QM9_ELEMENTS)[torch.randint(5, (n,))]
    return Molecule(numbers.numpy(), (torch.randn(n, 3) * 1.5).numpy(), f"random {n}")


def molecules(*sizes):
    return Molecules.join([molecule(n) for n in sizes])


def assert_close(ours, theirs, budget=BUDGET):
    torch.testing.assert_close(ours, theirs, rtol=budget, atol=budget)


@every_radial
@every_variant
def test_the_explicit_pass_is_the_model(options, radial):
    network = make(radial, **options)
    batch = pad_batch(molecules(6, 3, 1, 0))
    one = relevance.forward(network, *batch)
    assert_close(one.outputs, network(*batch))
    assert_close(torch.stack(one.weights), network.attention_maps(*batch))


@every_radial
@every_variant
def test_what_stands_in_padded_rows_is_never_read(options, radial):
    network = make(radial, **options)
    numbers, positions, mask = pad_batch(molecules(6, 3, 0))
    dirty = positions.masked_fill(~mask[..., None], torch.nan)
    clean = relevance.forward(network, numbers, positions, mask)
    found = relevance.forward(network, numbers.masked_fill(~mask, 1000), dirty, mask)
    assert torch.equal(found.outputs, clean.outputs)
    assert torch.equal(torch.stack(found.weights), torch.stack(clean.weights))
    (gradient,) = torch.autograd.grad(found.outputs.sum(), found.weights[:1])
    assert gradient.isfinite().all()


@every_radial
def test_radial_functions_are_constants(radial):
    network = make(radial)
    relevance.forward(network, *pad_batch(molecules(4))).outputs.sum().backward()
    attention = network.layers[0].attention
    assert attention.in_proj.weight.grad.any()
    assert all(p.grad is None for p in attention.radial.parameters())


@every_variant
def test_weights_are_shares_of_rows(options):
    network = make(**options)
    one = molecules(5)
    (maps,) = relevance.relevance(network, one, WEIGHT)
    p = network.attention_maps(*pad_batch(one))[:, 0].abs()
    assert_close(maps, p / p.sum(-1, keepdim=True))
    assert_close(relevance.aggregate(maps, WEIGHT).sum(1), torch.ones(5).double())


def test_a_row_of_zeros_has_shares_of_zero():
    network = make(num_layers=1)
    with torch.no_grad():
        network.layers[0].attention.in_proj.weight[:8] = 0  # of the queries
        network.layers[0].attention.in_proj.bias[:8] = 0
    (maps,) = relevance.relevance(network, molecules(4), WEIGHT)
    assert torch.equal(maps, torch.zeros_like(maps))


@every_variant
def test_weight_times_value_is_the_length_of_what_is_added(options):
    network = make(**options)
    one = molecules(4)
    projected = []
    for layer in network.layers:
        keep = lambda module, inputs, out: projected.append(out[0])  # noqa: E731
        layer.attention.in_proj.register_forward_hook(keep)
    network(*pad_batch(one))
    p = network.attention_maps(*pad_batch(one))[:, 0]
    found = relevance.relevance(network, one, VALUE)[0]
    expected = torch.zeros(2, 2, 4, 4).double()
    for place in np.ndindex(*expected.shape):
        layer, head, i, j = place
        columns = slice(4 * head, 4 * head + 4)
        out = network.layers[layer].attention.out_proj.weight[:, columns]  # [E, D]
        v = projected[layer][j, 16:][columns]
        expected[place] = (p[layer, head, i, j] * (out @ v)).norm()
    assert_close(found, expected)
    assert found.min() > 0


def nudged(network, one, layer, places, step):
    """Outputs `[P, T]` of P copies: in copy p, weight `places[p]` of a layer moves by `step`."""
    calls = []

    def change(weights):
        calls.append(weights)
        if len(calls) - 1 != layer:
            return weights
        weights = weights.clone()
        for copy_, place in enumerate(places):
            weights[(copy_, *place)] += step
        return weights

    numbers, positions, mask = (x.expand(len(places), *x.shape[1:]) for x in pad_batch(one))
    return relevance.forward(network, numbers, positions, mask, change=change).outputs


@every_radial
@every_variant
def test_gradient_times_weight_is_what_central_differences_say(options, radial):
    network = make(radial, **options)
    one = molecules(3)
    p = network.attention_maps(*pad_batch(one))[:, 0]  # [L, H, n, n]
    places = list(np.ndindex(2, 3, 3))
    for target in range(len(READOUTS)):
        (found,) = relevance.relevance(network, one, GRADIENT, target)
        for layer in range(2):
            up, down = (nudged(network, one, layer, places, s) for s in (STEP, -STEP))
            slopes = ((up - down) / (2 * STEP))[:, target].view(2, 3, 3)
            assert_close(found[layer], p[layer] * slopes, 1e-6)
            assert found[layer].abs().max() > 1e-3


@every_variant
def test_aggregated_gradients_tell_what_the_output_loses_to_first_order(options):
    network = make(**options)
    one = molecules(3)
    (maps,) = relevance.relevance(network, one, GRADIENT, 1)
    numbers, positions, mask = (x.expand(9, *x.shape[1:]) for x in pad_batch(one))
    less = STEP * torch.eye(9).double().view(9, 1, 3, 3)  # one relation in each copy
    outputs = [
        relevance.forward(network, numbers, positions, mask, change=factor.mul).outputs[:, 1]
        for factor in (1 + less, 1 - less)
    ]
    loss = ((outputs[0] - outputs[1]) / (2 * STEP)).view(3, 3)
    assert_close(relevance.aggregate(maps, GRADIENT), loss, 1e-6)


@every_variant
def test_without_all_pairs_attention_is_the_bias_of_its_projection(options):
    network = make(**options)
    one = molecule(4)
    bare = copy.deepcopy(network)
    for layer in bare.layers:
        torch.nn.init.zeros_(layer.attention.out_proj.weight)
    batch = pad_batch(Molecules.join([one]))
    kept = torch.tensor([True, False]).view(2, 1, 1).expand(2, 4, 4)
    found = relevance.deleted(network, one, kept)
    assert_close(found, torch.cat([network(*batch), bare(*batch)]))
    assert (found[0] - found[1]).abs().min() > 1e-3


def test_deletion_takes_from_the_row_of_the_query():
    network = make(num_layers=1)
    one = molecule(4)
    rows = []
    network.readout.atomwise.register_forward_hook(lambda module, x, out: rows.append(x[0]))
    kept = torch.ones(2, 4, 4, dtype=torch.bool)
    kept[1, 2, 3] = False
    relevance.deleted(network, one, kept)
    changed = (rows[0][0] - rows[0][1]).abs().amax(-1)
    assert changed[2] > 1e-3 and changed.sum() == changed[2]


@every_variant
def test_deletion_of_weights_is_in_all_layers_and_heads(options):
    network = make(**options)
    one = molecule(4)
    kept = torch.rand(1, 4, 4) < 0.5
    seen = []

    def change(weights):
        seen.append(weights)
        weights = weights.clone()
        for i, j in (~kept[0]).nonzero().tolist():
            weights[:, :, i, j] = 0
        return weights

    batch = pad_batch(Molecules.join([one]))
    expected = relevance.forward(network, *batch, change=change).outputs
    assert len(seen) == 2 and not kept.all()
    assert_close(relevance.deleted(network, one, kept), expected)


def test_sets_of_pairs_do_not_depend_on_their_company(monkeypatch):
    network = make()
    one = molecule(5)
    kept = torch.rand(7, 5, 5) < 0.7
    together = relevance.deleted(network, one, kept)
    assert_close(together, torch.cat([relevance.deleted(network, one, k[None]) for k in kept]))
    monkeypatch.setattr(relevance, "_ENTRIES", 3 * 25 * 8)  # sets, pairs, width
    assert_close(relevance.deleted(network, one, kept), together)
    assert relevance.deleted(network, one, kept[:0]).shape == (0, 4)


@every_method
@every_variant
def test_maps_do_not_depend_on_company_and_padding(options, method, monkeypatch):
    network = make(**options)
    some = molecules(3, 6, 0, 1, 5, 3)
    together = relevance.relevance(network, some, method)
    for row, found in enumerate(together):
        (alone,) = relevance.relevance(network, some[row], method)
        assert_close(found, alone)
        n = len(some.molecule(row).numbers)
        assert found.shape == (2, 2, n, n) and not found.requires_grad
    monkeypatch.setattr(relevance, "_ENTRIES", 2 * 25 * 8)
    for few, many in zip(relevance.relevance(network, some, method), together, strict=True):
        assert_close(few, many)


def test_batches_hold_all_molecules_once_and_stay_within_bounds(monkeypatch):
    monkeypatch.setattr(relevance, "_ENTRIES", 500)
    sizes = np.random.RandomState(0).randint(0, 12, 50)
    batches = list(relevance._batches(sizes, 2))
    assert sorted(np.concatenate(batches)) == list(range(50))
    assert all(len(b) == 1 or len(b) * sizes[b].max() ** 2 * 2 <= 500 for b in batches)
    assert len(batches) < 40
    assert relevance.relevance(make(), molecules(), WEIGHT) == []


@every_method
@every_variant
def test_order_of_atoms_permutes_maps(options, method):
    network = make(**options)
    one = molecule(6)
    order = torch.randperm(6)
    moved = Molecule(one.numbers[order], one.positions[order], one.name)
    (maps,) = relevance.relevance(network, Molecules.join([one]), method)
    (other,) = relevance.relevance(network, Molecules.join([moved]), method)
    assert_close(other, maps[:, :, order][:, :, :, order])
    kept = torch.rand(3, 6, 6) < 0.5
    found = relevance.deleted(network, moved, kept[:, order][:, :, order])
    assert_close(found, relevance.deleted(network, one, kept))


def test_the_model_is_left_as_it_was_and_its_state_does_not_matter():
    network = make()
    some = molecules(4, 2)
    expected = relevance.relevance(network, some, GRADIENT)
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    others = {
        "frozen": copy.deepcopy(network).requires_grad_(False),
        "training": copy.deepcopy(network).train(),
        "read before": copy.deepcopy(network),
    }
    with torch.inference_mode():  # leaves tables made there
        others["read before"](*pad_batch(some))
    for other in others.values():
        for found, one in zip(relevance.relevance(other, some, GRADIENT), expected, strict=True):
            assert_close(found, one)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert_close(relevance.relevance(network, some, GRADIENT)[0], expected[0])
    assert others["training"].training and not network.training


def test_aggregates_are_sums_and_means_over_layers_and_heads():
    maps = torch.randn(3, 2, 4, 4)
    assert_close(relevance.aggregate(maps, WEIGHT), maps.flatten(0, 1).mean(0), 1e-6)
    for method in (VALUE, GRADIENT):
        assert_close(relevance.aggregate(maps, method), maps.flatten(0, 1).sum(0), 1e-6)


def test_strength_of_pairs_is_what_is_drawn():
    weights = torch.randn(5, 5).double()
    strength = relevance.pair_strength(weights)
    assert torch.equal(strength, strength.T)
    assert_close(strength.diagonal(), weights.diagonal().abs())
    pairs = strongest_pairs(weights, 10)
    assert len(pairs) == 10
    for i, j, value in pairs:
        assert strength[i, j].item() == pytest.approx(abs(value), abs=1e-15)


def test_targets_have_numbers_and_names():
    network = make(readout=("sum", "mean"))
    one = molecules(4)
    first, second = (relevance.relevance(network, one, GRADIENT, t)[0] for t in (0, 1))
    assert (first - second).abs().max() > 1e-3
    assert torch.equal(relevance.relevance(network, one, GRADIENT)[0], first)
    with pytest.raises(ValueError, match="target: expected a number: the model has no card"):
        relevance.relevance(network, one, GRADIENT, "gap")
    network.card = SimpleNamespace(scaler=SimpleNamespace(names=("gap", "mu")))
    assert torch.equal(relevance.relevance(network, one, GRADIENT, "mu")[0], second)
    with pytest.raises(ValueError, match="target: expected one of gap, mu, got 'homo'"):
        relevance.relevance(network, one, GRADIENT, "homo")
    for wrong in (2, -1):
        with pytest.raises(
            ValueError, match=f"target: expected a number from 0 to 1, got {wrong}"
        ):
            relevance.relevance(network, one, WEIGHT, wrong)


def test_what_is_wrong_is_named():
    network, one = make(), molecule(3)
    some = Molecules.join([one])
    with pytest.raises(ValueError, match="method: expected one of weight, weight x value, grad"):
        relevance.relevance(network, some, "saliency")
    with pytest.raises(ValueError, match="method: expected one of"):
        relevance.aggregate(torch.ones(1, 1, 2, 2), "saliency")
    with pytest.raises(TypeError, match=r"kept: expected bool, got torch\.float32"):
        relevance.deleted(network, one, torch.ones(1, 3, 3))
    for shape in ((3, 3), (1, 3, 4), (1, 4, 4)):
        with pytest.raises(ValueError, match=r"kept: expected \[S, n=3, n=3\], got"):
            relevance.deleted(network, one, torch.ones(shape, dtype=torch.bool))
    strange = Molecule(np.array([100]), np.zeros((1, 3), np.float32), "fermium")
    for call in (
        lambda: relevance.relevance(network, Molecules.join([strange]), WEIGHT),
        lambda: relevance.deleted(network, strange, torch.ones(1, 1, 1, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match="atomic_numbers: expected elements"):
            call()
