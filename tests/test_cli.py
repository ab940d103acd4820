"""The command `geot`, as its user sees it."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_training import FILES, TINY, interrupt_at
from typer.testing import CliRunner

import geot_model
from geot_model import cli, explain, training
from geot_model.__main__ import main
from geot_model.checkpoint import load_model
from geot_model.settings import Settings

EPOCHS = 2


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A configuration of a small and short run."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    TINY.change(training={"epochs": EPOCHS}).write(path)
    return path


def geot(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    result = geot("train", config, "-o", folder)
    assert result.exit_code == 0, result.output
    return folder, result


def listed_files(output):
    return [
        Path(line.strip())
        for line in output.partition("written:")[2].splitlines()
        if line.startswith("  ")
    ]


def assert_one_clear_line(result, *parts):
    assert result.exit_code in (1, 2)
    assert re.fullmatch(r"geot: .+\n", result.stderr)
    for part in parts:
        assert str(part) in result.stderr


def test_train_ends_with_the_table_and_the_files(trained):
    folder, result = trained
    header, *rows = (
        line for line in result.stdout.splitlines() if line.count("eV") or "GeoT" in line
    )
    assert header.index("GeoT") < header.index("linear model") < header.index("always the mean")
    assert [row.split()[1] for row in rows] == ["homo", "gap"]
    assert "epoch   2/2" in result.stdout
    files = listed_files(result.stdout)
    assert {file.name for file in files} == FILES
    assert all(file.exists() and file.parent == folder for file in files)
    assert result.stderr == ""


def chosen_settings(monkeypatch, *arguments):
    """The settings with which `geot train` would train."""
    chosen = []

    def load_split(settings):
        chosen.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr(training, "load_split", load_split)
    result = geot("train", *arguments)
    assert_one_clear_line(result, "enough")
    return chosen[0]


def test_options_are_settings(monkeypatch, tmp_path):
    options = [
        *("--data", "qm9", "--targets", "mu,U0", "--molecules", 50, "--preset", "base"),
        *("--epochs", 7, "--batch-size", 8, "--lr", 0.01, "--seed", 3, "--max-minutes", 2),
        *("--precision", "bf16-mixed", "--devices", 1, "--set", "model.num_layers=2"),
        *("--set", "data.targets.mu.readout=sum", "--set", "split.seed=4"),
    ]
    expected = Settings(
        data={"source": "qm9", "molecules": 50, "targets": {"mu": {"readout": "sum"}, "U0": {}}},
        split={"seed": 4},
        model={"preset": "base", "num_layers": 2},
        training={
            **{"epochs": 7, "batch_size": 8, "learning_rate": 0.01, "seed": 3, "max_minutes": 2},
            "precision": "bf16-mixed",
        },
    )
    assert chosen_settings(monkeypatch, "-o", tmp_path, *options) == expected
    assert chosen_settings(monkeypatch, "-o", tmp_path) == Settings()


def test_options_change_the_configuration(monkeypatch, tmp_path, config):
    options = ["--epochs", 9, "--set", "training.ema=0"]
    found = chosen_settings(monkeypatch, config, "-o", tmp_path, *options)
    assert found == TINY.change(training={"epochs": 9, "ema": 0})


def test_a_run_is_not_overwritten(trained, config):
    folder, _ = trained
    before = (folder / "model.safetensors").read_bytes()
    assert_one_clear_line(geot("train", config, "-o", folder), folder, "--resume")
    assert (folder / "model.safetensors").read_bytes() == before


def test_resume_goes_on_with_the_settings_of_the_run(tmp_path, config):
    first = geot("train", config, "-o", tmp_path, "--max-minutes", 0)
    assert "the time was up after 1 of 2 epochs" in first.stdout
    second = geot("train", "-o", tmp_path, "--resume", "--max-minutes", 60)
    assert second.exit_code == 0
    assert "epoch   2/2" in second.stdout
    assert "epoch   1/2" not in second.stdout
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["model"]["embed_dim"] == 8
    assert saved["training"]["max_minutes"] == 60


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--lr", 0.1], "--learning-rate"),
        (["--set", "model.num_layers=3"], "--set"),
        (["tiny.yaml"], "CONFIG"),
    ],
)
def test_resume_refuses_other_settings(trained, arguments, named):
    result = geot("train", "-o", trained[0], "--resume", *arguments)
    assert_one_clear_line(result, f"{named}: cannot be changed with --resume")


@pytest.mark.parametrize("step", [1, 5])
def test_interruption_says_how_to_go_on(tmp_path, monkeypatch, config, step):
    interrupt_at(monkeypatch, step)
    result = geot("train", config, "-o", tmp_path)
    assert result.exit_code == 130
    expected = "nothing to go on from" if step == 1 else f"geot train --resume -o {tmp_path}"
    assert expected in result.stderr


def test_divergence_is_said_in_a_line(tmp_path, config):
    options = ["--lr", 1e30, "--set", "training.warm_up=0", "--set", "training.clip=0"]
    result = geot("train", config, "-o", tmp_path, *options)
    assert_one_clear_line(result, "the training error of epoch 1", "learning_rate")


@pytest.fixture
def molecules(tmp_path):
    file = tmp_path / "some.csv"
    file.write_text("id,SMILES\nethanol,CCO\nbroken,C1CC\nbromo,CBr\nbenzene,c1ccccc1\n")
    return file


def test_predict_reports_by_line_and_predicts_the_rest(trained, molecules, tmp_path):
    output = tmp_path / "new" / "out.csv"
    result = geot("predict", trained[0], molecules, "-o", output, "--name-column", "id")
    assert result.exit_code == 0
    broken, bromine = result.stderr.splitlines()
    assert f"{molecules}:3" in broken and "C1CC" in broken
    assert "bromo" in bromine and "Br" in bromine
    with output.open(newline="", encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    model = load_model(trained[0] / "model.safetensors")
    expected = model.predict(training.read(molecules, name="id").molecules)
    for name, values in zip(expected.names, expected.values, strict=True):
        if np.isfinite(values).all():
            found = [float(v) for key, v in rows[name].items() if key.startswith(("homo", "gap"))]
            assert found == pytest.approx(values.tolist(), rel=1e-4)
    assert {"ethanol", "benzene"} <= rows.keys()
    assert "predicted 2 of 3 molecules that could be read" in result.stdout
    assert listed_files(result.stdout) == [output]


def test_predict_fails_where_nothing_can_be_predicted(trained, tmp_path):
    (tmp_path / "salt.smi").write_text("[Na+].[Cl-] salt\n")
    result = geot("predict", trained[0], tmp_path / "salt.smi", "-o", tmp_path / "out.csv")
    assert result.exit_code == 1
    assert "salt" in result.stderr and "no molecule to predict" in result.stderr
    assert not (tmp_path / "out.csv").exists()


@pytest.fixture
def explained(monkeypatch):
    """What `explain.run` is asked for; it writes nothing."""
    asked = []

    def run(model, data, folder, complain, **options):
        complain("a complaint")
        asked.append((data.molecules.names.tolist(), folder, options))
        return [folder / "page.html"] if len(data.molecules) else []

    monkeypatch.setattr(explain, "run", run)
    return asked


def test_explain_explains_the_file(trained, molecules, tmp_path, explained):
    options = ["--pairs", 3, "--method", "raw", "--target", "gap", "--name-column", "id"]
    result = geot("explain", trained[0], molecules, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0
    assert explained == [
        (
            ["ethanol", "bromo", "benzene"],
            tmp_path / "out",
            {"num_pairs": 3, "target": "gap", "method": "raw"},
        )
    ]
    assert f"{molecules}:3" in result.stderr and "geot: a complaint\n" in result.stderr
    assert listed_files(result.stdout) == [tmp_path / "out" / "page.html"]


def test_explain_without_file_takes_what_was_never_seen(trained, tmp_path, explained):
    result = geot("explain", trained[0], "-o", tmp_path, "--count", 2)
    assert result.exit_code == 0
    names, _, options = explained[0]
    assert len(names) == 2
    assert set(names) <= set(training.load_split(TINY)[0].test.names)
    assert options == {"num_pairs": 5, "target": None}


def test_explain_fails_where_nothing_can_be_explained(trained, tmp_path, explained):
    (tmp_path / "bad.smi").write_text("C1CC broken\n")
    result = geot("explain", trained[0], tmp_path / "bad.smi", "-o", tmp_path / "out")
    assert result.exit_code in (1, 2)
    assert "bad.smi" in result.stderr


def test_demo_ends_with_files_that_are_there(tmp_path):
    folder = tmp_path / "demo"
    for _ in range(2):
        result = geot("demo", "-o", folder, "--molecules", 60, "--epochs", 1)
        assert result.exit_code == 0
        assert "linear model" in result.stdout
        files = listed_files(result.stdout)
        assert len(files) > len(FILES) + 4
        assert all(file.exists() for file in files)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "--targets", "homo,lomo"], ["lomo", "'mu', 'alpha'"]),
        (["train", "--targets", ","], ["targets: expected one", "none"]),
        (["train", "--set", "model.num_heads=5"], ["num_heads=5"]),
        (["train", "--set", "model.num_head=5"], ["model.num_head", "num_heads"]),
        (["train", "--set", "num_heads"], ["--set", "section.key=value"]),
        (["train", "--preset", "big"], ["model.preset", "tiny, base, published", "big"]),
        (["train", "--molecules", "4000"], ["molecules", "3000", "4000"]),
        (["train", "--data", "nothing.csv"], ["nothing.csv"]),
        (["train", "nothing.yaml"], ["nothing.yaml"]),
        (["train", "{file}"], ["notes.pdf", "YAML"]),
        (["train", "--resume"], ["last.ckpt", "no such file"]),
        (["train", "{config}", "-o", "{file}"], ["expected a folder"]),
        (["predict", "nothing.safetensors", "{file}"], ["nothing.safetensors"]),
        (["predict", "{file}", "{file}"], ["notes.pdf", "geot train"]),
        (["predict", "{run}/last.ckpt", "{file}"], ["last.ckpt", "model.safetensors"]),
        (["predict", "{run}", "nothing.smi"], ["nothing.smi"]),
        (["predict", "{run}", "{file}"], ["notes.pdf"]),
        (["explain", "nothing.safetensors"], ["nothing.safetensors"]),
        (["explain", "{run}", "nothing.smi"], ["nothing.smi"]),
    ],
)
def test_bad_input_gets_one_line(arguments, parts, trained, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.pdf").write_text("hello")
    places = {"file": tmp_path / "notes.pdf", "run": trained[0], "config": config}
    result = geot(*(argument.format(**places) for argument in arguments))
    assert_one_clear_line(result, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.pdf"]


def test_help_is_quick():
    code = """
import sys
from geot_model.cli import app
assert not {"torch", "rdkit", "lightning", "matplotlib", "pydantic"} & sys.modules.keys()
app(["--help"])
"""
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert all(command in shown.stdout for command in ("train", "predict", "explain", "demo"))


def test_every_name_of_the_package_is_there():
    for name in geot_model.__all__:
        assert getattr(geot_model, name) is not None
    assert sorted(geot_model._MODULE_OF) == sorted(geot_model.__all__)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_wait_briefly_unless_told_otherwise(chosen, expected):
    """Before torch is imported, which is when its threads learn of it."""
    program = (
        "import os, sys; from geot_model import __main__, cli; before = 'torch' in sys.modules; "
        "cli.app = lambda: print(before, os.environ.get('GOMP_SPINCOUNT')); __main__.main()"
    )
    others = {
        k: v for k, v in os.environ.items() if not k.startswith(("GOMP_", "OMP_", "PYTEST_"))
    }
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=others | {"PYTHONPATH": os.pathsep.join(sys.path)} | chosen,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["False", str(expected)]


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "geot_model.cli")
    with pytest.raises(SystemExit, match=r"typer is not installed.*geot-kernels\[model\]"):
        main()
