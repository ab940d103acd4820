"""Read-outs of molecules, padded and packed, against loops over atoms."""

import itertools

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from geot_model.readout import READOUTS, Layout, Readout

SIZES = (5, 3, 0, 1)
EMBED = 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def feed_forward(inputs, hidden, outputs):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def make(*kinds):
    return Readout(EMBED, 6, kinds, feed_forward).double()


def packed():
    """Features, positions and layout of molecules, one after the other."""
    ptr = torch.tensor([0, *torch.tensor(SIZES).cumsum(0).tolist()])
    x, positions = (torch.randn(sum(SIZES), n, dtype=torch.float64) for n in (EMBED, 3))
    return x, positions, Layout(None, ptr, max(SIZES))


def padded(x, positions, layout):
    """The same with padding that is not a number."""
    mask = torch.arange(max(SIZES)) < torch.tensor(SIZES)[:, None]
    out = []
    for rows in (x, positions):
        wide = torch.full((*mask.shape, rows.shape[-1]), torch.nan, dtype=rows.dtype)
        wide[mask] = rows
        out.append(wide)
    return *out, Layout(mask)


def looped(readout, x, positions, ptr):
    """What the docstring says, molecule by molecule."""
    molecules = [(x[a:b], positions[a:b]) for a, b in itertools.pairwise(ptr)]
    return torch.stack([looped_molecule(readout, *one) for one in molecules])


def looped_molecule(readout, atoms, places):
    n = max(len(atoms), 1)
    a = readout.atomwise(atoms).flatten()
    charges = a - a.sum() / n
    values = {
        "pooled": lambda: readout.pooled(atoms.sum(0)).squeeze(),
        "sum": a.sum,
        "mean": lambda: a.sum() / n,
        "dipole": lambda: (charges[:, None] * places).sum(0).norm(),
    }
    return torch.stack([values[kind]() for kind in readout.kinds])


@pytest.mark.parametrize("kind", READOUTS)
def test_each_readout_is_its_formula(kind):
    readout = Readout(EMBED, 6, (kind,), feed_forward).double()
    if kind == "pooled":
        readout.atomwise = feed_forward(EMBED, 6, 1).double()
    x, positions, layout = packed()
    expected = looped(readout, x, positions, layout.ptr)
    torch.testing.assert_close(readout(x, positions, layout), expected)


def test_padded_and_packed_molecules_give_the_same():
    readout = make(*READOUTS)
    molecules = packed()
    expected = readout(*molecules)
    assert expected.shape == (len(SIZES), len(READOUTS))
    wide = padded(*molecules)
    out = readout(wide[0].nan_to_num(), wide[1], wide[2])
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in readout.parameters())


def test_targets_keep_their_order():
    kinds = ("mean", "pooled", "sum", "pooled", "dipole")
    readout = make(*kinds)
    x, positions, layout = packed()
    out = readout(x, positions, layout)
    pooled = readout.pooled(layout.sum(x))
    torch.testing.assert_close(out[:, [1, 3]], pooled)
    atomwise = readout.atomwise(x)
    torch.testing.assert_close(out[:, 0], layout.mean(atomwise)[:, 0])
    torch.testing.assert_close(out[:, 2], layout.sum(atomwise)[:, 1])


def test_dipole_does_not_depend_on_where_the_molecule_is():
    readout = make("dipole")
    x, positions, layout = packed()
    out = readout(x, positions, layout)
    moved = readout(x, positions + torch.tensor([10.0, -20.0, 5.0]), layout)
    torch.testing.assert_close(moved, out)
    assert out[0] > 1e-3 and out[3] == 0


def test_derivatives_of_both_orders_are_right():
    readout = make(*READOUTS)
    x, positions, layout = packed()
    keep = torch.ones(sum(SIZES), dtype=torch.bool)
    keep[-1] = False  # of one atom the dipole is 0 and has a corner
    ptr = layout.ptr.clone()
    ptr[-1] -= 1
    inputs = (x[keep].requires_grad_(), positions[keep].requires_grad_())
    call = lambda x, r: readout(x, r, Layout(None, ptr, 5))[:2]  # noqa: E731
    assert gradcheck(call, inputs) and gradgradcheck(call, inputs)


def test_derivatives_where_there_is_no_dipole_are_numbers():
    readout = make("dipole")
    x = torch.randn(1, EMBED, dtype=torch.float64)
    positions = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    out = readout(x, positions, Layout(None, torch.tensor([0, 1]), 1))
    (force,) = torch.autograd.grad(out.sum(), positions, create_graph=True)
    assert not force.any()
    (out.sum() + force.square().sum()).backward()
    assert all(p.grad.isfinite().all() for p in readout.parameters())


def test_wrong_names_are_named():
    with pytest.raises(ValueError, match="readout: expected one of pooled, sum, mean, dipole, go"):
        make("max")
