"""What GeoT learns: budgets, fair networks, pairs taken out, tables."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import nn

from bench import geot, inference, learning, message_passing, pair_energies, simulation
from bench.ratios import Device, read
from bench.rows import Rows
from geot_model import relevance
from geot_model.batches import pack
from geot_model.model import GeoT
from geot_model.qm9 import load_qm9
from geot_model.targets import TargetScaler


class Counts(nn.Module):
    """A number for each element, added up: knows what a composition says, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Embedding(10, 1)


def call(network, batch):
    molecule = torch.arange(len(batch.ptr) - 1).repeat_interleave(batch.ptr.diff())
    out = torch.zeros(len(batch.ptr) - 1, 1)
    return out.index_add(0, molecule, network.values(batch.numbers))


@pytest.fixture(scope="module")
def molecules():
    return load_qm9()[:200]


def fitted(molecules, name="alpha"):
    return TargetScaler.fit(molecules, (name,), ("sum",))


def test_a_network_learns_until_its_processor_seconds_are_spent(molecules):
    torch.manual_seed(0)
    scaler = fitted(molecules)
    network = Counts()
    before = learning.mean_absolute_error(network, call, scaler, molecules[150:])
    lines = []
    start = time.process_time()
    found = learning.learn(
        *(network, call, scaler, molecules[:150], molecules[150:]),
        seconds=0.4,
        learning_rate=0.1,
        say=lines.append,
    )
    assert 0.4 <= found.seconds <= time.process_time() - start
    assert len(found.curve) == len(lines) and found.curve[-1][:2] == (found.seconds, found.steps)
    assert found.molecules > 25 * found.steps
    after = learning.mean_absolute_error(found.network, call, scaler, molecules[150:])
    assert found.curve[-1][2] == pytest.approx(after) and after < before / 2
    assert not any(p.requires_grad for p in found.network.parameters())


def test_errors_are_of_molecules_in_their_order(molecules):
    scaler = fitted(molecules)
    network = Counts()
    batch = pack(molecules, np.arange(len(molecules)))
    torch.testing.assert_close(
        learning.outputs(network, call, molecules, batch_size=7), call(network, batch).detach()
    )
    predicted = scaler.unscale(call(network, batch), molecules)[:, 0]
    expected = np.abs(predicted - molecules.targets["alpha"]).mean()
    found = learning.mean_absolute_error(network, call, scaler, molecules)
    assert found == pytest.approx(expected)


def test_schnet_gets_all_pairs_within_its_cutoff(molecules):
    batch = pack(molecules, np.arange(5))
    counts = batch.ptr.diff()
    molecule = torch.arange(5).repeat_interleave(counts)
    edges, lengths = message_passing.all_pairs(1.9 * batch.positions, molecule)
    apart = torch.cdist(1.9 * batch.positions, 1.9 * batch.positions)
    near = (molecule[:, None] == molecule) & (apart < message_passing.CUTOFF)
    near.fill_diagonal_(False)
    assert 0 < len(edges.T) < int((counts * (counts - 1)).sum())
    assert set(map(tuple, edges.T.tolist())) == set(map(tuple, near.nonzero().tolist()))
    torch.testing.assert_close(lengths, apart[edges[0], edges[1]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", message_passing.READOUTS)
def test_networks_are_of_one_size_and_take_the_same_batches(target, molecules):
    pytest.importorskip("torch_geometric")
    batch = pack(molecules, np.arange(6))
    sizes = []
    for make, forward in message_passing.NETWORKS.values():
        network = make(target)
        out = forward(network, batch)
        assert out.shape == (6, 1) and out.dtype == torch.float32 and out.isfinite().all()
        sizes.append(sum(p.numel() for p in network.parameters()))
    assert 0.8 < sizes[0] / sizes[1] < 1.2


def test_a_comparison_is_a_row_and_its_curve(molecules, monkeypatch):
    pytest.importorskip("torch_geometric")
    parts = (molecules[:100], molecules[100:120], molecules[120:150])
    row, curve = message_passing.measure("gap", "GeoT", parts, 0.3)
    assert set(row) <= set(message_passing.COLUMNS) and float(row["mae"]) > 0
    assert curve and all(set(one) <= set(message_passing.CURVE_COLUMNS) for one in curve)


def test_the_strongest_pairs_are_taken_out():
    strength = np.array([[0, 3.0, 1], [3, 0, 2], [1, 2, 0]])
    one, two = simulation.kept(strength, (0.01, 0.67))
    assert np.argwhere(~one).tolist() == [[0, 1], [1, 0]]
    assert np.argwhere(~two).tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]


def test_the_simulation_knows_what_a_model_was_made_to_look_at(molecules, monkeypatch):
    """Relevance that is the true energy correlates fully, and random relevance does not."""
    monkeypatch.setattr(relevance, "METHODS", ("truth", "noise"))
    random = np.random.RandomState(0)

    def told(model, some, method):
        pairs = [np.abs(pair_energies.pairs("coulomb", some, m)) for m in range(len(some))]
        noise = [random.rand(*one.shape) for one in pairs]
        return [torch.from_numpy(one) for one in (pairs if method == "truth" else noise)]

    monkeypatch.setattr(relevance, "relevance", told)
    monkeypatch.setattr(relevance, "aggregate", lambda maps, method: maps)
    model = GeoT(1, embed_dim=8, num_heads=2, num_layers=1, backend="eager").eval()
    some = simulation.with_energy("coulomb", molecules[:20])
    found, again = (simulation.explain(model, "coulomb", some) for _ in range(2))
    assert np.allclose(found.all_pairs["truth"], 1)
    assert abs(np.mean(found.all_pairs["noise"])) < 0.2
    assert np.array_equal(found.curves["truth"], found.curves[simulation.TRUTH])
    assert not np.array_equal(found.curves["truth"], found.curves["noise"])
    assert found.curves[simulation.RANDOM].shape == (20, len(simulation.SHARES))
    assert np.allclose(simulation.between([found, again], "truth"), 1)
    assert np.abs(simulation.between([found, again], "noise")).max() < 0.3


def test_the_truth_itself_is_the_most_that_can_be_reached():
    assert simulation.most(np.array([0.3, 0.1, 2, 0.7])) == pytest.approx(1)
    assert 0.5 < simulation.most(np.repeat([0.0, 1.0], [90, 10])) < 0.55


def test_a_simulation_is_rows_of_all_methods_and_their_curves(molecules):
    parts = (molecules[:100], molecules[100:120], molecules[120:130])
    summary, points = simulation.measure("bonds", "filter", parts, 0.3, seeds=2)
    methods = {*relevance.METHODS, simulation.TRUTH, simulation.RANDOM}
    assert {one["method"] for one in summary} == methods and len(summary) == 2 * len(methods)
    assert len({tuple(one[name] for name in simulation.KEY) for one in summary}) == len(summary)
    assert all(set(one) <= set(simulation.COLUMNS) for one in summary)
    assert all(set(one) <= set(simulation.CURVE_COLUMNS) for one in points)
    assert len(points) == 2 * len(methods) * len(simulation.SHARES)
    for one in summary:
        judged = one["method"] in relevance.METHODS
        names = ("with_energy_", "between_trainings_")
        assert [f"spearman_{name}median" in one for name in names] == 2 * [judged]
        assert ("spearman_median" in one) == (one["method"] != simulation.RANDOM)


def test_shares_of_inference_sum_to_one(molecules):
    model = inference.network("tiny", molecules)
    shares = inference.parts(model, molecules[:50])
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0.001


def row(columns, **values):
    return {**dict.fromkeys(columns, ""), "device": "CPU", "threads": "1", **values}


def test_tables_say_what_rows_say(tmp_path):
    common = {"target": "gap", "unit": "eV", "train_molecules": "10000", "budget_s": "600"}
    common |= {"test_molecules": "10000", "inference_molecules_per_s": "1234"}
    rows = [
        row(
            message_passing.COLUMNS,
            **{**common, "network": name, "mae": mae, "parameters": "450000"},
            train_molecules_per_s="500",
        )
        for name, mae in (("SchNet", "0.2"), ("GeoT", "0.15"))
    ]
    Rows(tmp_path / "message_passing.csv", message_passing.COLUMNS, message_passing.KEY).add(rows)
    found = [
        row(
            simulation.COLUMNS,
            **{"energy": "bonds", "method": name, "mae_eV": "0.1", "spread_eV": "5"},
            **{"molecules": "300", "seed": seed, "deletion_over_random": deletion},
            **{"spearman_median": median, "spearman_with_energy_median": some},
            spearman_between_trainings_median="0.75",
        )
        for name in (*relevance.METHODS, simulation.TRUTH, simulation.RANDOM)
        for seed, median, some, deletion in (
            ("0", "0.25", "0.5", "2.54"),
            ("1", "0.1", "0.4", "2"),
            ("2", "0.3", "0.6", "3"),
        )
    ]
    Rows(tmp_path / "simulation.csv", simulation.COLUMNS, simulation.KEY).add(found)
    shares = {f"share_of_{name}": "0.25" for name in (*geot.SHARES, "batches")}
    speed = {"preset": "tiny", "molecules": "130831", "seconds": "60", "molecules_per_s": "2180"}
    Rows(tmp_path / "inference.csv", inference.COLUMNS, inference.KEY).add(
        [row(inference.COLUMNS, **speed, **shares)]
    )
    device = read(tmp_path)
    assert "| gap, eV | 0.150 | 0.200 | 0.75 | 500 / 500 |" in geot.message_passing(device)
    told = geot.simulation(device)
    assert "300 molecules" in told and "3 trainings" in told
    assert (
        "| bonds alone (error 0.1 of 5 eV) | 0.25 (0.10 to 0.30), 0.50 among those with an "
        "energy; between trainings 0.75 · 2.5× |" in told
    )
    assert told.rstrip().endswith("| 0.25 · 2.5× |")
    assert "| tiny | 130,831 | 60.0 | 2,180 | 25 % |" in geot.inference(device)
    empty = Device(tmp_path)
    assert not (geot.message_passing(empty) or geot.simulation(empty) or geot.inference(empty))


def test_names_are_those_of_the_code():
    assert geot.METHODS == relevance.METHODS and geot.TRUTH == simulation.TRUTH
    assert set(geot.ENERGIES) == set(pair_energies.ENERGIES)
    assert set(geot.TARGETS) == set(message_passing.READOUTS)
