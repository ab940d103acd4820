"""`FusedGeoAttention`: what it computes, its states, its kept table, and its place in PyTorch."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from geot_kernels import FusedGeoAttention, GaussianSum, geo_attention
from geot_kernels.radial import GaussianBasis, RadialMLP
from geot_kernels.table import RadialTable

B, N, E, H = 3, 7, 12, 3
T = 3  # atom types
LENGTHS = (7, 1, 4)
SETTINGS = [("bias", "softmax"), ("bias", "linear"), ("filter", "softmax"), ("filter", "linear")]
EPS_32 = torch.finfo(torch.float32).eps
# Of float64 results of size 1 that pass through sums of some 50 terms, in another order.
BUDGET = 1e-13


class Counted(nn.Module):
    """A radial network that counts its calls."""

    def __init__(self, num_channels=H, **options):
        super().__init__()
        self.network = RadialMLP(GaussianBasis(6, 4.0), 5, num_channels, **options)
        self.takes_types = self.network.takes_types
        self.calls = 0

    def forward(self, dist, *types):
        self.calls += 1
        return self.network(dist, *types)


def no_radial(dist):
    return dist.new_zeros(len(dist), H)


def make(score="bias", normalizer="softmax", *, dtype=torch.float64, **options):
    """A small layer with a radial function that matters; `eager` runs everywhere."""
    if "radial" not in options:
        channels = H if score == "bias" else E
        options["radial"] = Counted(channels).to(dtype)
    options = {"r_max": 5.0, "num_knots": 64, "backend": "eager"} | options
    layer = FusedGeoAttention(E, H, score=score, normalizer=normalizer, dtype=dtype, **options)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name == "attention_scale":
                p.fill_(0.7)
            elif name == "affine":
                p.add_(0.3 * torch.rand_like(p))
    return layer


def inputs(dtype=torch.float64):
    x = torch.randn(B, N, E, dtype=dtype)
    positions = 2 * torch.randn(B, N, 3, dtype=torch.promote_types(dtype, torch.float32))
    mask = torch.arange(N) < torch.tensor(LENGTHS)[:, None]
    return x, positions, mask


def atom_types():
    return torch.randint(T, (B, N))


def change(module):
    """Changes parameters in place, as an optimizer does."""
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5)


def difference(a, b):
    return float((a - b).detach().abs().max())


# What it computes.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_from_mha_computes_what_mha_does_without_radial_function(bias, masked):
    mha = nn.MultiheadAttention(E, H, bias=bias, batch_first=True, dtype=torch.float64)
    if bias:
        nn.init.normal_(mha.in_proj_bias)
        nn.init.normal_(mha.out_proj.bias)
    layer = FusedGeoAttention.from_mha(mha, radial=no_radial, backend="eager")
    x, positions, mask = inputs()
    mask = mask if masked else None
    padding = None if mask is None else ~mask  # MHA's mask says True for padding
    expected, expected_weights = mha(x, x, x, key_padding_mask=padding, average_attn_weights=False)
    out, weights = layer(x, positions, mask, need_weights=True)
    real = torch.ones(B, N, dtype=torch.bool) if mask is None else mask
    assert difference(out[real], expected[real]) < BUDGET
    assert torch.equal(out[~real], torch.zeros_like(out[~real]))
    rows = real[:, None, :, None].expand_as(weights)
    assert difference(weights[rows], expected_weights[rows]) < BUDGET
    # The mask the other way round gives something else.
    if masked:
        wrong, _ = mha(x, x, x, key_padding_mask=mask)
        assert difference(out[1:][real[1:]], wrong[1:][real[1:]].nan_to_num()) > 1e-3


def test_from_mha_copies_and_shares_nothing():
    mha = nn.MultiheadAttention(E, H, batch_first=True).eval()
    layer = FusedGeoAttention.from_mha(mha, r_max=3.0, num_knots=32)
    assert not layer.training
    assert layer.r_max == 3.0
    before = layer.in_proj.weight.detach().clone()
    change(mha)
    assert torch.equal(layer.in_proj.weight, before)
    assert layer.in_proj.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_from_mha_keeps_the_dtype(dtype):
    mha = nn.MultiheadAttention(E, H, batch_first=True, dtype=dtype)
    layer = FusedGeoAttention.from_mha(mha)
    assert {p.dtype for p in layer.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"batch_first": False}, "batch_first=False"),
        ({"kdim": 5}, "kdim or vdim"),
        ({"vdim": 5}, "kdim or vdim"),
        ({"add_bias_kv": True}, "add_bias_kv"),
        ({"add_zero_attn": True}, "add_zero_attn"),
        ({"dropout": 0.1}, "dropout=0.1"),
    ],
)
def test_from_mha_refuses_what_the_layer_does_not_do(options, got):
    mha = nn.MultiheadAttention(E, H, **{"batch_first": True} | options)
    with pytest.raises(ValueError, match=f"^mha: expected plain self-attention.*got {got}$"):
        FusedGeoAttention.from_mha(mha)


def test_from_mha_takes_an_mha_with_dropout_when_told_to_leave_it_out():
    mha = nn.MultiheadAttention(E, H, batch_first=True, dropout=0.1)
    FusedGeoAttention.from_mha(mha, dropout=0.0)


@pytest.mark.parametrize(("score", "normalizer"), SETTINGS)
def test_layer_is_projections_around_geo_attention(score, normalizer):
    layer = make(score, normalizer, attention_scale=True)
    x, positions, mask = inputs()
    q, k, v = (y.unflatten(-1, (H, E // H)) for y in layer.in_proj(x).chunk(3, -1))
    out = geo_attention(
        q,
        k,
        v,
        positions,
        layer._tabulate(64),
        mask=mask,
        score=score,
        normalizer=normalizer,
        attention_scale=layer.attention_scale,
        backend="reference",
    )
    expected = layer.out_proj(out.flatten(-2)).masked_fill(~mask[..., None], 0)
    assert difference(layer(x, positions, mask)[0], expected) < 10 * BUDGET


def test_default_radial_network_makes_a_difference():
    layer = FusedGeoAttention(E, H, backend="eager")
    x, positions, mask = inputs(torch.float32)
    near = layer(x, positions, mask)[0]
    far = layer(x, 2 * positions, mask)[0]
    assert difference(near, far) > 1e-4
    near.sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


@pytest.mark.parametrize(("score", "normalizer"), SETTINGS)
@pytest.mark.parametrize("packed", [False, True])
def test_weights_times_values_give_the_output(score, normalizer, packed):
    layer = make(score, normalizer, attention_scale=True)
    x, positions, mask = inputs()
    v = layer.in_proj(x)[..., 2 * E :].unflatten(-1, (H, E // H))
    options, args = {}, (x, positions, mask)
    if packed:
        options, args = {"ptr": ptr(), "max_atoms": N}, (x[mask], positions[mask])
    out, weights = layer(*args, **options, need_weights=True)
    mixed = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(-2)
    expected = layer.out_proj(mixed)
    expected = expected[mask] if packed else expected.masked_fill(~mask[..., None], 0)
    assert difference(out, expected) < 10 * BUDGET
    padding = ~(mask[:, None, :, None] & mask[:, None, None, :]).expand_as(weights)
    assert torch.equal(weights[padding], torch.zeros_like(weights[padding]))


def test_weights_come_only_on_request_and_averaged_on_request():
    layer = make()
    x, positions, mask = inputs()
    out, nothing = layer(x, positions, mask)
    assert nothing is None
    same, weights = layer(x, positions, mask, need_weights=True)
    _, mean = layer(x, positions, mask, need_weights=True, average_attn_weights=True)
    assert torch.equal(out, same)
    assert weights.shape == (B, H, N, N)
    assert mean.shape == (B, N, N)
    assert difference(mean, weights.mean(1)) < BUDGET
    _, none = layer(x, positions, mask, average_attn_weights=True)
    assert none is None
    packed = (x[mask], positions[mask])
    _, weights = layer(*packed, ptr=ptr(), need_weights=True)
    assert weights.shape == (B, H, max(LENGTHS), max(LENGTHS))
    _, mean = layer(*packed, ptr=ptr(), max_atoms=9, need_weights=True, average_attn_weights=True)
    assert mean.shape == (B, 9, 9)


def ptr(dtype=torch.int64):
    return torch.tensor((0, *LENGTHS), dtype=dtype).cumsum(0, dtype=dtype)


@pytest.mark.parametrize(("score", "normalizer"), SETTINGS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_equals_padded(score, normalizer, dtype):
    layer = make(score, normalizer, attention_scale=True, num_types=T)
    x, positions, mask = inputs()
    types = atom_types()
    out, _ = layer(x, positions, mask, atom_types=types)
    expected = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
    packed = {"ptr": ptr(dtype), "max_atoms": N, "atom_types": types[mask]}
    rows, _ = layer(x[mask], positions[mask], **packed)
    grads = torch.autograd.grad(rows.square().sum(), list(layer.parameters()))
    assert difference(rows, out[mask]) < 10 * BUDGET
    for a, b in zip(grads, expected, strict=True):
        assert difference(a, b) < 100 * BUDGET * max(1, float(b.abs().max()))


@pytest.mark.parametrize(("score", "normalizer"), SETTINGS)
@pytest.mark.parametrize("need_weights", [False, True])
def test_garbage_in_padded_rows_changes_nothing(score, normalizer, need_weights):
    layer = make(score, normalizer, attention_scale=True, num_types=T)
    parameters = list(layer.parameters())
    x, positions, mask = inputs()
    types = atom_types()

    def run(x, positions, types, fill):
        x, positions = (y.clone().requires_grad_() for y in (x, positions))
        out, weights = layer(x, positions, mask, atom_types=types, need_weights=need_weights)
        results, incoming = [out], [torch.cos(out).detach()]
        incoming[0][~mask] = fill
        if weights is not None:
            results.append(weights)
            incoming.append(torch.sin(weights).detach())
            incoming[1][~(mask[:, None, :, None] & mask[:, None, None]).expand_as(weights)] = fill
        grads = torch.autograd.grad(results, [x, positions, *parameters], incoming)
        return [*results, *grads]

    clean = run(x, positions, types, 0.0)
    for garbage in (torch.nan, torch.inf):
        bad_x = x.masked_fill(~mask[..., None], garbage)
        bad_positions = positions.masked_fill(~mask[..., None], garbage)
        bad_types = types.masked_fill(~mask, 10**6)
        for a, b in zip(clean, run(bad_x, bad_positions, bad_types, garbage), strict=True):
            assert torch.equal(a, b)


def test_molecule_without_atoms_and_empty_batch():
    layer = make()
    x, positions, mask = inputs()
    mask[1] = False
    out, _ = layer(x, positions, mask)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert out.isfinite().all()
    assert layer(x[:0], positions[:0], mask[:0])[0].shape == (0, N, E)
    empty, weights = layer(x[:, :0], positions[:, :0], mask[:, :0], need_weights=True)
    assert empty.shape == (B, 0, E)
    assert weights.shape == (B, H, 0, 0)


# Radial functions of every kind.


def loop(layer, x, positions, mask, types, f):
    """The layer with score bias and softmax, atom by atom; `f(dist, t_i, t_j)` one number."""
    q, k, v = (y.unflatten(-1, (H, E // H)) for y in layer.in_proj(x).chunk(3, -1))
    out = torch.zeros_like(x)
    for b in range(B):
        real = mask[b].nonzero().flatten().tolist()
        for i in real:
            for h in range(H):
                scores = torch.stack(
                    [
                        q[b, i, h] @ k[b, j, h] * (E // H) ** -0.5
                        + f((positions[b, i] - positions[b, j]).norm(), types[b, i], types[b, j])[
                            h
                        ]
                        for j in real
                    ]
                )
                mixed = torch.softmax(scores, 0) @ v[b, real, h]
                out[b, i, h * (E // H) : (h + 1) * (E // H)] = mixed
    return layer.out_proj(out).masked_fill(~mask[..., None], 0)


def test_affine_map_of_each_pair_of_types_equals_a_loop():
    layer = make(num_types=T)
    assert layer.affine.shape == (T * (T + 1) // 2, 2)
    x, positions, mask = inputs()
    types = atom_types()
    table = layer._tabulate(64)
    number = {tuple(pair): p for p, pair in enumerate(torch.triu_indices(T, T).T.tolist())}
    plain = RadialTable(table.knots, table.r_min, table.r_max)

    def f(dist, t_i, t_j):
        m, c = layer.affine[number[min(int(t_i), int(t_j)), max(int(t_i), int(t_j))]]
        return plain(m * dist + c)

    with torch.no_grad():
        expected = loop(layer, x, positions, mask, types, f)
        assert difference(layer(x, positions, mask, atom_types=types)[0], expected) < 10 * BUDGET


def test_radial_function_of_types_equals_a_loop():
    radial = RadialMLP(GaussianBasis(6, 4.0), 5, H, num_types=T, type_dim=3).double()
    layer = make(num_types=T, radial=radial, num_knots=256)
    assert layer.affine is None
    x, positions, mask = inputs()
    positions = 0.4 * positions  # well inside the table
    types = atom_types()

    def f(dist, t_i, t_j):
        return radial(dist[None], t_i[None], t_j[None])[0]

    with torch.no_grad():
        expected = loop(layer, x, positions, mask, types, f)
        found = layer(x, positions, mask, atom_types=types)[0]
    # Gaussians 0.8 Å wide on knots 0.02 Å apart: the spline is off by less than 1e-8.
    assert difference(found, expected) < 1e-8


def test_new_affine_maps_are_the_identity():
    layer = FusedGeoAttention(E, H, num_types=2)
    assert torch.equal(layer.affine, torch.tensor([[1.0, 0.0]] * 3))


def test_gaussian_sum_becomes_parameters():
    gaussians = GaussianSum(torch.linspace(0, 4, 5), torch.ones(5), torch.randn(H, 5))
    layer = make(radial=gaussians, num_knots=1024)
    assert {tuple(p.shape) for p in layer.radial.parameters()} == {(5,), (H, 5)}
    assert all(p.dtype == torch.float64 for p in layer.radial.parameters())
    x, positions, mask = inputs()
    out = layer(x, positions, mask)[0]
    out.sum().backward()
    assert all((p.grad != 0).any() for p in layer.radial.parameters())
    assert gaussians.weights.requires_grad is False
    before = gaussians.weights.clone()
    change(layer)
    assert torch.equal(gaussians.weights, before)


@pytest.mark.parametrize("kind", ["network", "types", "affine", "gaussians", "function"])
@pytest.mark.parametrize("score", ["bias", "filter"])
def test_exact_function_equals_the_table_up_to_its_error(kind, score):
    channels = H if score == "bias" else E
    options = {"num_types": T} if kind in ("types", "affine") else {}
    radial = RadialMLP(
        GaussianBasis(6, 8.0), 5, channels, **options | {"type_dim": 2} if kind == "types" else {}
    ).double()
    if kind == "gaussians":
        radial = GaussianSum(torch.linspace(0, 4, 5), torch.ones(5), torch.randn(channels, 5))
    elif kind == "function":
        phase = torch.arange(channels, dtype=torch.float64)

        def radial(dist):
            return torch.cos(dist[:, None] + phase)

    options |= {"radial": radial, "backend": "reference", "r_max": 20.0}
    exact, table = make(score, num_knots=None, **options), make(score, num_knots=2048, **options)
    table.load_state_dict(exact.state_dict())
    x, positions, mask = inputs()
    types = atom_types() if "num_types" in options else None
    a, b = (y(x, positions, mask, atom_types=types)[0] for y in (exact, table))
    # h = 0.01 Å: errors of f about h^4 f''''/384 < 1e-9.
    assert difference(a, b) < 1e-8


def test_types_are_ignored_where_the_layer_has_none():
    x, positions, mask = inputs()
    for num_knots in (64, None):
        layer = make(num_knots=num_knots, backend="reference")
        expected = layer(x, positions, mask)[0]
        assert torch.equal(layer(x, positions, mask, atom_types=atom_types())[0], expected)


# States.


def test_state_dict_round_trip_gives_the_same_output():
    options = {"attention_scale": True, "num_types": T}
    first, second = make(**options), make(**options)
    x, positions, mask = inputs()
    types = atom_types()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    before = second(x, positions, mask, atom_types=types)[0]
    second.load_state_dict(torch.load(file, weights_only=True), strict=True)
    expected = first(x, positions, mask, atom_types=types)[0]
    assert torch.equal(second(x, positions, mask, atom_types=types)[0], expected)
    assert difference(before, expected) > 1e-3
    names = {name.split(".")[0] for name in first.state_dict()}
    assert names == {"in_proj", "out_proj", "radial", "affine", "attention_scale"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(copied):
    layer = make(attention_scale=True).eval()
    x, positions, mask = inputs()
    with torch.no_grad():
        expected = layer(x, positions, mask)[0]
        again = copied(layer)
        assert torch.equal(again(x, positions, mask)[0], expected)
        change(again)
        assert difference(again(x, positions, mask)[0], expected) > 1e-3
        assert torch.equal(layer(x, positions, mask)[0], expected)


def test_whole_module_can_be_saved():
    layer = FusedGeoAttention(E, H, num_types=2, backend="eager").eval()
    x, positions, mask = inputs(torch.float32)
    types = torch.zeros(B, N, dtype=torch.int64)
    file = io.BytesIO()
    with torch.no_grad():
        expected = layer(x, positions, mask, atom_types=types)[0]
        torch.save(layer, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        assert torch.equal(again(x, positions, mask, atom_types=types)[0], expected)


def test_repr_is_deterministic_and_shows_the_settings():
    layer = make("filter", "linear", num_types=T)
    text = repr(layer)
    assert text == repr(copy.deepcopy(layer))
    names = ("num_heads=3", "score='filter'", "normalizer='linear'", "r_max=5.0")
    for setting in (*names, "num_knots=64", "num_types=3"):
        assert setting in text
    assert "0x" not in text


# The table kept in `eval()` without gradients.


class Parent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Identity()), layer])

    def forward(self, *args, **options):
        return self.blocks[1](*args, **options)


def counted_eval(**options):
    layer = make(**options).eval()
    layer.radial.calls = 0
    return layer


def test_table_is_built_once_in_eval_without_gradients():
    layer = counted_eval()
    args = inputs()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(3):
                layer(*args, need_weights=True)
    assert layer.radial.calls == 1


def test_table_is_built_in_each_call_in_training():
    layer = counted_eval().train()
    args = inputs()
    layer(*args, need_weights=True)
    with torch.no_grad():
        layer(*args)
    assert layer.radial.calls == 2


def test_table_is_not_kept_under_gradients():
    layer = counted_eval()
    args = inputs()
    with torch.no_grad():
        layer(*args)
    for calls in (2, 3):
        out = layer(*args)[0]
        assert layer.radial.calls == calls
        grads = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
        assert all(g.abs().max() > 0 for g in grads if g.numel() > 1)


def test_gradients_in_eval_equal_those_in_training():
    layer = make()
    x, positions, mask = inputs()
    positions.requires_grad_()
    grads = []
    for mode in (True, False):
        layer.train(mode)
        out = layer(x, positions, mask)[0].square().sum()
        grads.append(torch.autograd.grad(out, [positions, *layer.parameters()]))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


DISCARDS = {
    "train and eval": lambda m: m.train().eval(),
    "eval": lambda m: m.eval(),
    "load_state_dict": lambda m: m.load_state_dict(m.state_dict()),
    "to": lambda m: m.to(torch.float64),
    "float and double": lambda m: m.float().double(),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("discard", DISCARDS.values(), ids=DISCARDS)
def test_table_is_discarded(discard, nested):
    layer = counted_eval()
    module = Parent(layer).eval() if nested else layer
    args = inputs()
    with torch.no_grad():
        module(*args)
        discard(module)
        module(*args)
        module(*args)
    assert layer.radial.calls == 2


def test_assigned_state_dict_discards_the_table():
    layer = counted_eval()
    args = inputs()

    def assign():  # new tensors, as little changed as those that they replace
        state = {name: torch.randn_like(p) for name, p in layer.state_dict().items()}
        layer.load_state_dict(state, assign=True)

    with torch.no_grad():
        assign()
        layer(*args)
        assign()
        layer(*args)
    assert layer.radial.calls == 2


def test_pickle_carries_no_table():
    layer = make(num_knots=1024).eval()
    before = len(pickle.dumps(layer))
    with torch.no_grad():
        layer(*inputs())
    assert len(pickle.dumps(layer)) < before + 1000  # the table has 1024 * 2 * 3 * 8 bytes


def test_refresh_discards_the_table():
    layer = counted_eval()
    args = inputs()
    with torch.no_grad():
        layer(*args)
        layer.refresh()
        layer(*args)
    assert layer.radial.calls == 2


def optimizer_step(module):
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def foreach_step(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, foreach=True)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def data_and_refresh(module):
    for p in module.parameters():
        p.data.mul_(1.5)
    for layer in module.modules():
        if isinstance(layer, FusedGeoAttention):
            layer.refresh()


def other_radial(module):
    layer = next(m for m in module.modules() if isinstance(m, FusedGeoAttention))
    layer.radial = Counted().double()


def other_parameter(module):
    layer = next(m for m in module.modules() if isinstance(m, FusedGeoAttention))
    last = layer.radial.network.layers[-1]
    last.weight = nn.Parameter(torch.randn_like(last.weight))


def assigned_state(module):
    layer = next(m for m in module.modules() if isinstance(m, FusedGeoAttention))
    state = {name: torch.randn_like(p) for name, p in layer.radial.state_dict().items()}
    layer.radial.load_state_dict(state, assign=True)


def half_the_radial(module):
    layer = next(m for m in module.modules() if isinstance(m, FusedGeoAttention))
    layer.radial.bfloat16()


WRITES = (
    change,
    optimizer_step,
    foreach_step,
    data_and_refresh,
    other_radial,
    other_parameter,
    assigned_state,
    half_the_radial,
)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("write", WRITES)
def test_changed_parameters_never_meet_an_old_table(write, nested):
    layer = make(num_types=T).eval()
    module = Parent(layer).eval() if nested else layer
    args, types = inputs(), atom_types()
    with torch.no_grad():
        before = module(*args, atom_types=types)[0]
        for _ in range(3):
            write(module)
            after = module(*args, atom_types=types)[0]
            fresh = copy.deepcopy(layer).train()
            assert torch.equal(after, fresh(*args, atom_types=types)[0])
        assert difference(after, before) > 1e-6


AVERAGES = {
    "mean": {},
    "multi_avg_fn": {"multi_avg_fn": get_ema_multi_avg_fn(0.5)},
    "avg_fn": {"avg_fn": lambda averaged, new, _: 0.5 * averaged + 0.5 * new},
}


@pytest.mark.parametrize("options", AVERAGES.values(), ids=AVERAGES)
def test_averaged_model_never_meets_an_old_table(options):
    layer = make()
    averaged = AveragedModel(Parent(layer), **options).eval()
    args = inputs()
    with torch.no_grad():
        outputs = []
        for _ in range(4):
            averaged.update_parameters(Parent(layer))
            outputs.append(averaged(*args)[0])
            fresh = copy.deepcopy(averaged.module.blocks[1]).train()
            assert torch.equal(outputs[-1], fresh(*args)[0])
            change(layer)
        assert difference(outputs[0], outputs[-1]) > 1e-3


def test_functional_call_never_meets_an_old_table():
    layer, other = make().eval(), make().eval()
    args = inputs()
    with torch.no_grad():
        mine, expected = layer(*args)[0], other(*args)[0]
        found = torch.func.functional_call(layer, dict(other.named_parameters()), args)[0]
        assert torch.equal(found, expected)
        assert torch.equal(layer(*args)[0], mine)


def test_other_range_or_number_of_knots_never_meets_an_old_table():
    layer = make().eval()
    args = inputs()
    with torch.no_grad():
        layer(*args)
        layer.r_max, layer.num_knots = 2.0, 32
        assert torch.equal(layer(*args)[0], copy.deepcopy(layer)(*args)[0])


def test_table_built_in_inference_mode_serves_later():
    layer = make().eval()
    x, positions, mask = inputs()
    with torch.inference_mode():
        expected = layer(x, positions, mask)[0].clone()
    with torch.no_grad():
        assert torch.equal(layer(x, positions, mask)[0], expected)
    layer(x, positions.requires_grad_(), mask)[0].sum().backward()
    assert positions.grad.isfinite().all()


def test_fake_tensors_are_not_kept():
    layer = make().eval()
    args = inputs()
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            layer(*(mode.from_tensor(x) for x in args))
        out = layer(*args)[0]
        assert type(out) is torch.Tensor
        assert torch.equal(out, copy.deepcopy(layer)(*args)[0])


# Compilers, dtypes.


@pytest.fixture
def compiled():
    # aot_eager: what is tested is the trace, and inductor takes half a minute on two cores.
    torch._dynamo.reset()
    yield lambda module: torch.compile(module, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def test_compiles_into_one_graph_in_training(compiled):
    layer = make("filter", "linear", attention_scale=True, num_types=T)
    x, positions, mask = inputs()
    types = atom_types()
    positions.requires_grad_()
    wanted = [positions, *layer.parameters()]
    results = []
    for module in (layer, compiled(layer)):
        out = module(x, positions, mask, atom_types=types)[0]
        results.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    for a, b in zip(*results, strict=True):
        assert difference(a, b) < 10 * BUDGET * max(1, float(b.detach().abs().max()))


def test_compiles_into_one_graph_in_eval_and_never_meets_an_old_table(compiled):
    layer = make().eval()
    module = compiled(layer)
    args = inputs()
    with torch.no_grad():
        assert difference(module(*args)[0], layer(*args)[0]) < BUDGET  # now a table is kept
        assert difference(module(*args)[0], layer(*args)[0]) < BUDGET
        change(layer)
        fresh = copy.deepcopy(layer)(*args)[0]
        assert difference(module(*args)[0], fresh) < BUDGET
        assert difference(layer(*args)[0], fresh) < BUDGET
        assert difference(module(*args)[0], fresh) < BUDGET


def test_exports():
    layer = make(num_types=T).eval()
    args, options = inputs(), {"atom_types": atom_types()}
    for kept in (False, True):
        with torch.no_grad():
            exported = torch.export.export(layer, args, options).module()
            other = inputs()
            expected = layer(*other, **options)[0]
            assert difference(exported(*other, **options)[0], expected) < BUDGET, kept
    change(layer)  # an exported program has its own parameters


@pytest.mark.parametrize(("score", "normalizer"), SETTINGS)
def test_autocast_runs_in_bfloat16_near_float32(score, normalizer):
    layer = make(score, normalizer, dtype=torch.float32, attention_scale=True)
    x, positions, mask = inputs(torch.float32)
    expected = layer(x, positions, mask)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, weights = layer(x, positions, mask, need_weights=True)
    assert out.dtype == torch.bfloat16
    assert weights.dtype == torch.bfloat16
    # Input and results of three products are rounded to 2^-9 of their size.
    assert difference(out, expected) < 12 * 2**-9 * max(1, float(expected.detach().abs().max()))
    out.float().sum().backward()
    for p in layer.parameters():
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("num_types", [None, T])
def test_module_of_another_dtype_is_near_float32(dtype, num_types):
    layer = make(dtype=torch.float32, num_types=num_types)
    x, positions, mask = inputs(torch.float32)
    types = atom_types() if num_types else None
    expected = layer(x, positions, mask, atom_types=types)[0]
    layer.to(dtype)
    out = layer(x.to(dtype), positions, mask, atom_types=types)[0]
    assert out.dtype == dtype
    eps = max(torch.finfo(dtype).eps, EPS_32)
    assert difference(out, expected) < 12 * eps * max(1, float(expected.detach().abs().max()))
    out.sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad.dtype == dtype, name
        assert p.grad.isfinite().all(), name


def test_casting_methods_change_every_parameter():
    for cast, dtype in (("double", torch.float64), ("half", torch.float16), ("bfloat16", None)):
        layer = getattr(make(dtype=torch.float32, num_types=T, attention_scale=True), cast)()
        assert {p.dtype for p in layer.parameters()} == {dtype or torch.bfloat16}


def test_device_and_dtype_of_the_constructor_reach_every_parameter():
    layer = FusedGeoAttention(
        E, H, num_types=2, attention_scale=True, device="meta", dtype=torch.float64
    )
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, r"embed_dim: expected a multiple of num_heads=5, got 12"),
        ({"num_heads": 0}, r"(num_heads|embed_dim): expected .*0.*"),
        ({"embed_dim": 0}, r"embed_dim: expected .*got 0"),
        ({"score": "dot"}, r"score: expected 'bias' or 'filter', got 'dot'"),
        ({"normalizer": "silu"}, r"normalizer: expected 'softmax' or 'linear', got 'silu'"),
        ({"dropout": 0.1}, r"dropout: expected 0, .*got 0\.1"),
        ({"r_max": 0.0}, r"r_max: expected a number > 0, got 0\.0"),
        ({"r_max": -2.0}, r"r_max: expected a number > 0, got -2\.0"),
        ({"num_knots": None}, r"num_knots: expected a number; .*backend='reference'.*got .*None"),
        ({"num_knots": 4}, r"num_knots: expected at least 5.*got 4"),
        ({"num_types": 0}, r"num_types: expected at least 1.*got 0"),
        ({"num_types": -1}, r"num_types: expected at least 1.*got -1"),
        ({"backend": "cudnn"}, r"backend: expected None or one of .*got 'cudnn'"),
        (
            {"radial": RadialMLP(GaussianBasis(3, 4.0), 2, 3, num_types=2)},
            r"num_types: expected a number, since radial takes types, got None",
        ),
    ],
    ids=str,
)
def test_constructor_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        FusedGeoAttention(**{"embed_dim": E, "num_heads": H} | options)


def test_constructor_refuses_a_radial_that_cannot_be_called():
    with pytest.raises((TypeError, ValueError), match=r"^radial: expected .*got int"):
        FusedGeoAttention(E, H, radial=3)


def test_wrong_number_of_channels_is_named():
    layer = make(radial=RadialMLP(GaussianBasis(3, 4.0), 2, 4).double())
    with pytest.raises(ValueError, match=r"^radial: expected C=3 channels \(H\).*got 4$"):
        layer(*inputs())


def test_forward_names_what_is_wrong():
    layer = make(num_types=T)
    x, positions, mask = inputs()
    types = atom_types()

    def call(error, message, x=x, positions=positions, mask=mask, **options):
        with pytest.raises(error, match=f"^{message}$"):
            layer(x, positions, mask, **{"atom_types": types} | options)

    call(ValueError, r"x: expected \[B, N, E=12\], got \[3, 7, 11\]", x=x[..., :11])
    call(ValueError, r"x: expected \[B, N, E=12\], got \[7, 12\]", x=x[0])
    call(ValueError, r"x: expected \[T, E=12\], got \[3, 7, 12\]", ptr=ptr(), mask=None)
    call(TypeError, r"x: expected a tensor \[B, N, E\], got list", x=[1.0])
    shape = r"positions: expected \[B=3, N=7, 3\], got \[3, 6, 3\]"
    call(ValueError, shape, positions=positions[:, :6])
    kind = r"mask: expected bool \[B, N\], True = real atom, got torch.int64"
    call(TypeError, kind, mask=mask.long())
    call(TypeError, r"mask: expected bool .*got list", mask=[True])
    call(ValueError, r"mask: expected \[B=3, N=7\], got \[3, 6\]", mask=mask[:, :6])
    call(ValueError, r"mask: expected on cpu like .*, got on meta", mask=mask.to("meta"))
    call(ValueError, r"atom_types: expected integers for each atom.*got None", atom_types=None)
    call(TypeError, r"atom_types: expected integers, got torch.float32", atom_types=types.float())
    packed = {"x": x[mask], "positions": positions[mask], "ptr": ptr(), "atom_types": types[mask]}
    call(ValueError, r"mask: expected None with ptr.*", mask=mask, **packed)
