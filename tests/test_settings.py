"""Settings: defaults, YAML there and back, and what is said of wrong ones."""

import inspect
import os

import pytest
import yaml

from geot_model import GeoT
from geot_model.presets import PRESETS
from geot_model.settings import ModelSettings, Settings, SettingsError, parse_assignment


def write(folder, text):
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


EVERYTHING = """
data:
  source: some/mols.csv
  targets: {gap: {unit: eV, readout: mean}, U0: {reference: fitted, readout: sum}, β: null}
  smiles: structure
  name: id
  molecules: 500
split: {kind: file, file: ../split.csv, fractions: [0.8, 0.1, 0.1], seed: 3}
model: {preset: base, num_layers: 2, basis: {num_basis: 32}, score: bias, normalizer: softmax}
training:
  epochs: 7
  learning_rate: 1e-3
  warm_up: 100
  precision: bf16-mixed
  early_stopping: 5
  max_minutes: 2.5
"""


def test_all_is_written_and_read_back(tmp_path):
    settings = Settings.read(write(tmp_path, EVERYTHING))
    (tmp_path / "elsewhere").mkdir()
    saved = tmp_path / "elsewhere" / "saved.yaml"
    settings.write(saved)
    assert Settings.read(saved) == settings != Settings()
    values = yaml.safe_load(saved.read_text(encoding="utf-8"))
    for section, fields in Settings.model_fields.items():
        assert set(values[section]) == set(fields.annotation.model_fields)
    assert list(values["data"]["targets"]) == ["gap", "U0", "β"]


def test_a_saved_configuration_outlives_its_preset(tmp_path, monkeypatch):
    settings = Settings(model={"preset": "base"})
    settings.write(tmp_path / "config.yaml")
    monkeypatch.setitem(PRESETS, "base", {"embed_dim": 8, "num_heads": 1})
    assert Settings.read(tmp_path / "config.yaml") == settings


def test_nothing_given_is_the_defaults(tmp_path):
    assert Settings.read(write(tmp_path, "")) == Settings()
    assert Settings.read(write(tmp_path, "training:\n  # epochs: 5\n")) == Settings()
    assert list(Settings().data.targets) == ["homo", "lumo", "gap"]


def test_numbers_may_be_written_as_people_write_them(tmp_path):
    training = Settings.read(
        write(tmp_path, "training: {learning_rate: 1e-3, precision: 32, epochs: 1_000}")
    ).training
    assert (training.learning_rate, training.precision, training.epochs) == (0.001, "32", 1000)


def test_relative_paths_begin_at_the_folder_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = write(tmp_path, EVERYTHING)
    settings = Settings.read(os.path.relpath(path))
    assert settings.data.source == str(tmp_path / "some" / "mols.csv")
    assert settings.split.file.resolve() == tmp_path.parent / "split.csv"
    # Of an option, they begin where the user is; names of data sets are no paths.
    changed = Settings.read(path, {"data": {"source": "mine.csv"}})
    assert changed.data.source == str(tmp_path / "here" / "mine.csv")
    assert Settings.read(write(tmp_path, "data: {source: qm9}")).data.source == "qm9"


def test_presets_fill_in_what_is_not_given():
    model = Settings(model={"preset": "base", "num_layers": 3, "basis": {"num_basis": 9}}).model
    arguments = model.arguments()
    basis = {"gamma": None, **PRESETS["base"]["basis"], "num_basis": 9}
    for name, value in (PRESETS["base"] | {"num_layers": 3, "basis": basis}).items():
        assert arguments[name] == value


def test_another_preset_leaves_nothing_of_the_old_one(tmp_path):
    Settings(model={"preset": "tiny", "score": "bias"}).write(tmp_path / "config.yaml")
    changes = {"model": {"preset": "published"}}
    changed = Settings.read(tmp_path / "config.yaml", changes)
    assert changed.model == Settings(**changes).model
    assert Settings(model={"num_layers": 9}).change(**changes) == changed


def test_other_targets_replace_the_old_ones_and_other_changes_do_not():
    settings = Settings(data={"targets": {"mu": {"readout": "sum"}}}, training={"epochs": 3})
    changed = settings.change(data={"targets": "homo, U0"}, training={"batch_size": 8})
    assert list(changed.data.targets) == ["homo", "U0"]
    assert (changed.training.epochs, changed.training.batch_size) == (3, 8)
    assert settings.data.targets.keys() == {"mu"}
    some = changed.change(data={"targets": {"homo": {"readout": "sum"}, "mu": {}}})
    readouts = {name: target.readout for name, target in some.data.targets.items()}
    assert readouts == {"homo": "sum", "U0": "sum", "mu": "dipole"}


def test_changes_come_one_after_the_other(tmp_path):
    path = write(tmp_path, "data: {targets: [gap]}")
    targets = {"data": {"targets": "mu, U0"}}, {"data": {"targets": {"mu": {"readout": "sum"}}}}
    for settings in (Settings.read(path, *targets), Settings.of(*targets)):
        readouts = {name: target.readout for name, target in settings.data.targets.items()}
        assert readouts == {"mu": "sum", "U0": "sum"}
    added = Settings.read(path, targets[1]).data.targets
    assert {name: target.readout for name, target in added.items()} == {"gap": "mean", "mu": "sum"}


def test_model_settings_are_the_arguments_of_the_model():
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(GeoT).parameters.items()
        # What the targets, the data and the machine decide.
        if name not in ("num_targets", "readout", "elements", "output_offset", "backend")
    }
    assert ModelSettings.model_fields.keys() - {"preset"} == defaults.keys()
    for name in defaults.keys() - {"basis"}:
        assert ModelSettings.model_fields[name].default == defaults[name], name


@pytest.mark.parametrize(
    ("target", "readout", "reference"),
    [("mu", "dipole", "none"), ("U0", "sum", "published"), ("gap", "mean", "none")],
)
def test_targets_of_qm9_are_learned_as_is_usual(target, readout, reference):
    def learned(**data):
        chosen = Settings(data=data).data.targets[target]
        return chosen.readout, chosen.reference

    assert learned(source="qm9", targets=[target]) == (readout, reference)
    assert learned(targets={target: {"readout": "pooled"}}) == ("pooled", reference)
    # In another file a column of that name may be anything.
    assert learned(source="mine.csv", targets=[target]) == ("mean", "none")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"epochs": 0}}, "training.epochs: expected at least 1, got 0"),
        ({"training": {"epochs": 1.5}}, "training.epochs: expected a whole number, got 1.5"),
        ({"training": {"epochs": None}}, "training.epochs: expected a whole number, got none"),
        ({"training": {"epoch": 3}}, "training.epoch: no such setting; did you mean 'epochs'?"),
        ({"traning": {}}, "traning: no such setting; did you mean 'training'?"),
        ({"xyz": {}}, "xyz: no such setting; expected one of data, split, model, training"),
        ({"training": 3}, "training: expected a section of settings, got 3"),
        (
            {"training": {"learning_rate": float("nan")}},
            "training.learning_rate: expected a finite number, got nan",
        ),
        (
            {"training": {"learning_rate": 0}},
            "training.learning_rate: expected more than 0, got 0",
        ),
        (
            {"training": {"learning_rate": "fast"}},
            "training.learning_rate: expected a number, got 'fast'",
        ),
        ({"training": {"ema": 1}}, "training.ema: expected less than 1, got 1"),
        (
            {"training": {"precision": 16}},
            "training.precision: expected one of 32, bf16-mixed, got '16'",
        ),
        ({"training": {"seed": -1}}, "training.seed: expected at least 0, got -1"),
        ({"model": {"preset": "big"}}, "model.preset: expected one of tiny, base, published, got"),
        ({"model": {"preset": ["tiny"]}}, "model.preset: expected one of tiny, base, published"),
        (
            {"model": {"embed_dim": 10, "num_heads": 3}},
            "model.embed_dim: expected a multiple of num_heads=3, got 10",
        ),
        ({"model": {"parallel": "maybe"}}, "model.parallel: expected true or false, got 'maybe'"),
        (
            {"model": {"basis": {"num": 3}}},
            "model.basis.num: no such setting; expected one of num_basis, r_max, gamma",
        ),
        ({"data": {"targets": []}}, "data.targets: expected one or several, got none"),
        ({"data": {"targets": ["gap", "gap"]}}, "data.targets: expected different ones, got gap,"),
        ({"data": {"targets": 3}}, "data.targets: expected names, or a mapping of names to set"),
        (
            {"data": {"targets": {"gap": {"unt": "eV"}}}},
            "data.targets.gap.unt: no such setting; did you mean 'unit'?",
        ),
        (
            {"data": {"targets": {"gap": {"readout": "max"}}}},
            "data.targets.gap.readout: expected one of pooled, sum, mean, dipole, got 'max'",
        ),
        ({"data": {"source": None}}, "data.source: expected text, got none"),
        ({"split": {"fractions": [0.5, 0.6, 0]}}, "split.fractions: expected three with sum 1"),
        ({"split": {"fractions": [1, 0]}}, "split.fractions.2: expected a value"),
        ({"split": {"kind": "file"}}, "split.file: expected one for the kind 'file' alone, got n"),
        (
            {"split": {"file": "a.csv"}},
            "split.file: expected one for the kind 'file' alone, got a",
        ),
    ],
)
def test_wrong_settings_are_named_in_one_line(sections, message):
    with pytest.raises(SettingsError) as caught:
        Settings(**sections)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {epochs: 3", r"config\.yaml:1: expected YAML: .*"),
        ("a: 1\nb: : 2", r"config\.yaml:2: expected YAML: .*"),
        (
            "- 1\n- 2",
            r"config\.yaml: expected YAML with sections \(data, split, model, training\)",
        ),
        ("1: {epochs: 3}", r"config\.yaml: expected YAML with sections .*"),
        ("training: {epochs: 0}", "training.epochs: expected at least 1, got 0"),
    ],
)
def test_files_that_are_no_configuration_are_refused(tmp_path, text, message):
    with pytest.raises(SettingsError, match=rf"{message}\Z"):
        Settings.read(write(tmp_path, text))


def test_yaml_cannot_run_code(tmp_path):
    path = write(tmp_path, "data: !!python/object/apply:os.mkdir [made]")
    with pytest.raises(SettingsError, match="expected YAML"):
        Settings.read(path)


def test_settings_cannot_be_changed():
    settings = Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.training.epochs = 3


def test_assignments_are_yaml():
    assert parse_assignment("model.basis.num_basis=5") == {"model": {"basis": {"num_basis": 5}}}
    assert parse_assignment("data.targets=[a, b]") == {"data": {"targets": ["a", "b"]}}
    assert parse_assignment("data.name=x=y") == {"data": {"name": "x=y"}}
    assert parse_assignment("training.max_minutes=") == {"training": {"max_minutes": None}}


@pytest.mark.parametrize("text", ["epochs=3", "training.epochs", ".epochs=3", "a.b=[1"])
def test_assignments_of_another_form_are_refused(text):
    with pytest.raises(SettingsError, match="--set: expected"):
        parse_assignment(text)
