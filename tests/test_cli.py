"""The command `geot`, as its user sees it, and the explanations behind `geot explain`."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from test_training import interrupt_at
from typer.testing import CliRunner

from geot_model import cli, dataset, results
from geot_model.__main__ import main
from geot_model.checkpoint import load_checkpoint
from geot_model.explain import (
    aggregate_attention,
    explain_molecule,
    file_stems,
    formula,
    held_out,
)
from geot_model.molecule import Molecule
from geot_model.qm9 import load_qm9

TINY = ["--molecules", "60", "--epochs", "2", "--embed-dim", "8", "--heads", "2", "--layers", "1"]


def geot(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    result = geot("train", "-o", folder, *TINY)
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
    assert [row.split()[1] for row in rows] == ["homo", "lumo", "gap"]
    assert "epoch   2/2" in result.stdout
    files = listed_files(result.stdout)
    assert {file.name for file in files} == {"best.pt", "last.ckpt", "results.csv"}
    assert all(file.is_file() and file.parent == folder for file in files)
    assert result.stderr == ""


def test_a_run_is_not_overwritten(trained):
    folder, _ = trained
    before = (folder / "best.pt").read_bytes()
    assert_one_clear_line(geot("train", "-o", folder, *TINY), folder, "--resume")
    assert (folder / "best.pt").read_bytes() == before


def test_resume_goes_on_with_the_settings_of_the_run(tmp_path):
    first = geot("train", "-o", tmp_path, *TINY, "--max-minutes", 0)
    assert "the time was up after 1 of 2 epochs" in first.stdout
    second = geot("train", "-o", tmp_path, "--resume")
    assert second.exit_code == 0
    assert "epoch   2/2" in second.stdout
    assert "epoch   1/2" not in second.stdout
    assert load_checkpoint(tmp_path / "best.pt").training["embed_dim"] == 8


def test_resume_refuses_other_settings(trained):
    result = geot("train", "-o", trained[0], "--resume", "--lr", 0.1)
    assert_one_clear_line(result, "--learning-rate")


@pytest.mark.parametrize("step", [1, 5])
def test_interruption_says_how_to_go_on(tmp_path, monkeypatch, step):
    interrupt_at(monkeypatch, step)
    result = geot("train", "-o", tmp_path, *TINY, "--batch-size", 16)
    assert result.exit_code == 130
    expected = "nothing to go on from" if step == 1 else f"geot train --resume -o {tmp_path}"
    assert expected in result.stderr


@pytest.fixture
def molecules(tmp_path):
    file = tmp_path / "some.smi"
    file.write_text("CCO ethanol\nC1CC broken\nCBr bromo\n\nc1ccccc1 a/b: c\nCCO ethanol\n")
    return file


def test_explain_file(trained, molecules, tmp_path):
    output = tmp_path / "pictures"
    result = geot("explain", trained[0] / "best.pt", molecules, "-o", output, "--pairs", 3)
    assert result.exit_code == 0
    broken, bromine = result.stderr.splitlines()
    assert f"{molecules}:2" in broken and "C1CC" in broken
    assert "bromo" in bromine and "Br" in bromine and "C, N, O" in bromine
    with (output / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["ethanol", "a/b: c", "ethanol"]
    assert [row["formula"] for row in rows] == ["C2H6O", "C6H6", "C2H6O"]
    assert rows[0]["QM9 gap [eV]"] == ""
    assert f"{float(rows[0]['gap [eV]']):.2f}" in result.stdout
    assert "gap [eV]" in result.stdout
    files = listed_files(result.stdout)
    stems = ["ethanol", "a_b_c", "ethanol-2"]
    pictures = [f"{stem}-{what}.png" for stem in stems for what in ("attention", "pairs")]
    assert [file.name for file in files] == ["predictions.csv", *pictures]
    assert set(files) == set(output.iterdir())
    for file in files[1:]:
        assert np.ptp(imread(file)[..., :3]) > 0.5


def test_explain_without_file_takes_what_was_never_seen(trained, tmp_path):
    result = geot("explain", trained[0] / "best.pt", "-o", tmp_path, "--count", 2)
    assert result.exit_code == 0
    test = dataset.Split.load(dataset.Settings(molecules=60)).test
    with (tmp_path / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == test.names[:2].tolist()
    predicted = results.predict(load_checkpoint(trained[0] / "best.pt"), test)
    for place, row in enumerate(rows):
        for column, target in enumerate(("homo", "lumo", "gap")):
            known, value = row[f"QM9 {target} [eV]"], row[f"{target} [eV]"]
            assert float(known) == pytest.approx(test.targets[target][place], abs=1e-4)
            assert float(value) == pytest.approx(predicted[place, column].item(), abs=1e-3)


def test_explain_warns_of_larger_molecules_than_seen(trained, tmp_path):
    (tmp_path / "long.smi").write_text("C" * 30 + " chain\n")
    result = geot("explain", trained[0] / "best.pt", tmp_path / "long.smi", "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "chain: 92 atoms, more than" in result.stderr


def test_explain_fails_where_nothing_can_be_explained(trained, tmp_path):
    (tmp_path / "salt.smi").write_text("[Na+].[Cl-] salt\n")
    result = geot("explain", trained[0] / "best.pt", tmp_path / "salt.smi", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "salt: Na, Cl" in result.stderr


def test_demo_ends_with_files_that_are_there(tmp_path):
    folder = tmp_path / "demo"
    result = geot("demo", "-o", folder, "--molecules", 60, "--epochs", 1)
    assert result.exit_code == 0
    assert "linear model" in result.stdout
    files = listed_files(result.stdout)
    assert len(files) == 3 + 1 + 2 * 4
    assert all(file.is_file() for file in files)
    assert geot("demo", "-o", folder, "--molecules", 60, "--epochs", 1).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "--targets", "homo,lomo"], ["targets", "lomo", "mu, alpha"]),
        (["train", "--targets", ","], ["targets", "none"]),
        (["train", "--heads", "5"], ["num_heads=5"]),
        (["train", "--molecules", "4000"], ["molecules", "3000", "4000"]),
        (["train", "--resume"], ["last.ckpt", "no such file"]),
        (["train", "-o", "{file}", *TINY], ["expected a folder"]),
        (["explain", "nothing.pt"], ["nothing.pt", "no such file"]),
        (["explain", "{file}"], ["notes.pdf", "geot train"]),
        (["explain", "{run}/last.ckpt"], ["last.ckpt", "best.pt"]),
        (["explain", "{run}/best.pt", "nothing.smi"], ["nothing.smi", "no such file"]),
        (["explain", "{run}/best.pt", "{file}"], ["notes.pdf", ".smi"]),
    ],
)
def test_bad_input_gets_one_line(arguments, parts, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.pdf").write_text("hello")
    places = {"file": tmp_path / "notes.pdf", "run": trained[0]}
    result = geot(*(argument.format(**places) for argument in arguments))
    assert_one_clear_line(result, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.pdf"]


def test_help_is_quick():
    code = """
import sys
from geot_model.cli import app
assert not {"torch", "rdkit", "lightning", "matplotlib"} & sys.modules.keys()
app(["--help"])
"""
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert all(command in shown.stdout for command in ("train", "explain", "demo"))


def test_attention_is_the_mean_share_of_absolute_weights():
    maps = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps[1, 1, 2] = 0
    expected = np.zeros((4, 4))
    for layer in range(3):
        for head in range(2):
            for i in range(4):
                row = np.abs(maps[layer, head, i].numpy())
                expected[i] += row / row.sum() / 6 if row.sum() else 0
    np.testing.assert_allclose(aggregate_attention(maps).numpy(), expected, rtol=1e-12)


def test_attention_does_not_depend_on_sign_and_scale_of_a_head():
    maps = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    factors = torch.tensor([[1.0, -2.0], [0.1, 5.0], [-7.0, 1.0]])[:, :, None, None]
    torch.testing.assert_close(aggregate_attention(maps), aggregate_attention(factors * maps))


def test_explanation_has_one_row_for_each_atom_that_sums_to_one(trained):
    checkpoint = load_checkpoint(trained[0] / "best.pt")
    (molecule, truth), *_ = held_out(checkpoint, 1)
    explanation = explain_molecule(checkpoint, molecule, truth=truth)
    assert explanation.attention.shape == (len(molecule.numbers),) * 2
    np.testing.assert_allclose(explanation.attention.sum(1), 1, rtol=1e-6)
    assert explanation.truth.keys() == explanation.predictions.keys() == {"homo", "lumo", "gap"}


@pytest.mark.parametrize(
    ("numbers", "positions", "message"),
    [
        ([6, 14, 35], np.zeros((3, 3)), "thing: Si, Br is not among"),
        ([], np.zeros((0, 3)), "thing: no atoms"),
        ([1, 1], [[0, 0, 0], [0, 0, np.nan]], "thing: a position is not finite"),
    ],
)
def test_molecules_that_cannot_be_explained_are_refused(trained, numbers, positions, message):
    checkpoint = load_checkpoint(trained[0] / "best.pt")
    molecule = Molecule(np.array(numbers, np.int64), np.array(positions, np.float32), "thing")
    with pytest.raises(ValueError, match=message):
        explain_molecule(checkpoint, molecule)


def test_formula_is_in_hill_order():
    assert formula(np.array([1, 8, 6, 9, 1, 7, 6])) == "C2H2FNO"
    assert formula(np.array([1, 8, 1])) == "H2O"


def test_names_of_files_are_safe_and_different():
    stems = file_stems(["a/b", "a_b", "A b", "..", "", "x" * 300, "β-carotene", "../../etc"])
    assert stems == [
        "a_b", "a_b-2", "A_b-3", "molecule", "molecule-2", "x" * 60, "β-carotene", "etc",
    ]  # fmt: skip


def test_held_out_are_never_training_molecules(trained):
    checkpoint = load_checkpoint(trained[0] / "best.pt")
    split = dataset.Split.load(dataset.Settings(molecules=60))
    names = [molecule.name for molecule, _ in held_out(checkpoint, 100)]
    assert names == split.test.names.tolist()
    sample = load_qm9()
    for molecule, _ in held_out(checkpoint, 3):
        one = sample[[str(name) for name in sample.names].index(molecule.name)]
        assert molecule.numbers.tolist() == one.numbers.tolist()


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "geot_model.cli")
    with pytest.raises(SystemExit, match=r"typer is not installed.*geot-kernels\[model\]"):
        main()
