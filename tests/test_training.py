"""Training: what is learned from and what is not, interruption, averages, the files of a run."""

import csv
import dataclasses
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from geot_model import callbacks, training
from geot_model.batches import Batches
from geot_model.checkpoint import load_model
from geot_model.molecules import Molecules
from geot_model.prediction import predict
from geot_model.settings import Settings
from geot_model.splits import Split
from geot_model.training import load_split

TINY = Settings(
    data={"targets": ["homo", "gap"], "molecules": 60},
    model={
        **{"embed_dim": 8, "num_heads": 2, "num_layers": 1, "readout_dim": 8},
        **{"filter_hidden": 8, "num_knots": 32, "basis": {"num_basis": 8}},
    },
    training={"epochs": 3, "batch_size": 16, "learning_rate": 3e-3},
)
FILES = {
    *("model.safetensors", "last.ckpt", "config.yaml", "results.csv", "learning-curve.png"),
    "log",
}


def run(settings, folder, **options):
    """Train quietly."""
    split = options.pop("split", None) or load_split(settings)[0]
    with open(os.devnull, "w") as nowhere:
        return training.train(settings, split, folder, console=Console(file=nowhere), **options)


def final_state(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)


def rows_of(folder):
    with (folder / "log" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_weights(left, right):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0, msg=name)


def assert_same_run(folder, other):
    for kind in ("state_dict", "current_model_state"):
        assert_same_weights(final_state(folder)[kind], final_state(other)[kind])
    best, expected = (load_model(path / "model.safetensors") for path in (folder, other))
    assert_same_weights(best.state_dict(), expected.state_dict())
    assert best.card.training["epoch"] == expected.card.training["epoch"]
    assert rows_of(folder) == rows_of(other)


def error_of(model, molecules):
    """Mean absolute error in standard deviations, as training has it."""
    scaler = model.card.scaler
    found = predict(model, molecules).values
    truth = np.stack([molecules.targets[name] for name in scaler.names], axis=1)
    return np.nanmean(np.abs(found - truth) / np.array(scaler.std))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and outcome of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run(TINY, folder)


def test_split_is_the_same_again_and_nobody_is_in_two_parts():
    (first, _), (second, _) = load_split(TINY), load_split(TINY)
    names = [set(part.names) for part in (first.train, first.validation, first.test)]
    assert [len(part) for part in names] == [51, 3, 6]
    assert len(set.union(*names)) == 60
    for field in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(first, field).names, getattr(second, field).names)
    other, _ = load_split(TINY.change(split={"seed": 1}))
    assert set(other.test.names) != set(first.test.names)
    # Another seed of the weights is not another split.
    same, _ = load_split(TINY.change(training={"seed": 1}))
    np.testing.assert_array_equal(same.test.names, first.test.names)


def poisoned(molecules: Molecules) -> Molecules:
    """The same molecules with nothing in them that is a number."""
    return dataclasses.replace(
        molecules,
        positions=np.full_like(molecules.positions, np.nan),
        targets={name: np.full_like(v, np.nan) for name, v in molecules.targets.items()},
    )


def test_test_molecules_are_never_seen(finished, tmp_path):
    folder, _ = finished
    clean, _ = load_split(TINY)
    outcome = run(TINY, tmp_path, split=dataclasses.replace(clean, test=poisoned(clean.test)))
    assert_same_run(tmp_path, folder)
    assert load_model(tmp_path / "model.safetensors").card.held_out == tuple(clean.test.names)
    assert all(np.isnan(error.geot) for error in outcome.errors)


def test_targets_are_scaled_by_the_training_split_alone(finished):
    scaler = load_model(finished[0] / "model.safetensors").card.scaler
    train = load_split(TINY)[0].train
    assert scaler.names == ("homo", "gap")
    for name, mean, std in zip(scaler.names, scaler.mean, scaler.std, strict=True):
        assert mean == pytest.approx(train.targets[name].mean())
        assert std == pytest.approx(train.targets[name].std())


def test_only_what_is_announced_is_written(finished):
    folder, outcome = finished
    assert {file.name for file in folder.iterdir()} == FILES
    assert set(outcome.files) == set(folder.iterdir())


def test_saved_configuration_reproduces_the_run(finished, tmp_path):
    settings = Settings.read(finished[0] / "config.yaml")
    assert settings == TINY
    run(settings, tmp_path)
    assert_same_run(tmp_path, finished[0])


def test_seed_is_of_weights(tmp_path):
    still = TINY.change(training={"epochs": 1, "learning_rate": 1e-30})  # the order is nothing
    for seed in (0, 1):
        run(still.change(training={"seed": seed}), tmp_path / str(seed))
    first, second = (float(rows_of(tmp_path / str(seed))[0]["training"]) for seed in (0, 1))
    assert abs(first - second) > 1e-3


def test_seed_is_of_the_order(split, monkeypatch, tmp_path):
    seen = []
    original = training.TrainingModule.training_step

    def training_step(self, batch, number):
        seen.append(batch.targets[:, 0].tolist())
        return original(self, batch, number)

    monkeypatch.setattr(training.TrainingModule, "training_step", training_step)
    for seed in (0, 1):
        changed = TINY.change(training={"epochs": 2, "seed": seed})
        run(changed, tmp_path / str(seed), split=split)
    epochs = [seen[start : start + 4] for start in range(0, 16, 4)]
    assert all(epochs[i] != epochs[j] for i in range(4) for j in range(i))
    assert (
        len({tuple(sorted(value for batch in epoch for value in batch)) for epoch in epochs}) == 1
    )


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
    assert final_state(tmp_path)["epoch"] == 0
    settings = training.load_settings(tmp_path)
    assert settings == TINY
    resumed = run(settings, tmp_path, resume=True)
    assert resumed.errors == outcome.errors
    assert resumed.epochs == 3
    assert_same_run(tmp_path, folder)


def test_what_was_logged_after_the_state_was_saved_is_logged_once(finished, tmp_path, monkeypatch):
    original = callbacks.SettingsSaver.on_save_checkpoint

    def interrupted(*arguments):
        if len(rows_of(tmp_path)) == 2:
            raise KeyboardInterrupt
        original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(callbacks.SettingsSaver, "on_save_checkpoint", interrupted)
        run(TINY, tmp_path)
    assert final_state(tmp_path)["epoch"] == 0
    run(TINY, tmp_path, resume=True)
    assert rows_of(tmp_path) == rows_of(finished[0])


def test_time_limit_stops_after_an_epoch_and_can_be_resumed(finished, tmp_path):
    stopped = run(TINY.change(training={"max_minutes": 0}), tmp_path)
    assert stopped.stopped
    assert stopped.epochs == 1
    resumed = run(training.load_settings(tmp_path), tmp_path, resume=True)
    assert not resumed.stopped
    assert resumed.errors == finished[1].errors


# It jumps about, and the averages are far from the weights.
WILD = TINY.change(
    training={"epochs": 6, "learning_rate": 0.05, "decay": 1.0, "ema": 0.6, "warm_up": 0}
)


def test_best_average_is_kept_also_over_an_interruption(tmp_path, monkeypatch):
    errors, weights = [], []
    original = callbacks.Keeper.on_train_epoch_end

    def recording(self, trainer, pl_module):
        errors.append(float(trainer.callback_metrics["validation"]))
        weights.append({k: v.clone() for k, v in pl_module.model.state_dict().items()})
        original(self, trainer, pl_module)

    monkeypatch.setattr(callbacks.Keeper, "on_train_epoch_end", recording)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 22)  # in the sixth epoch
        run(WILD, tmp_path)
    run(WILD, tmp_path, resume=True)
    assert len(errors) == 6
    best, number = load_model(tmp_path / "model.safetensors"), int(np.argmin(errors))
    assert best.card.training["epoch"] == 1 + number < 6
    validation = load_split(WILD)[0].validation
    assert error_of(best, validation) == pytest.approx(min(errors), rel=1e-4)
    # The weights themselves would have had another error.
    best.load_state_dict(weights[number])
    assert error_of(best, validation) != pytest.approx(min(errors), rel=1e-2)


def test_each_validation_is_of_the_averages_of_that_epoch(tmp_path, monkeypatch):
    """Not of the tables that the attention keeps of other weights."""
    found = []
    original = callbacks.Keeper.on_train_epoch_end

    def recording(self, trainer, pl_module):
        original(self, trainer, pl_module)
        model = load_model(tmp_path / "model.safetensors")
        model.load_state_dict(self.averaging.averaged().model.state_dict())
        logged = trainer.callback_metrics["validation"].item()
        found.append((error_of(model, validation), logged))

    validation = load_split(WILD)[0].validation
    monkeypatch.setattr(callbacks.Keeper, "on_train_epoch_end", recording)
    run(WILD, tmp_path)
    fresh, logged = np.array(found).T
    assert len(np.unique(logged)) == 6
    np.testing.assert_allclose(fresh, logged, rtol=1e-4)


def test_average_forgets_the_first_weights_soon():
    averaging, weight = callbacks.Averaging(0.999), torch.zeros(1)
    for step in range(100):
        averaging._latest_update_step = step
        averaging._update([weight], [torch.ones(1)], None)
    assert weight.item() > 0.999
    averaging._latest_update_step = 10**6
    averaging._update([weight], [torch.zeros(1)], None)
    assert weight.item() == pytest.approx(0.999, abs=1e-3)


def test_without_averaging_the_weights_are_kept(tmp_path):
    run(TINY.change(training={"ema": 0, "epochs": 1}), tmp_path)
    state = final_state(tmp_path)
    assert "current_model_state" not in state
    best = load_model(tmp_path / "model.safetensors").state_dict()
    assert_same_weights(
        {f"model.{name}": value for name, value in best.items()}, state["state_dict"]
    )


def module_of(split, steps=100, **changes):
    settings = TINY.change(training=changes)
    scaler = training.TargetScaler.fit(
        split.train, ("homo", "gap"), ("mean", "mean"), {"homo": "none", "gap": "none"}
    )
    card = training._card(settings, split, scaler)
    return training.TrainingModule(training.build_model(card), settings, steps, scaler)


@pytest.fixture(scope="module")
def split() -> Split:
    return load_split(TINY)[0]


@pytest.mark.parametrize(("warm_up", "steps"), [(0.05, 5), (20, 20), (0, 0)])
def test_learning_rate_rises_and_falls(split, warm_up, steps):
    configured = module_of(split, warm_up=warm_up, decay=0.01).configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"] / TINY.training.learning_rate)
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(rates[:steps], np.arange(1, steps + 1) / max(steps, 1))
    fall = np.array(rates[max(steps - 1, 0) :])
    np.testing.assert_allclose(fall[1:] / fall[:-1], 0.01 ** (1 / (100 - steps)))
    assert rates[-1] == pytest.approx(0.01)


def test_learning_rate_moves_with_each_step(finished):
    state = final_state(finished[0])
    assert state["lr_schedulers"][0]["last_epoch"] == state["global_step"] == 12


def test_optimizer_is_adam_with_amsgrad(split):
    plain = module_of(split).configure_optimizers()["optimizer"]
    decaying = module_of(split, weight_decay=0.1).configure_optimizers()["optimizer"]
    assert (type(plain), type(decaying)) == (torch.optim.Adam, torch.optim.AdamW)
    assert plain.defaults["amsgrad"] and decaying.defaults["amsgrad"]
    assert decaying.defaults["weight_decay"] == 0.1


def with_unknown(molecules, generator):
    """Molecules of which about half of the targets are not known."""
    targets = {
        name: np.where(generator.random(len(molecules)) < 0.5, values, np.nan)
        for name, values in molecules.targets.items()
    }
    return dataclasses.replace(molecules, targets=targets)


def test_unknown_targets_count_for_nothing(split):
    molecules = with_unknown(split.train, np.random.default_rng(0))
    module = module_of(split)
    module._sums = {"training": torch.zeros(2, 2, dtype=torch.float64)}
    module.trainer = type("Trainer", (), {"world_size": 1})()
    targets = module.scaler.scale(molecules)
    (batch,) = Batches(molecules, targets, len(molecules))
    loss = module.training_step(batch, 0)
    loss.backward()
    out = module.model(batch.numbers, batch.positions, ptr=batch.ptr, max_atoms=batch.max_atoms)
    known = batch.targets.isfinite()
    expected = (out[known] - batch.targets[known]).abs().mean()
    assert 0.3 < known.float().mean() < 0.7
    torch.testing.assert_close(loss, expected)
    parameters = dict(module.model.named_parameters())
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    for name, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameters[name].grad, gradient, msg=name)


def test_run_with_unknown_targets_logs_what_the_model_does(split, tmp_path):
    generator = np.random.default_rng(1)
    parts = {n: with_unknown(getattr(split, n), generator) for n in ("train", "validation")}
    holey = dataclasses.replace(split, **parts)
    run(TINY.change(training={"epochs": 1}), tmp_path, split=holey)
    (row,) = rows_of(tmp_path)
    model = load_model(tmp_path / "model.safetensors")
    assert error_of(model, holey.validation) == pytest.approx(float(row["validation"]), rel=1e-4)
    found = predict(model, holey.validation).values[:, 1]
    error = np.nanmean(np.abs(found - holey.validation.targets["gap"]))
    assert float(row["mae/gap"]) == pytest.approx(error, rel=1e-4)


def test_early_stopping(tmp_path):
    changes = {"learning_rate": 1e-30, "early_stopping": 2, "epochs": 9, "ema": 0}
    outcome = run(TINY.change(training=changes), tmp_path)  # nothing ever gets better
    assert outcome.epochs == 3
    assert not outcome.stopped


def test_clipping_bounds_the_step(finished, tmp_path):
    """Gradients far below Adam's epsilon do next to nothing."""
    run(TINY.change(training={"clip": 1e-12}), tmp_path)
    errors = [float(row["validation"]) for row in rows_of(tmp_path)]
    assert np.ptp(errors) < 1e-3 < np.ptp([float(r["validation"]) for r in rows_of(finished[0])])


def test_mixed_precision_is_another_path_to_about_the_same(finished, tmp_path):
    run(TINY.change(training={"precision": "bf16-mixed"}), tmp_path)
    for mixed, single in zip(rows_of(tmp_path), rows_of(finished[0]), strict=True):
        assert mixed["training"] != single["training"]
        assert float(mixed["training"]) == pytest.approx(float(single["training"]), rel=0.03)
    state = load_model(tmp_path / "model.safetensors").state_dict()
    assert all(
        value.dtype == torch.float32 for value in state.values() if value.is_floating_point()
    )


def test_divergence_is_an_error(tmp_path):
    with pytest.raises(
        callbacks.DivergedError, match=r"training error of epoch 1 is .*learning_rate"
    ):
        run(TINY.change(training={"learning_rate": 1e30, "warm_up": 0, "clip": 0}), tmp_path)


def test_it_learns(tmp_path):
    settings = TINY.change(
        data={"targets": ["alpha"], "molecules": 400},
        model={"embed_dim": 16},
        training={"epochs": 10, "batch_size": 8, "learning_rate": 1e-2},
    )
    (error,) = run(
        settings.change(data={"targets": {"alpha": {"readout": "sum"}}}), tmp_path
    ).errors
    assert error.geot < 0.7 * error.mean


def tags_of(file):
    """Names of what a file of TensorBoard's events holds, which are records with checksums."""
    content, place, tags = file.read_bytes(), 0, []
    while place < len(content):
        (length,) = struct.unpack("<Q", content[place : place + 8])
        event = Event.FromString(content[place + 12 : place + 12 + length])
        tags += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        place += length + 16
    return tags


def test_tensorboard_gets_what_the_table_gets(finished):
    folder, _ = finished
    (file,) = (folder / "log").glob("events.*")
    tags = tags_of(file)
    for row in rows_of(folder):
        for name in ("training", "validation", "mae/homo", "mae/gap", "learning_rate"):
            values = [v for tag, step, v in tags if (tag, step) == (name, int(row["step"]))]
            assert values == pytest.approx([float(row[name])])


def test_learning_curve_is_a_picture_of_all_epochs(finished, tmp_path):
    picture = imread(finished[0] / "learning-curve.png")[..., :3]
    assert min(picture.shape[:2]) >= 400
    for colour in ((0, 114, 178), (213, 94, 0)):  # of training and validation
        near = (np.abs(picture * 255 - np.array(colour)).max(axis=-1) < 8).any(axis=0)
        assert np.ptp(np.flatnonzero(near)) > 0.5 * picture.shape[1]


def test_molecules_with_elements_never_learned_are_left_out(tmp_path):
    sample = training.read("qm9-sample").molecules
    fluorine = np.array([9 in sample.molecule(i).numbers for i in range(len(sample))])
    chosen = np.concatenate([np.flatnonzero(~fluorine)[:30], np.flatnonzero(fluorine)[:3]])
    names = sample.names[chosen]
    parts = ["train"] * 24 + ["validation"] * 3 + ["test"] * 3 + ["validation", "test", "test"]
    part_of = dict(zip(names, parts, strict=True))
    lines = [f"{name},{part_of.get(name, '')}" for name in sample.names]
    (tmp_path / "split.csv").write_text("\n".join(["name,split", *lines]))
    settings = TINY.change(
        data={"molecules": None}, split={"kind": "file", "file": tmp_path / "split.csv"}
    )
    split, problems = load_split(settings)
    assert [len(part) for part in (split.train, split.validation, split.test)] == [24, 3, 3]
    assert [line for line in problems if "left out" in line] == [
        "validation: 1 molecules left out: no training molecule has their elements",
        "test: 2 molecules left out: no training molecule has their elements",
    ]


def test_units_of_the_settings_are_those_of_the_table(tmp_path):
    settings = TINY.change(
        data={"targets": {"gap": {"unit": "electronvolt"}}}, training={"epochs": 1}
    )
    _, error = run(settings, tmp_path).errors
    assert error.unit == "electronvolt"


def test_too_few_molecules_are_refused():
    with pytest.raises(ValueError, match=r"split: expected some molecules .* for validation"):
        load_split(TINY.change(data={"molecules": 3}))
    with pytest.raises(ValueError, match=r"data\.molecules: expected at most 3000, got 3001"):
        load_split(TINY.change(data={"molecules": 3001}))


def test_more_gpus_than_there_are_are_refused(tmp_path):
    there = torch.cuda.device_count()
    settings = TINY.change(training={"accelerator": "gpu", "devices": there + 1})
    with pytest.raises(ValueError, match=rf"devices: expected at most the {there} GPUs"):
        run(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_lightning_says_nothing_wherever_the_folder_goes(tmp_path):
    # In a process of its own: pytest catches what Lightning logs.
    code = """
import shutil
from test_training import TINY, run
run(TINY.change(training={"max_minutes": 0}), "first")
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
        assert {file.name for file in (tmp_path / folder).iterdir()} == FILES
    assert [row["epoch"] for row in rows_of(tmp_path / "second")] == ["0", "1", "2"]


def test_damaged_state_of_training_is_refused(finished, tmp_path):
    content = (finished[0] / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(content[:1000])
    with pytest.raises(ValueError, match=r"last\.ckpt: damaged or something else; expected"):
        training.load_settings(tmp_path)
    with pytest.raises(ValueError, match=r"last\.ckpt: no such file; expected"):
        training.load_settings(tmp_path / "nowhere")
