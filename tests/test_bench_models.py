"""Whole models compute the same with our attention and with their own, or are not timed."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import geot_kernels as gk
from bench import models
from bench.models import COMPILED, MODELS, ORIGINAL, OURS, check, measure, steps
from bench.rows import COLUMNS, KEY, NUMBERS

ROOT = Path(__file__).parents[1]
MISSING = gk.available_backends("cpu")["cpu"]
BACKENDS = [
    "eager",
    pytest.param("cpu", marks=pytest.mark.skipif(MISSING is not None, reason=str(MISSING))),
]
every_model = pytest.mark.parametrize("name", MODELS)
LAYERS = {  # of the models, as published: width, heads, layers, functions of the basis
    "GeoT published": (1024, 64, 8, 300),
    "Graphormer-3D-like": (768, 48, 12, 128),
    "TorchMD-ET-like": (128, 8, 6, 64),
}


def tiny(name, backend="eager", dtype=torch.float32):
    return steps(name, "tiny", "cpu", dtype, backend)


@pytest.fixture
def _not_compiled(monkeypatch):
    """`torch.compile` gives back the model, which then cannot be differentiated twice."""

    def compile_(model, **_):
        def forward(*inputs):
            if inputs[1].requires_grad:
                raise RuntimeError("no double backward\nhere")
            return model(*inputs)

        return forward

    monkeypatch.setattr(torch, "compile", compile_)


@every_model
@pytest.mark.parametrize("backend", BACKENDS)
def test_ours_and_the_original_learn_the_same(name, backend):
    functions = tiny(name, backend)
    found = check(functions[OURS], functions[ORIGINAL])
    assert found.keys() == models.BUDGET.keys()
    gradients = {n for n, x in functions[OURS].model.named_parameters() if x.requires_grad}
    assert functions[OURS].results().keys() == {"loss", *gradients}


@every_model
def test_ours_and_the_original_learn_the_same_under_autocast(name):
    functions = tiny(name, dtype=torch.bfloat16)
    assert 1e-4 < check(functions[OURS], functions[ORIGINAL])["gradient"] < 0.2


@every_model
def test_all_gradients_are_large_enough_to_be_checked(name):
    results = tiny(name)[ORIGINAL].results()
    zero = {n for n, x in results.items() if not x.any()}
    assert not zero - {"network.readout.pooled.2.bias"}  # of an absolute error


@every_model
@pytest.mark.parametrize("what", ["geo_attention", "tabulate", "distances"])
def test_a_wrong_result_is_not_timed(name, what, monkeypatch):
    functions = tiny(name)
    right = functions[ORIGINAL].results()
    places = {
        "geo_attention": [gk, sys.modules["geot_kernels.module"]],
        "tabulate": [gk, sys.modules["geot_kernels.module"]],
        "distances": [models],
    }
    for place in places[what]:
        monkeypatch.setattr(place, what, perturbed(getattr(place, what)))
    wrong = functions[OURS if what != "distances" else ORIGINAL].results()
    with pytest.raises(RuntimeError, match=r"relative error \d"):
        check(functions[OURS], functions[ORIGINAL])
    assert abs(float(wrong["loss"] / right["loss"] - 1)) < 0.02


def perturbed(function):
    """The function, its result off by 1 %."""

    def off(*args, **kwargs):
        result = function(*args, **kwargs)
        if isinstance(result, gk.RadialTable):
            knots = 1.01 * result.knots
            return gk.RadialTable(
                knots, result.r_min, result.r_max, result.pair_index, result.affine
            )
        return 1.01 * result

    return off


@every_model
def test_a_gradient_that_is_missing_or_not_a_number_is_noticed(name):
    functions = tiny(name)
    ours = functions[OURS].results()
    for broken in (
        {n: x for n, x in ours.items() if "in_proj" not in n},
        {n: x * torch.nan if n == "loss" else x for n, x in ours.items()},
    ):
        functions[OURS].results = lambda broken=broken: broken
        with pytest.raises(RuntimeError, match=r"missing|error nan"):
            check(functions[OURS], functions[ORIGINAL])


@every_model
@pytest.mark.usefixtures("_not_compiled")
def test_rows_have_all_columns_and_times(name):
    rows = measure(name, "tiny", "cpu", torch.float32, "eager", 2, 0.0)
    forces = MODELS[name].forces
    assert [row["function"] for row in rows] == [OURS, ORIGINAL, COMPILED]
    for row in rows:
        assert row.keys() <= set(COLUMNS)
        assert all(row[column] for column in (*KEY, "mean_atoms", "torch"))
        assert row["case"] == name and row["backend"] == "eager"
        assert row["pass"] == ("force training step" if forces else "training step")
        size = MODELS[name].sizes["tiny"]
        assert int(row["molecules"]) == size.molecules
        assert int(row["heads"]) * int(row["head_dim"]) == size.width
        assert 1 < float(row["mean_atoms"]) <= int(row["atoms"])
    timed = rows[:2] if forces else rows
    for row in timed:
        assert "reason" not in row
        low, *others, high = (float(row[column]) for column in NUMBERS)
        assert 0 < low <= min(others) and max(others) <= high
    if forces:
        assert rows[2]["reason"] == "RuntimeError: no double backward"
        assert not rows[2].keys() & {*NUMBERS, "rounds"}


@pytest.mark.usefixtures("_not_compiled")
def test_a_wrong_result_has_a_reason_and_no_time(monkeypatch):
    monkeypatch.setattr(gk, "geo_attention", perturbed(gk.geo_attention))
    rows = measure("Graphormer-3D-like", "tiny", "cpu", torch.float32, "eager", 1)
    found = {row["function"]: row for row in rows}
    assert "relative error" in found[OURS]["reason"] and "median_ms" not in found[OURS]
    assert "median_ms" in found[ORIGINAL]


def test_what_the_compiler_makes_is_checked_too(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda *inputs: 1.01 * model(*inputs))
    rows = measure("GeoT published", "tiny", "cpu", torch.float32, "eager", 1)
    found = {row["function"]: row for row in rows}
    assert "relative error" in found[COMPILED]["reason"] and "median_ms" in found[OURS]


@every_model
def test_a_step_steps_but_leaves_the_weights_where_they_are(name):
    functions = tiny(name)
    parameters = functions[OURS].parameters
    before = [x.detach().clone() for x in parameters]
    losses = [float(functions[OURS]()) for _ in range(3)]
    assert max(losses) - min(losses) < 1e-6 * losses[0]
    state = functions[OURS].optimizer.state
    assert all(state[x]["step"] == 3 for x in parameters)
    for x, y in zip(parameters, before, strict=True):
        torch.testing.assert_close(x.detach(), y, rtol=1e-7, atol=1e-9)
    check(functions[OURS], functions[ORIGINAL])


@every_model
def test_losses_are_of_energies_and_where_it_says_so_of_forces(name):
    step = tiny(name)[ORIGINAL]
    spec, batch = MODELS[name], step.batch
    energies = step.model(*batch[:3]).detach()
    step.batch = batch._replace(energies=energies + 2)
    expected = 4 + force_error(step) if spec.forces else 2.0
    assert float(step.loss().detach()) == pytest.approx(expected, rel=1e-5)
    if spec.forces:
        assert expected > 4.1


def force_error(step):
    """Mean square, from central differences of the energies."""
    types, positions, mask, _, forces = step.batch
    model, errors = copy.deepcopy(step.model).double(), []
    for b, i in mask.nonzero().tolist():
        for axis in range(3):
            ends = []
            for h in (1e-4, -1e-4):
                moved = positions.double().clone()
                moved[b, i, axis] += h
                ends.append(model(types, moved, mask)[b])
            force = (ends[1] - ends[0]).detach() / 2e-4
            errors.append((force - forces[b, i, axis]) ** 2)
    return float(torch.stack(errors).mean())


@every_model
def test_padding_is_not_learned_from(name):
    functions = tiny(name)
    for step in (functions[OURS], functions[ORIGINAL]):
        mask = step.batch.mask.clone()
        mask[0, -3:] = False
        step.batch = step.batch._replace(mask=mask)
        before, padded = step.results(), ~mask
        step.batch = step.batch._replace(
            atom_types=step.batch.atom_types.masked_fill(padded, 1),
            positions=step.batch.positions.masked_fill(padded[..., None], 1.5),
            forces=step.batch.forces.masked_fill(padded[..., None], 9.0),
        )
        after = step.results()
        for n, x in before.items():
            torch.testing.assert_close(after[n], x, rtol=1e-4, atol=1e-5 * float(x.abs().max()))


def test_memory_of_a_step_is_without_what_other_models_hold(monkeypatch):
    step = tiny("GeoT published")[OURS]
    step()
    parameters = sum(x.nbytes for x in step.parameters)
    small = sum(x.nbytes for x in step.model.buffers()) + 4 * len(step.parameters)  # step numbers
    assert step.held_bytes() == 4 * parameters + small  # with gradients, and two moments
    found = {"synchronize": None, "reset_peak_memory_stats": None}
    found |= {"memory_allocated": 10**8 + step.held_bytes(), "max_memory_allocated": 3 * 10**8}
    for name, value in found.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert models._peak_memory(step, "cuda") == {"peak_memory_mb": "200.0"}
    assert models._peak_memory(step, "cpu") == {}


def test_steps_are_the_same_each_time():
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses += [step.loss().item() for step in tiny("Graphormer-3D-like").values()][:2]
        assert torch.initial_seed() == seed
    assert max(losses) - min(losses) < 1e-5 * losses[0]


@every_model
def test_models_have_the_published_sizes(name):
    size = MODELS[name].sizes["full"]
    assert LAYERS[name] == (size.width, size.heads, size.layers, size.basis)
    assert size.width == 16 * size.heads


def test_a_gradient_of_0_is_like_one_of_0():
    zero = torch.zeros(2)
    assert models._error(zero, zero) == 0
    assert not models._error(zero + 1e-9, zero) < 1e9


def test_original_and_ours_hold_the_same_parameters():
    held = {step.held_bytes() for step in tiny("GeoT published").values()}
    assert len(held) == 1


def test_models_are_made_without_rdkit_and_lightning():
    code = "import sys, bench.models; print({'rdkit', 'lightning'} & set(sys.modules))"
    path = {"PYTHONPATH": "python", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()", done.stderr
