"""Every way of the benchmark computes the same layer, and a wrong result is noticed."""

from __future__ import annotations

import pytest
import torch

from bench import problems
from bench.cases import CASES, all_cases
from bench.peers import PEERS, functions, opponent
from bench.problems import BiasProblem
from bench.ways import BUDGET, MEASURED, errors, gaussian_score_mod, table_score_mod

UNCOMPILED = [name for name, peer in PEERS.items() if not (peer.compiles or peer.needs)]


def small(name: str, dtype: torch.dtype = torch.float32):
    return CASES[name].of_size("check").problem("cpu", dtype)


@pytest.mark.parametrize("name", ["transformer-m", "torchmd-et-md17"])
@pytest.mark.parametrize("pass_name", MEASURED)
def test_each_result_of_each_pass_is_held_against_the_oracle(name, pass_name):
    problem = small(name)
    way = problem.ours_building_the_table("eager").prepare(pass_name)
    values = way.call(pass_name)()
    _, error, budget = problem.verify(way, pass_name, values, "exact", True)
    assert error <= budget
    values = [values] if isinstance(values, torch.Tensor) else list(values)
    for place in range(min(len(values), 4 if pass_name == "backward+table" else 3)):
        spoilt = [x * 1.01 if n == place else x for n, x in enumerate(values)]
        if pass_name == "forward":
            spoilt = spoilt[0]
        _, error, budget = problem.verify(way, pass_name, spoilt, "exact", True)
        assert error > budget


def test_a_spoilt_network_gradient_is_noticed():
    problem = small("drug-like")
    way = problem.eager().prepare("backward+table")
    values = list(way.backward())
    largest = max(range(4, len(values)), key=lambda n: float(values[n].abs().max()))
    values[largest] = values[largest] * 1.01
    worst, error, budget = problem.verify(way, "backward+table", values, "exact", True)
    assert worst == "d radial" and error > budget


def test_padded_atoms_are_compared_with_nothing():
    problem = small("transformer-m")
    assert problem.mask is not None and not problem.mask.all()
    way = problem.bias_recomputed().prepare("forward")
    out = way.forward()
    out.transpose(1, 2)[~problem.mask] = float("nan")
    _, error, budget = problem.verify(way, "forward", out, "exact", False)
    assert error <= budget


def test_budgets_of_16_bits_come_from_what_eager_pytorch_loses():
    problem = BiasProblem(4, 9, heads=2, dim=16, dtype=torch.bfloat16)
    lost = problem.losses("backward+table", "exact")
    assert set(lost) == {f"d {n}" for n in ("q", "k", "v", "positions", "weights", "knots")}
    assert all(2**-10 < loss < 0.05 for loss in lost.values())
    way = problem.bias_given().prepare("backward")
    _, error, budget = problem.verify(way, "backward", way.backward(), "exact", False)
    assert error <= budget < 0.1
    way.inputs[2].data *= 1.2
    _, error, budget = problem.verify(way, "backward", way.backward(), "exact", False)
    assert error > budget


def test_what_eager_pytorch_loses_is_measured_on_a_part_that_fits():
    problem = BiasProblem(2, 1100, heads=1, dim=4, num_gaussians=2)
    part = problem.part()
    assert part.positions.shape == (1, 1024, 3) and len(part.types) == 1
    assert part._losses is not problem._losses
    few = BiasProblem(3, 9, heads=1, dim=4)
    assert few.part() is few


@pytest.mark.parametrize("score_mod", ["weights", "knots", "affine"])
@pytest.mark.parametrize("padded", [False, True])
def test_score_mods_have_the_right_gradients(score_mod, padded):
    problem = BiasProblem(2, 5, heads=2, dim=4, num_gaussians=3)
    if score_mod == "affine":
        problem = small("graphormer3d-pcqm")
    elif padded:
        problem.mask = torch.arange(5) < torch.tensor([[4], [5]])
    way = problem.eager() if score_mod == "weights" else problem.eager_table()
    way.prepare("backward+table")
    leaves = [x.detach().clone().requires_grad_() for x in way.parameters]
    positions = way.inputs[3].detach().clone().requires_grad_()
    if score_mod == "weights":
        sums = problem.radial.centers.tolist(), problem.radial.gammas.tolist()
        mod = gaussian_score_mod(positions, *sums, leaves[0], problem.mask)
    else:
        index = problem.table.pair_index
        maps = None if index is None else (problem.types, index, leaves[1])
        ends = problem.table.r_min, problem.table.r_max
        mod = table_score_mod(positions, leaves[0][0], *ends, problem.mask, maps)
    q, k, v = (x.detach() for x in way.inputs[:3])
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    grid = torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij")
    out = mod(scores, *grid).softmax(-1) @ v
    got = torch.autograd.grad(out, (positions, *leaves), way.cotangent)
    names = ["d positions", *(f"d {name}" for name in way.names)]
    results = dict(zip(names, got, strict=True))
    if problem.mask is not None:
        results["d positions"] = results["d positions"][problem.mask]
    found = errors(results, way.named("backward+table", way.backward()))
    assert len(found) == len(names)
    assert max(found.values()) <= BUDGET["gradient"]


@pytest.mark.parametrize("some", [1, 2, 3])
def test_the_gradient_of_a_given_bias_is_carried_to_the_radial_parameters(some, monkeypatch):
    problem = small("graphormer3d-pcqm")
    if some < len(problem.positions):
        monkeypatch.setattr(problems, "LOSS_PAIRS", some * problem.positions.shape[1] ** 2)
    way, eager = (x.prepare("backward+table") for x in (problem.bias_given(), problem.eager()))
    got, expected = (x.named("backward+table", x.backward()) for x in (way, eager))
    found = errors({n: got[n] for n in ("d radial", "d affine")}, expected)
    assert max(found.values()) < 1e-5


@pytest.mark.parametrize("name", all_cases("cpu"))
def test_a_case_is_as_large_as_it_says(name):
    case = all_cases("cpu")[name]
    for size in ("full", "quick", "check"):
        chosen = case.of_size(size)
        assert chosen.molecules * max(chosen.atoms, 1) <= case.molecules * max(case.atoms, 1024)
    problem = case.of_size("check").problem("cpu", torch.float32)
    assert problem.features[0].shape[2:] == (case.heads, case.head_dim)
    channels = case.heads * (case.head_dim if case.score == "filter" else 1)
    assert problem.table.num_channels == channels
    assert (problem.table.affine is not None) == case.mapped
    molecules, atoms, real = case.of_size("check").shape
    assert problem.features[0].shape[:2] == (molecules, atoms)
    assert real == (atoms if problem.mask is None else problem.mask.sum() / molecules)


def test_a_way_is_compared_with_the_one_of_ours_that_does_the_same():
    given = ("SDPA, bias given", "cuEquivariance", "FlexAttention, table", "original attention")
    for name in ("forward", "backward+table"):
        assert {opponent(function, name) for function in given} == {"ours"}
        assert {opponent(n, name) for n in ("eager", "compiled eager")} == {"ours with table"}
        assert opponent("ours", name) == opponent("ours with table", name) == ""
    assert opponent("plain", "forward") == "ours"
    assert opponent("plain", "backward+table") == "ours with table"
    assert "plain" not in functions("force_step", "cpu") and "plain" in functions("forward", "cpu")
    assert "ours, CUDA C++" not in functions("forward", "cpu")
    assert "ours, CUDA C++" in functions("forward", "cuda", "triton")
    assert "ours, CUDA C++" not in functions("forward", "cuda", "cuda")


def test_what_cannot_be_computed_says_why():
    reasons = {name: peer.why_not(small("geot-qm9")) for name, peer in PEERS.items()}
    assert reasons["SDPA, bias given"] == "a filter is no bias on the scores"
    assert reasons["ours"] is reasons["plain"] is reasons["eager"] is None
    reasons = {name: peer.why_not(small("unimol")) for name, peer in PEERS.items()}
    assert "knows no vectors" in reasons["FlexAttention, Gaussians"]
    assert reasons["FlexAttention, table"] is None
    reasons = {name: peer.why_not(small("protein-2k")) for name, peer in PEERS.items()}
    assert reasons["FlexAttention, Gaussians"] is None
