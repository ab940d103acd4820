"""GeoT: invariances, padding, elements it does not have, states, published arrays, tracing."""

import copy
import io
import itertools

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from geot_kernels import reference
from geot_kernels.radial import GaussianBasis
from geot_model.model import QM9_ELEMENTS, GeoT, GeoTLayer

VARIANTS = {
    "sequential": {},
    "parallel": {"parallel": True},
    "bias and softmax": {"score": "bias", "normalizer": "softmax"},
    "mean of atoms": {"readout": "mean"},
    "scale and atoms": {"attention_scale": True, "atom_embedding": True},
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
every_radial = pytest.mark.parametrize("radial", ["table", "exact"])
BUDGET = 1e-12  # of float64 outputs of size 1 to 10 after two layers, by sums in another order


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(num_targets=2, radial="table", **options):
    """A small network in float64; biases that are 0 at first get values."""
    sizes = {"embed_dim": 8, "num_heads": 2, "num_layers": 2, "filter_hidden": 6, "ffn_dim": 10}
    sizes |= {"basis": GaussianBasis(12, 6.0), "r_max": 9.0, "num_knots": 64}
    backend = "eager" if radial == "table" else None
    network = GeoT(num_targets, radial=radial, **({"backend": backend} | sizes | options)).double()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.3, 0.3)
    return network


def molecules(sizes=(7, 4, 1, 0), num_atoms=7):
    """Random molecules: atomic numbers, positions, mask."""
    mask = torch.arange(num_atoms) < torch.tensor(sizes)[:, None]
    numbers = torch.tensor(QM9_ELEMENTS)[torch.randint(5, mask.shape)] * mask
    return numbers, torch.randn(*mask.shape, 3, dtype=torch.float64) * 1.5, mask


def gradients(network, numbers, positions, mask):
    """Of a force loss: of the positions, and of all parameters."""
    positions = positions.clone().requires_grad_()
    out = network(numbers, positions, mask)
    (force,) = torch.autograd.grad(out[:, 0].sum(), positions, create_graph=True)
    loss = force.masked_fill(~mask[..., None], 0).square().sum() + out.square().sum()
    return torch.autograd.grad(loss, (positions, *network.parameters()), allow_unused=True)


def assert_close(ours, theirs, budget=BUDGET):
    assert ours.shape == theirs.shape
    if ours.numel():
        ours, theirs = ours.detach(), theirs.detach()
        worst = float((ours - theirs).abs().max())
        assert worst <= budget * max(1.0, float(theirs.abs().max())), worst


@every_radial
@every_variant
def test_what_stands_in_padded_rows_is_never_read(options, radial):
    network = make(radial=radial, **options)
    numbers, positions, mask = molecules()
    clean = positions.masked_fill(~mask[..., None], 0.0)
    dirty_numbers = numbers.masked_fill(~mask, 1000)
    dirty_numbers[1, -1] = -1
    dirty = positions.masked_fill(~mask[..., None], torch.nan)
    dirty[1, -1] = torch.inf
    arguments = (numbers, clean, mask), (dirty_numbers, dirty, mask)
    outputs, maps, grads = (
        [f(*a) for a in arguments]
        for f in (network, network.attention_maps, lambda *a: gradients(network, *a))
    )
    assert torch.equal(*outputs)
    assert torch.equal(*maps)
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)
        assert first.isfinite().all()


@every_radial
@every_variant
def test_padding_does_not_change_a_molecule(options, radial):
    network = make(radial=radial, **options)
    numbers, positions, mask = molecules((7, 4, 1))
    together = network(numbers, positions, mask)
    maps = network.attention_maps(numbers, positions, mask)
    for b, size in enumerate(mask.sum(1).tolist()):
        alone = (numbers[b : b + 1, :size], positions[b : b + 1, :size])
        assert_close(together[b : b + 1], network(*alone))
        assert_close(maps[:, b : b + 1, :, :size, :size], network.attention_maps(*alone))


def test_a_bias_has_one_number_a_head_and_any_sign():
    radial = make(score="bias", normalizer="softmax").layers[0].attention.radial
    assert radial(torch.rand(5, dtype=torch.float64)).shape == (5, 2)
    assert radial.final_activation is None
    assert make().layers[0].attention.radial.final_activation is not None


@every_radial
@every_variant
def test_packed_molecules_give_what_padded_ones_do(options, radial):
    network = make(radial=radial, **options)
    numbers, positions, mask = molecules((7, 4, 2, 0))
    ptr = torch.tensor([0, *mask.sum(1).cumsum(0).tolist()])
    flat = numbers[mask], positions[mask]
    for most in (None, 7):
        packed = {"ptr": ptr, "max_atoms": most}
        out = network(*flat, **packed)
        torch.testing.assert_close(out, network(numbers, positions, mask), rtol=0, atol=BUDGET)
        maps = network.attention_maps(*flat, **packed)
        expected = network.attention_maps(numbers, positions, mask)
        torch.testing.assert_close(maps, expected, rtol=0, atol=BUDGET)
    with pytest.raises(ValueError, match="mask: expected None with ptr"):
        network(*flat, mask, ptr=ptr)
    with pytest.raises(ValueError, match=r"atomic_numbers: expected \[T\], got \[4, 7\]"):
        network(numbers, positions, ptr=ptr)


@every_variant
def test_padding_may_be_anywhere(options):
    network = make(**options)
    numbers, positions, mask = molecules()
    order = torch.randperm(numbers.shape[1])
    moved = (numbers[:, order], positions[:, order], mask[:, order])
    assert_close(network(*moved), network(numbers, positions, mask))


@every_radial
@every_variant
def test_order_of_atoms_and_place_in_space_do_not_matter(options, radial):
    network = make(radial=radial, **options)
    numbers, positions, mask = molecules((7, 7, 7))
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    order = torch.randperm(7)
    moved = positions[:, order] @ rotation + torch.tensor([1.0, -2.0, 0.5])
    expected = network(numbers, positions, mask)
    assert_close(network(numbers[:, order], moved, mask), expected)
    maps = network.attention_maps(numbers, positions, mask)[..., order, :][..., order]
    assert_close(network.attention_maps(numbers[:, order], moved, mask), maps)


@every_variant
def test_geometry_and_elements_matter(options):
    network = make(**options)
    numbers, positions, mask = molecules((7, 7))
    expected = network(numbers, positions, mask)
    assert (network(numbers, positions * 1.01, mask) - expected).abs().min() > 1e-6
    exchanged = numbers.clone()
    exchanged[:, 0] = torch.where(numbers[:, 0] == 6, 7, 6)
    assert (network(exchanged, positions, mask) - expected).abs().min() > 1e-6


def test_filter_tells_elements_apart_only_with_the_atom_embedding():
    numbers, positions, mask = molecules((7,))
    for with_embedding in (False, True):
        network = make(atom_embedding=with_embedding)
        with torch.no_grad():
            network.embedding.weight[:] = network.embedding.weight[6]
        expected = network(numbers, positions, mask)
        other = network(numbers.masked_fill(mask, 6), positions, mask)
        assert bool((other - expected).abs().max() > 1e-6) == with_embedding


def test_without_a_mask_atoms_are_the_positive_numbers():
    network = make(atom_embedding=True)
    numbers, positions, mask = molecules()
    expected = network(numbers, positions, mask)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(network(numbers.to(dtype), positions), expected)
    assert torch.equal(network(numbers.masked_fill(~mask, -1), positions), expected)


@pytest.mark.parametrize(
    ("radial", "shape"),
    list(itertools.product(("table", "exact"), ((3, 5), (2, 1), (0, 5), (2, 0)))),
)
def test_batches_without_molecules_and_molecules_without_atoms(radial, shape):
    network = make(radial=radial, output_offset=-2.0, attention_scale=True)
    numbers = torch.zeros(shape, dtype=torch.int64)
    positions = torch.full((*shape, 3), torch.nan, dtype=torch.float64)
    out = network(numbers, positions)
    empty_sum = torch.zeros(shape[0], 8, dtype=torch.float64)
    assert torch.equal(out, network.readout.pooled(empty_sum) - 2.0)
    out.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    maps = network.attention_maps(numbers, positions)
    assert maps.shape == (2, shape[0], 2, shape[1], shape[1])
    assert not maps.any()


@every_radial
@every_variant
def test_attention_maps_are_the_weights_that_multiply_the_values(options, radial):
    network = make(radial=radial, **options)
    numbers, positions, mask = molecules()
    seen = []
    for layer in network.layers:
        layer.attention.register_forward_hook(lambda *args: seen.append(args))
    maps = network.attention_maps(numbers, positions, mask)
    real = mask[:, None, :, None] & mask[:, None, None, :]
    assert maps.shape == (2, 4, 2, 7, 7)
    assert not maps[:, ~real.expand(4, 2, 7, 7)].any()
    for weights, (attention, (x, *_), (out, _)) in zip(maps, seen, strict=True):
        v = attention.in_proj(x).chunk(3, -1)[2].unflatten(-1, (2, 4))
        mixed = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(-2)
        expected = attention.out_proj(mixed).masked_fill(~mask[..., None], 0)
        assert_close(out, expected)


@pytest.mark.parametrize("options", [{}, {"parallel": True}], ids=["sequential", "parallel"])
def test_layer_neither_reads_padded_rows_nor_lets_them_reach_a_gradient(options):
    layer = GeoTLayer(8, 2, num_knots=32, basis=GaussianBasis(8, 6.0), backend="eager", **options)
    _, positions, mask = molecules()
    positions = positions.float()
    x = torch.randn(*mask.shape, 8)
    grads = []
    for rubbish in (0.0, torch.nan):
        x_dirty = x.masked_fill(~mask[..., None], rubbish).requires_grad_()
        y, _ = layer(x_dirty, positions, mask)
        loss = y[mask].square().sum()
        grads.append(torch.autograd.grad(loss, (x_dirty, *layer.parameters())))
    for clean, dirty in zip(*grads, strict=True):
        assert torch.equal(clean, dirty)


@every_variant
def test_table_and_exact_filters_agree(options):
    table = make(**options, num_knots=1500)
    exact = make(radial="exact", **options)
    exact.load_state_dict(table.state_dict())
    batch = molecules()
    # f of the table is good to 1e-9, f' to 1e-6, f'' to 1e-3: 8 Gaussians an Å are smooth.
    assert_close(table(*batch), exact(*batch), 1e-7)
    assert_close(table.attention_maps(*batch), exact.attention_maps(*batch), 1e-7)
    for ours, theirs in zip(gradients(table, *batch), gradients(exact, *batch), strict=True):
        assert_close(ours, theirs, 1e-4)


@every_radial
@every_variant
def test_derivatives_of_both_orders_are_right(options, radial):
    network = make(1, radial, **options)
    numbers, positions, mask = molecules((3, 2), 3)
    positions = positions.masked_fill(~mask[..., None], 0.0).requires_grad_()

    def energy(positions):
        return network(numbers, positions, mask)

    assert gradcheck(energy, positions, fast_mode=True)
    assert gradgradcheck(energy, positions, fast_mode=True)


# Elements.


@every_radial
@pytest.mark.parametrize(
    ("atoms", "number"), [(True, 17), (True, 0), (False, 0), (False, 100), (False, -1)]
)
def test_element_that_the_model_does_not_have_is_refused_by_name(atoms, number, radial):
    network = make(radial=radial, atom_embedding=atoms)
    numbers, positions, mask = molecules()
    numbers[0, 2] = number
    known = "1, 6, 7, 8, 9" if atoms else "1 to 99"
    for call in (network, network.attention_maps):
        with pytest.raises(ValueError, match=rf"elements .*\({known}\), got {number}$"):
            call(numbers, positions, mask)


def test_every_element_of_the_embedding_is_accepted_without_the_atom_embedding():
    numbers = torch.arange(1, 100)[None]
    positions = torch.randn(1, 99, 3, dtype=torch.float64)
    assert make()(numbers, positions).isfinite().all()


def test_unknown_element_makes_nan_of_its_molecule_where_values_cannot_be_read():
    network = make(atom_embedding=True)
    numbers, positions, mask = molecules((4, 4, 4), 4)
    traced = make_fx(lambda *batch: network(*batch))(numbers, positions, mask)
    assert torch.equal(traced(numbers, positions, mask), network(numbers, positions, mask))
    for number in (17, 0, -1, 1000):
        numbers[1, 2] = number
        out = traced(numbers, positions, mask)
        assert out.isnan().all(1).tolist() == [False, True, False]


def test_order_of_elements_does_not_matter_with_published_arrays():
    arrays = published_arrays(atoms=True)
    numbers, positions, mask = molecules()
    options = {"num_heads": 2, "backend": "eager"}
    first = GeoT.from_published(arrays, **options)
    second = GeoT.from_published(arrays, **options, elements=(17, 9, 8, 7, 6, 1))
    assert second.elements == (17, 9, 8, 7, 6, 1)
    positions = positions.float()
    ours, theirs = (m(numbers, positions, mask) for m in (first, second))
    assert_close(ours, theirs, 1e-5)
    rows = torch.from_numpy(arrays["layer1.attention.atom_embedding"])
    assert torch.equal(second.layers[1].attention.radial.type_embedding.weight[0], rows[17])


# States and beginnings.


@every_variant
def test_state_survives_a_file(options):
    network = make(output_offset=3.5, elements=(9, 8, 7, 6, 1), **options)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    other = make(**options)
    batch = molecules()
    assert not torch.equal(other(*batch), network(*batch))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.elements == network.elements
    assert torch.equal(other(*batch), network(*batch))
    assert torch.equal(copy.deepcopy(network)(*batch), network(*batch))


def test_layers_do_not_share_a_basis_that_is_trained():
    basis = GaussianBasis(8, 6.0, trainable=True)
    network = make(basis=basis)
    centers = [layer.attention.radial.basis.centers for layer in network.layers]
    assert len({id(x) for x in (*centers, basis.centers)}) == 3


def test_begins_with_glorot_kernels_and_no_biases():
    network = GeoT(3, embed_dim=48, num_heads=3, attention_scale=True, backend="eager")
    attention = network.layers[1].attention
    kernels = [*attention.in_proj.weight.chunk(3), attention.radial.layers[0].weight]
    kernels += [attention.out_proj.weight, network.layers[1].ffn[0].weight]
    for kernel in kernels:
        bound = (6 / sum(kernel.shape)) ** 0.5
        assert 0.95 * bound < kernel.abs().max() <= bound
    biases = [p for name, p in network.named_parameters() if name.endswith("bias")]
    assert biases
    assert not any(bias.any() for bias in biases)
    assert attention.attention_scale.item() == pytest.approx(0.1)
    assert 0.95 < network.embedding.weight.std() < 1.05


def test_offset_is_added_to_all_outputs():
    network, batch = make(), molecules()
    expected = network(*batch) - 6.5
    network.output_offset.fill_(-6.5)
    assert torch.equal(network(*batch), expected)


# Published arrays.


def published_arrays(layers=2, width=8, parallel=False, scale=False, atoms=False):
    """Random arrays of a published network with `mlp_1` wider than the network."""
    random = np.random.default_rng(0)

    def array(*shape):
        return random.normal(0, 0.3, shape).astype(np.float32)

    def dense(name, inputs, outputs):
        return {f"{name}.kernel": array(inputs, outputs), f"{name}.bias": array(outputs)}

    arrays = {"embedding": array(100, width)}
    arrays |= dense("mlp_1", width, 20) | dense("output_dense", 20, 3)
    for index in range(layers):
        layer = {}
        for name in ("query", "key", "value", "out"):
            layer |= dense(f"attention.{name}", width, width)
        layer |= dense("attention.filter_1", 364 if atoms else 300, 12)
        layer |= dense("attention.filter_2", 12, width)
        layer |= dense("ffn_1", width, 10) | dense("ffn_2", 10, width)
        for norm in ("layernorm1",) if parallel else ("layernorm1", "layernorm2"):
            layer |= {f"{norm}.gamma": array(width), f"{norm}.beta": array(width)}
        if scale:
            layer["attention.attention_scale"] = array()
        if atoms:
            layer["attention.atom_embedding"] = array(200, 64)
        arrays |= {f"layer{index}.{name}": value for name, value in layer.items()}
    return arrays


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("atoms", [False, True])
def test_published_network_follows_from_its_arrays(parallel, scale, atoms):
    arrays = published_arrays(3, parallel=parallel, scale=scale, atoms=atoms)
    network = GeoT.from_published(arrays, 4, -1.5, "exact")
    assert len(network.layers) == 3
    assert (network.layers[0].norm2 is None) == parallel
    assert network.layers[0].norm1.eps == 1e-6
    assert (network.layers[0].attention.attention_scale is not None) == scale
    assert network.atom_embedding == atoms
    numbers, positions, mask = molecules()
    positions = positions.float()
    ours = network(numbers, positions, mask)
    theirs = formulas({k: torch.from_numpy(v) for k, v in arrays.items()}, numbers, positions, 4)
    assert_close(ours, theirs - 1.5, 1e-5)


def formulas(w, z, positions, heads):
    """The published network, as tests/golden/README.md writes it."""

    def dense(name, x):
        return x @ w[f"{name}.kernel"] + w[f"{name}.bias"]

    def ssp(x):
        return torch.nn.functional.softplus(x) - np.log(2)

    def norm(name, x):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        return (x - mean) / (var + 1e-6).sqrt() * w[f"{name}.gamma"] + w[f"{name}.beta"]

    def ffn(name, x):
        return dense(f"{name}.ffn_2", torch.nn.functional.elu(dense(f"{name}.ffn_1", x)))

    def attention(name, x):
        e = (-10 * (dist[..., None] - 0.1 * torch.arange(300)) ** 2).exp()
        if f"{name}.atom_embedding" in w:
            a = w[f"{name}.atom_embedding"][z]
            e = torch.cat((e, a[:, :, None] + a[:, None]), -1)
        f = ssp(dense(f"{name}.filter_2", ssp(dense(f"{name}.filter_1", e))))
        q, k, v = (dense(f"{name}.{n}", x) for n in ("query", "key", "value"))
        products = (q[:, :, None] * k[:, None] * f).unflatten(-1, (heads, -1))
        scores = products.sum(-1) / (q.shape[-1] // heads) ** 0.5  # [B, I, J, H]
        scores = scores * real[:, None, :, None]
        if f"{name}.attention_scale" in w:
            s, count = w[f"{name}.attention_scale"], real.sum(1).clamp(min=1)[:, None, None, None]
            mean = scores.sum(2, keepdim=True) / count
            scores = ((scores - mean) * (1 + s) + mean) * real[:, None, :, None]
        mixed = torch.einsum("bijh,bjhd->bihd", scores, v.unflatten(-1, (heads, -1)))
        return dense(f"{name}.out", mixed.flatten(-2))

    real = (z > 0).float()
    dist = reference.distances(positions, positions)
    x, layer = w["embedding"][z], 0
    while f"layer{layer}.ffn_1.kernel" in w:
        name = f"layer{layer}"
        y = x + attention(f"{name}.attention", x)
        if f"{name}.layernorm2.gamma" in w:
            y = norm(f"{name}.layernorm1", y)
            x = norm(f"{name}.layernorm2", y + ffn(name, y))
        else:
            x = norm(f"{name}.layernorm1", y + ffn(name, x))
        layer += 1
    pooled = (x * real[..., None]).sum(1)
    return dense("output_dense", torch.nn.functional.elu(dense("mlp_1", pooled)))


def test_published_arrays_may_be_numpy_torch_prefixed_or_a_file(tmp_path):
    arrays = published_arrays()
    batch = molecules()
    batch = (batch[0], batch[1].float(), batch[2])

    def predict(weights):
        return GeoT.from_published(weights, 2, backend="eager")(*batch)

    expected = predict(arrays)
    assert torch.equal(predict({k: torch.from_numpy(v) for k, v in arrays.items()}), expected)
    others = {"mol_ids": np.array(["a", "b"]), "prediction": np.zeros(2)}
    np.savez(tmp_path / "a.npz", **{f"w:{k}": v for k, v in arrays.items()}, **others)
    with np.load(tmp_path / "a.npz") as file:
        assert torch.equal(predict(file), expected)


@pytest.mark.parametrize(
    "name",
    [
        "embedding",
        "mlp_1.bias",
        "output_dense.bias",
        "layer0.attention.key.bias",
        "layer1.attention.filter_1.kernel",
        "layer1.attention.atom_embedding",
        "layer0.attention.attention_scale",
        "layer1.layernorm2.beta",
        "layer0.ffn_2.kernel",
    ],
)
def test_array_that_is_missing_or_misshapen_is_named(name):
    arrays = published_arrays(scale=True, atoms=True)
    array = arrays.pop(name)
    with pytest.raises(ValueError, match=rf"^{name}: expected an array of this name, got none"):
        GeoT.from_published(arrays, 2)
    for wrong in (array[None], np.repeat(np.atleast_1d(array), 2, -1)):
        arrays[name] = wrong
        shape = ", ".join(map(str, wrong.shape))
        with pytest.raises(ValueError, match=rf"^{name}: expected \[.*, got \[{shape}\]"):
            GeoT.from_published(arrays, 2)
    arrays[name] = array.astype(np.int32)
    with pytest.raises(ValueError, match=rf"^{name}: expected floating-point .*, got .*int32"):
        GeoT.from_published(arrays, 2)


@pytest.mark.parametrize("name", ["layer0.attention.filter_3.kernel", "epoch", "layer1.extra"])
def test_array_that_is_unexpected_is_named(name):
    arrays = published_arrays() | {name: np.zeros((3, 4))}
    with pytest.raises(ValueError, match=rf"^{name}: expected no array .*, got \[3, 4\]"):
        GeoT.from_published(arrays, 2)


def test_published_arrays_keep_no_memory_of_ours():
    arrays = {k: torch.from_numpy(v) for k, v in published_arrays().items()}
    network = GeoT.from_published(arrays, 2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert arrays["embedding"].any()
    assert arrays["layer0.ffn_1.kernel"].any()


def test_atom_embedding_without_a_row_for_an_element_is_named():
    arrays = published_arrays(layers=1, atoms=True)
    arrays["layer0.attention.atom_embedding"] = np.zeros((9, 64), dtype=np.float32)
    with pytest.raises(ValueError, match=r"atom_embedding: expected a row for element 9"):
        GeoT.from_published(arrays, 2)


# Arguments.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_targets": 0}, "num_targets: expected at least 1, got 0"),
        ({"num_layers": 0}, "num_layers: expected at least 1, got 0"),
        ({"readout_dim": 0}, "readout_dim: expected at least 1, got 0"),
        ({"readout": "max"}, "readout: expected one of pooled, sum, mean, dipole, got 'max'"),
        ({"readout": ("sum",)}, "readout: expected one or 2 names, got 1"),
        ({"ffn_dim": 0}, "ffn_dim: expected at least 1, got 0"),
        ({"num_heads": 3}, "embed_dim: expected a multiple of num_heads=3, got 8"),
        ({"elements": ()}, "elements: expected different atomic numbers"),
        ({"elements": (1, 6, 1)}, "elements: .* got \\(1, 6, 1\\)"),
        ({"elements": (1, 100)}, "elements: .* from 1 to 99, got \\(1, 100\\)"),
        ({"radial": "spline"}, "radial: expected 'table' or 'exact', got 'spline'"),
        ({"radial": "exact", "backend": "eager"}, "backend: expected None or 'reference'"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_wrong_inputs_are_named():
    network = make()
    numbers, positions, mask = molecules()
    wrong = [
        ((numbers.double(), positions, mask), "atomic_numbers: expected integers, got torch.fl"),
        ((mask, positions, mask), "atomic_numbers: expected integers, got torch.bool"),
        ((numbers[0], positions, mask), r"atomic_numbers: expected \[B, N\], got \[7\]"),
        ((numbers, positions[:, 1:], mask), r"positions: expected \[B=4, N=7, 3\], got \[4, 6, 3"),
        ((numbers, positions, mask[1:]), r"mask: expected \[B=4, N=7\], got \[3, 7\]"),
        ((numbers, positions, numbers), "mask: expected bool .* = real atom, got torch.int64"),
        ((numbers, positions.to("meta"), mask), "positions: expected on cpu .*, got on meta"),
        ((numbers.tolist(), positions, mask), "atomic_numbers: expected a tensor, got list"),
    ]
    for arguments, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            network(*arguments)


# Tracing.


@pytest.mark.slow
def test_compiles_as_one_graph():
    network = make(attention_scale=True, atom_embedding=True, num_layers=1).float()
    numbers, positions, mask = molecules()
    positions = positions.float().requires_grad_()
    compiled = torch.compile(network, fullgraph=True)
    outputs, grads = [], []
    for call in (network, compiled):
        out = call(numbers, positions, mask)
        outputs.append(out)
        loss = out[:, 0].sum()
        grads.append(torch.autograd.grad(loss, (positions, *network.parameters())))
    assert_close(outputs[1], outputs[0], 1e-5)
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs, 1e-5)
    numbers[0, 0] = 17
    assert compiled(numbers, positions, mask).isnan().any(1).tolist() == [True] + [False] * 3
