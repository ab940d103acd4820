"""Checkpoints: what comes back, and what is said of files that are none."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from geot_model.checkpoint import (
    Checkpoint,
    CheckpointError,
    build_model,
    load_checkpoint,
    save_checkpoint,
)
from geot_model.molecules import pad_batch
from geot_model.qm9 import load_qm9

CONFIG = {
    "embed_dim": 8,
    "num_heads": 2,
    "num_layers": 1,
    "attention_scale": True,
    "basis": {"num_basis": 6, "r_max": 12.0},
    "filter_hidden": 8,
    "r_max": 12.0,
    "num_knots": 32,
}
ELEMENTS = (1, 6, 7, 8, 9)


@pytest.fixture
def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    return Checkpoint(
        config=CONFIG,
        state_dict=build_model(CONFIG, 2, ELEMENTS).state_dict(),
        targets={"homo": "eV", "gap": "eV"},
        mean=torch.tensor([-6.5, 6.8], dtype=torch.float64),
        std=torch.tensor([0.6, 1.3], dtype=torch.float64),
        elements=ELEMENTS,
        max_atoms=27,
        held_out=("gdb_5", "gdb_9"),
        training={"data": "qm9-sample", "epoch": 3},
    )


def saved_with(checkpoint, path, **changes):
    """Write a checkpoint, then what `changes` makes of its content."""
    save_checkpoint(checkpoint, path)
    content = torch.load(path, weights_only=True) | changes
    torch.save({name: value for name, value in content.items() if value is not None}, path)


def test_everything_comes_back(checkpoint, tmp_path):
    save_checkpoint(checkpoint, tmp_path / "model.pt")
    loaded = load_checkpoint(tmp_path / "model.pt")
    for field in dataclasses.fields(Checkpoint):
        got, expected = getattr(loaded, field.name), getattr(checkpoint, field.name)
        if field.name == "state_dict":
            assert got.keys() == expected.keys()
            assert all(torch.equal(got[name], expected[name]) for name in got)
        elif isinstance(expected, torch.Tensor):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
        else:
            assert got == expected, field.name
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


def test_loaded_model_predicts_the_same_in_the_unit_of_the_targets(checkpoint, tmp_path):
    save_checkpoint(checkpoint, tmp_path / "model.pt")
    loaded = load_checkpoint(tmp_path / "model.pt")
    batch = pad_batch(load_qm9()[:5])
    model = build_model(CONFIG, 2, ELEMENTS)
    model.load_state_dict(checkpoint.state_dict)
    expected = model.eval()(*batch).detach().double().numpy() * [0.6, 1.3] + [-6.5, 6.8]
    got = loaded.predict(loaded.model(), *batch)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)


def test_failed_save_leaves_the_old_file_whole(checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    save_checkpoint(checkpoint, path)

    def half_written(content, file):
        file.write_bytes(b"PK")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(checkpoint, path)
    assert load_checkpoint(path).max_atoms == 27


def test_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.pt: no such file; expected a model"):
        load_checkpoint(tmp_path / "nothing.pt")


@pytest.mark.parametrize("content", [b"", b"C1CC1 name\n", b"\x80\x02", bytes(range(256)) * 9])
def test_foreign_bytes_are_refused(content, tmp_path):
    path = tmp_path / "foreign.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"foreign\.pt: damaged or no checkpoint; expected"):
        load_checkpoint(path)


@pytest.mark.parametrize("damage", ["cut", "changed byte"])
def test_damaged_file_is_refused(damage, checkpoint, tmp_path):
    path = tmp_path / "model.pt"
    save_checkpoint(checkpoint, path)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        largest = max(checkpoint.state_dict.values(), key=torch.numel)
        weights = largest.numpy().tobytes()
        content[content.index(weights) + 5] ^= 255
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.pt: damaged or no checkpoint"):
        load_checkpoint(path)


def test_pickled_code_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    torch.save({"format": "geot-checkpoint", "config": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil\.pt"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "evil").exists()


def test_other_tensor_file_is_refused(tmp_path):
    torch.save({"weight": torch.ones(3)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights\.pt: no model; expected"):
        load_checkpoint(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "expected version 1 of the format, got 2"),
        ({"targets": None}, "targets: expected dict, got NoneType"),
        ({"elements": [1, 6]}, "elements: expected tuple, got list"),
        ({"mean": torch.zeros(3)}, r"mean: expected \[2\], got \[3\]"),
        ({"config": CONFIG | {"embed_dim": 16}}, "contradicts itself"),
        ({"config": CONFIG | {"colour": "red"}}, "contradicts itself"),
        ({"state_dict": {}}, "contradicts itself"),
    ],
)
def test_wrong_content_is_named(changes, message, checkpoint, tmp_path):
    saved_with(checkpoint, tmp_path / "model.pt", **changes)
    with pytest.raises(CheckpointError, match=rf"model\.pt: .*{message}"):
        load_checkpoint(tmp_path / "model.pt")


def test_import_is_quick_and_has_all_names():
    code = """
import sys, geot_model
assert not {"torch", "rdkit", "lightning", "matplotlib"} & sys.modules.keys()
assert set(geot_model.__all__) <= set(dir(geot_model))
assert set(geot_model.__all__) == set(geot_model._MODULE_OF)
for name in geot_model.__all__:
    getattr(geot_model, name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
