"""Training: batches, what is seen and what is not, interruption, the table of errors."""

import csv
import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from geot_model import callbacks, dataset, results, training
from geot_model.checkpoint import load_checkpoint
from geot_model.dataset import Batches, Settings, Split
from geot_model.molecules import Molecules
from geot_model.qm9 import TARGETS, load_qm9

TINY = Settings(
    targets=("homo", "gap"),
    molecules=60,
    epochs=3,
    batch_size=16,
    learning_rate=3e-3,
    embed_dim=8,
    num_heads=2,
    num_layers=2,
    num_gaussians=8,
    filter_hidden=8,
    num_knots=32,
)


def run(settings, folder, **options):
    """Train quietly."""
    split = options.pop("split", None) or Split.load(settings)
    with open(os.devnull, "w") as nowhere:
        return training.train(settings, split, folder, console=Console(file=nowhere), **options)


def final_state(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


def assert_same_weights(left, right):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0, msg=name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and outcome of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run(TINY, folder)


@pytest.fixture(scope="module")
def sample() -> Molecules:
    return load_qm9()


def batches_of(molecules, size=32, seed=0):
    return Batches(molecules, torch.arange(len(molecules))[:, None].float(), size, seed)


def test_every_molecule_comes_once_an_epoch_with_its_targets(sample):
    batches = batches_of(sample[:101])
    seen = []
    for numbers, positions, mask, targets in batches:
        for row, place in enumerate(targets.flatten().long().tolist()):
            one = sample[place]
            assert numbers[row, mask[row]].tolist() == one.numbers.tolist()
            assert positions[row, mask[row]].tolist() == one.positions.tolist()
            seen.append(place)
    assert sorted(seen) == list(range(101))
    assert len(batches) == len(list(batches)) == 4


def test_batches_depend_on_seed_and_epoch_alone(sample):
    def order(seed, epoch):
        batches = batches_of(sample[:200], seed=seed)
        batches.epoch = epoch
        return [rows.tolist() for rows in batches.rows()]

    assert order(1, 5) == order(1, 5)
    assert order(1, 5) != order(1, 6)
    assert order(1, 5) != order(2, 5)
    # Not only the same batches in another order.
    assert sorted(map(sorted, order(1, 5))) != sorted(map(sorted, order(1, 6)))


def test_little_of_a_batch_is_padding(sample):
    masks = [mask for _, _, mask, _ in batches_of(sample)]
    padded = sum(int((~mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert padded < 0.02


def test_split_is_the_same_again_and_nobody_is_in_two_parts():
    first, second = Split.load(TINY), Split.load(TINY)
    names = [set(part.names) for part in (first.train, first.validation, first.test)]
    assert [len(part) for part in names] == [51, 3, 6]
    assert len(set.union(*names)) == 60
    for field in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(first, field).names, getattr(second, field).names)
    other = Split.load(dataclasses.replace(TINY, seed=1))
    assert set(other.test.names) != set(first.test.names)


def poisoned(molecules: Molecules) -> Molecules:
    """The same molecules with nothing in them that is a number."""
    return dataclasses.replace(
        molecules,
        positions=np.full_like(molecules.positions, np.nan),
        targets={name: np.full_like(v, np.nan) for name, v in molecules.targets.items()},
    )


def test_test_molecules_are_never_seen(finished, tmp_path):
    folder, _ = finished
    clean = Split.load(TINY)
    outcome = run(TINY, tmp_path, split=dataclasses.replace(clean, test=poisoned(clean.test)))
    assert_same_weights(final_state(tmp_path), final_state(folder))
    best, expected = (load_checkpoint(path / "best.pt") for path in (tmp_path, folder))
    assert_same_weights(best.state_dict, expected.state_dict)
    assert best.training == expected.training
    assert best.held_out == tuple(clean.test.names)
    assert all(np.isnan(error.geot) for error in outcome.errors)


def test_targets_are_standardised_on_the_training_split_alone(finished):
    folder, _ = finished
    checkpoint, train = load_checkpoint(folder / "best.pt"), Split.load(TINY).train
    for column, name in enumerate(TINY.targets):
        assert checkpoint.mean[column].item() == pytest.approx(train.targets[name].mean())
        assert checkpoint.std[column].item() == pytest.approx(train.targets[name].std())


def test_only_what_is_announced_is_written(finished):
    folder, outcome = finished
    assert {file.name for file in folder.iterdir()} == {"best.pt", "last.ckpt", "results.csv"}
    assert set(outcome.files) == set(folder.iterdir())


def interrupt_at(monkeypatch, step):
    """Have Ctrl-C come in a training step, counted from 1."""
    original, count = training.TrainingModule.training_step, iter(range(1, 1000))

    def training_step(self, batch, number):
        if next(count) == step:
            raise KeyboardInterrupt
        return original(self, batch, number)

    monkeypatch.setattr(training.TrainingModule, "training_step", training_step)


def test_interrupted_and_resumed_is_as_never_interrupted(finished, tmp_path, monkeypatch):
    folder, outcome = finished
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 7)  # four steps an epoch
        run(TINY, tmp_path)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 0
    settings = training.load_settings(tmp_path)
    assert settings == TINY
    resumed = run(settings, tmp_path, resume=True)
    assert resumed.errors == outcome.errors
    assert resumed.epochs == 3
    assert_same_weights(final_state(tmp_path), final_state(folder))
    best, expected = (load_checkpoint(path / "best.pt") for path in (tmp_path, folder))
    assert_same_weights(best.state_dict, expected.state_dict)
    assert best.training == expected.training


def test_time_limit_stops_after_an_epoch_and_can_be_resumed(finished, tmp_path):
    _, outcome = finished
    stopped = run(TINY, tmp_path, max_minutes=0)
    assert stopped.stopped
    assert stopped.epochs == 1
    resumed = run(TINY, tmp_path, resume=True)
    assert not resumed.stopped
    assert resumed.errors == outcome.errors


def test_best_epoch_is_kept_also_over_an_interruption(tmp_path, monkeypatch):
    settings = dataclasses.replace(TINY, epochs=6, learning_rate=0.05)  # it jumps about
    errors = []
    original = callbacks.Keeper.on_train_epoch_end

    def recording(self, trainer, pl_module):
        errors.append(float(trainer.callback_metrics["validation"]))
        original(self, trainer, pl_module)

    monkeypatch.setattr(callbacks.Keeper, "on_train_epoch_end", recording)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 22)  # in the sixth epoch
        run(settings, tmp_path)
    run(settings, tmp_path, resume=True)
    assert len(errors) == 6
    best = load_checkpoint(tmp_path / "best.pt")
    assert best.training["epoch"] == 1 + int(np.argmin(errors)) < 6
    validation = Split.load(settings).validation
    truth = torch.from_numpy(dataset.target_matrix(validation, settings.targets))
    error = ((results.predict(best, validation) - truth).abs() / best.std).mean()
    assert error.item() == pytest.approx(min(errors), rel=1e-4)


def test_learning_rate_rises_and_falls_to_nothing(finished):
    module = training.TrainingModule(torch.nn.Linear(1, 1), TINY, steps=100)
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"] / TINY.learning_rate)
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(1 / 5)
    assert np.argmax(rates) == 4
    assert np.all(np.diff(rates[4:]) < 0)
    assert rates[52] == pytest.approx(0.5, abs=0.04)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    # Lightning makes a step of it with each batch: 12 in that run.
    state = torch.load(finished[0] / "last.ckpt", weights_only=True)
    assert state["lr_schedulers"][0]["last_epoch"] == state["global_step"] == 12


def test_it_learns(tmp_path):
    changes = {"molecules": 400, "epochs": 10, "batch_size": 8, "embed_dim": 16, "num_layers": 1}
    settings = dataclasses.replace(TINY, targets=("alpha",), learning_rate=1e-2, **changes)
    (error,) = run(settings, tmp_path).errors
    assert error.geot < 0.7 * error.mean


def test_predictions_come_in_the_order_of_the_molecules(finished, sample):
    checkpoint = load_checkpoint(finished[0] / "best.pt")
    together = results.predict(checkpoint, sample[:70])
    apart = torch.cat([results.predict(checkpoint, sample[i]) for i in range(70)])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_element_counts_are_counts(sample):
    counts = results.element_counts(sample[:20], (1, 6, 8))
    for i in range(20):
        numbers = sample[i].numbers.tolist()
        assert counts[i].tolist() == [1, *(numbers.count(z) for z in (1, 6, 8))]


def test_table_has_each_error_and_its_unit(finished, sample):
    folder, outcome = finished
    split = Split.load(TINY)
    checkpoint = load_checkpoint(folder / "best.pt")
    predicted = results.predict(checkpoint, split.test).numpy()
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    text = Console(width=200)
    with text.capture() as capture:
        text.print(outcome.table())
    for column, (error, row) in enumerate(zip(outcome.errors, rows, strict=True)):
        truth, fitted = (part.targets[error.target] for part in (split.test, split.train))
        assert error.geot == pytest.approx(np.abs(predicted[:, column] - truth).mean())
        assert error.mean == pytest.approx(np.abs(fitted.mean() - truth).mean())
        assert row["unit"] == error.unit == TARGETS[error.target]
        assert float(row["mae_geot"]) == error.geot
        assert float(row["mae_linear"]) == error.linear
        line = next(x for x in capture.get().splitlines() if f" {error.target} " in x)
        assert f"{error.geot:.3f}" in line and f"{error.linear:.3f}" in line


def test_linear_model_is_exact_on_what_is_linear(finished):
    split = Split.load(TINY)

    def linear(molecules):
        values = results.element_counts(molecules, (1, 6, 7, 8, 9)) @ [5, 1, -2, 3, 0.5, 4]
        return dataclasses.replace(molecules, targets={"homo": values, "gap": 2 * values})

    parts = (linear(part) for part in (split.train, split.validation, split.test))
    for error in results.measure(load_checkpoint(finished[0] / "best.pt"), Split(*parts)):
        assert error.linear < 1e-9 < error.mean


def test_lightning_says_nothing_wherever_the_folder_goes(tmp_path):
    # In a process of its own: pytest catches what Lightning logs.
    code = """
import shutil
from test_training import TINY, run
run(TINY, "first", max_minutes=0)
shutil.copytree("first", "second")
run(TINY, "second", resume=True)
run(TINY, "second")
"""
    command = [sys.executable, "-W", "default", "-c", code]
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == done.stderr == ""
    for folder in ("first", "second"):
        files = {file.name for file in (tmp_path / folder).iterdir()}
        assert files == {"best.pt", "last.ckpt", "results.csv"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("homo", "lomo")}, "targets: expected names of mu, .*, got 'lomo'"),
        ({"targets": ()}, "targets: .* got none"),
        ({"targets": ("gap", "gap")}, "targets: .* different"),
        ({"data": "qm7"}, "data: expected one of qm9-sample, qm9, got 'qm7'"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a number > 0, got nan"),
        ({"num_heads": 3}, "embed_dim: expected a multiple of num_heads=3, got 8"),
        ({"molecules": 5}, "molecules: expected at least 20, got 5"),
        ({"seed": -1}, "seed: expected 0 to"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_more_molecules_than_there_are_is_refused():
    with pytest.raises(ValueError, match="molecules: expected at most 3000, got 3001"):
        Split.load(dataclasses.replace(TINY, molecules=3001))


def test_damaged_state_of_training_is_refused(finished, tmp_path):
    content = (finished[0] / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(content[:1000])
    with pytest.raises(ValueError, match=r"last\.ckpt: damaged or something else; expected"):
        training.load_settings(tmp_path)
    with pytest.raises(ValueError, match=r"last\.ckpt: no such file; expected"):
        training.load_settings(tmp_path / "nowhere")
