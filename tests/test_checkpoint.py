"""Model files: what comes back, and what is said of files that are none."""

import dataclasses
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from geot_model import checkpoint
from geot_model.batches import pack
from geot_model.checkpoint import Card, CheckpointError, build_model, load_model, save_model
from geot_model.presets import PRESETS, preset
from geot_model.qm9 import load_qm9
from geot_model.targets import TargetScaler

CONFIG = {
    "embed_dim": 8,
    "num_heads": 2,
    "num_layers": 1,
    "readout_dim": 4,
    "attention_scale": True,
    "atom_embedding": True,
    "basis": {"num_basis": 6, "r_max": 12.0, "gamma": None},
    "filter_hidden": 8,
    "r_max": 12.0,
    "num_knots": 32,
}


def make_card(**config):
    scaler = TargetScaler(
        names=("U0", "mu"),
        units=("eV", ""),
        readouts=("sum", "dipole"),
        mean=(-4.5, 0.0),
        std=(0.1 + 0.2, 1.3),
        references={"U0": {1: -13.6, 6: -1029.9, 7: -1485.3, 8: -2042.6, 9: -2713.5}},
    )
    return Card(
        config=CONFIG | config,
        scaler=scaler,
        elements=(1, 6, 7, 8, 9),
        max_atoms=27,
        held_out=("gdb_5", "Größe"),
        training={"data": {"source": "qm9-sample"}, "epoch": 3, "file": None},
    )


@pytest.fixture(scope="module")
def card():
    return make_card()


@pytest.fixture(scope="module")
def model(card):
    torch.manual_seed(7)  # other weights than those of a new one in a test
    return build_model(card)


@pytest.fixture(scope="module")
def content(model, card, tmp_path_factory):
    """The bytes of a file."""
    path = tmp_path_factory.mktemp("content") / "model.safetensors"
    save_model(model, card, path)
    return path.read_bytes()


@pytest.fixture
def path(content, tmp_path):
    """A file that may be spoilt."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return path


def rewrite(path, change_card=None, change_tensors=None, **header):
    """Write a file again with changes, with the digest that belongs to them."""
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["geot"])
    tensors = load_file(path)
    for change, subject in ((change_card, content["card"]), (change_tensors, tensors)):
        if change is not None:
            change(subject)
    content["sha256"] = checkpoint._digest(json.dumps(content["card"]), tensors)
    save_file(tensors, path, {"geot": json.dumps(content | header)})


def refused(path, message):
    """Assert that a file is refused, by its name, with a reason and what was expected."""
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}.*expected"):
        load_model(path)


def test_everything_comes_back(model, card, path, tmp_path):
    loaded = load_model(path)
    assert loaded.card == card
    assert not loaded.training
    assert loaded.readout.kinds == card.scaler.readouts
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(state[name].cpu(), expected[name], rtol=0, atol=0, msg=name)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_loaded_model_computes_the_same(model, path):
    sample = load_qm9()
    batch = pack(sample, range(5))
    inputs = {"ptr": batch.ptr, "max_atoms": batch.max_atoms}
    expected = model(batch.numbers, batch.positions, **inputs)
    got = load_model(path, device="cpu")(batch.numbers, batch.positions, **inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_folder_of_a_run_will_do(card, path):
    assert load_model(path.parent).card == card
    assert load_model(str(path.parent)).card == card


def test_loaded_model_can_be_saved_again_to_the_same_bytes(path, content):
    loaded = load_model(path)
    save_model(loaded, loaded.card, path)
    assert path.read_bytes() == content


def test_weights_of_any_precision_are_written_in_float32(card, path):
    torch.manual_seed(1)
    model = build_model(card).double()
    save_model(model, card, path)
    loaded = load_model(path)
    assert loaded.embedding.weight.dtype == torch.float32
    torch.testing.assert_close(
        loaded.embedding.weight.cpu(), model.embedding.weight.float(), rtol=0, atol=0
    )


def test_default_precision_makes_no_difference(path):
    torch.set_default_dtype(torch.float64)
    try:
        loaded = load_model(path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_configurations(name):
    with torch.device("meta"):
        model = build_model(make_card(**preset(name)), device="meta")
    assert len(model.layers) == PRESETS[name]["num_layers"]


def test_exact_filters_need_no_kernels():
    model = build_model(make_card(radial="exact"), device="meta")
    assert model.layers[0].attention.backend == "reference"


def test_failed_save_leaves_the_old_file_whole(model, card, path, content, monkeypatch):
    def half_written(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", half_written)
    with pytest.raises(OSError, match="disk full"):
        save_model(model, card, path)
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_card_with_a_number_that_is_none_is_not_saved(model, card, tmp_path):
    spoilt = dataclasses.replace(card, training={"loss": float("nan")})
    with pytest.raises(ValueError, match="Out of range float"):
        save_model(model, spoilt, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_missing_file_is_named(tmp_path):
    refused(tmp_path / "model.safetensors", "no such file")
    refused(tmp_path, "no such file")


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (b"", "an empty file"),
        (b"C1CC1 name\n", "damaged, or no model"),
        (bytes(range(256)) * 9, "damaged, or no model"),
        (b"\xff" * 8 + b"{}", "damaged, or no model"),
        (pickle.dumps({"weights": 1}), "a pickle, which is never opened"),
    ],
)
def test_foreign_bytes_are_refused(spoilt, message, path):
    path.write_bytes(spoilt)
    refused(path, message)


def test_states_of_training_and_other_files_of_pytorch_are_told_apart(path):
    class Evil:
        def __reduce__(self):
            return (open, (str(path.parent / "evil"), "w"))

    torch.save({"pytorch-lightning_version": "2.6", "state_dict": Evil()}, path)
    refused(path, "a file of PyTorch, perhaps a state of training")
    path.write_bytes(pickle.dumps(Evil()))
    refused(path, "a pickle")
    assert not (path.parent / "evil").exists()


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"geot": "[1, 2"}, {"geot": "[]"}])
def test_other_safetensors_are_refused(metadata, path):
    save_file({"weight": torch.ones(3)}, path, metadata)
    refused(path, "damaged, or a safetensors file of something else")


def test_no_truncated_file_is_read(path, content):
    header = 8 + int.from_bytes(content[:8], "little")
    lengths = {*range(0, 16), header - 1, header, header + 1, len(content) - 1}
    lengths |= set(random.Random(0).sample(range(len(content)), 60))
    for length in lengths:
        path.write_bytes(content[:length])
        refused(path, "")


def test_no_changed_byte_is_believed(path, content, card):
    choose = random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    places = [*range(24), *choose.choices(range(header), k=150)]
    places += choose.choices(range(header, len(content)), k=60)
    survived = 0
    for place in places:
        spoilt = bytearray(content)
        spoilt[place] ^= 1 << choose.randrange(8)
        path.write_bytes(spoilt)
        try:
            loaded = load_model(path)
        except CheckpointError as error:
            assert str(path) in str(error)
            assert "expected" in str(error)
        else:  # a space in the header that is another blank now
            survived += 1
            assert loaded.card == card
    assert survived < 5


def put(*keys, value):
    """A change of a nested value."""

    def change(subject):
        for key in keys[:-1]:
            subject = subject[key]
        subject[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda card: card.pop("scaler"), "card.scaler: missing"),
        (lambda card: card["scaler"].pop("mean"), "card.scaler.mean: missing"),
        (put("elements", value=[1, "6"]), "card.elements.1: not a valid integer: '6'"),
        (put("elements", value=[]), "card.config: elements: expected different atomic numbers"),
        (put("elements", value=[1, 6, 7, 8, 130]), "card.config: elements: expected different"),
        (put("elements", value=[1, 6, 7, 8, 17]), "type_of: not the elements of the card"),
        (put("max_atoms", value="27"), "card.max_atoms: not a valid integer"),
        (put("held_out", value="gdb_5"), "card.held_out: not"),
        (put("scaler", "mean", value=[float("nan"), 0]), "card: numbers that are not finite"),
        (put("scaler", "std", value=[1, -1]), "card.scaler.std: expected numbers > 0"),
        (put("scaler", "std", value=[1]), "card.scaler.std: expected 2"),
        (put("scaler", "readouts", value=["sum", "max"]), "card.scaler.readouts: expected"),
        (put("scaler", "references", value={"U0": {"H": 1}}), "card.scaler.references.U0.H"),
        (put("config", value=[]), "card.config: not an object"),
        (put("config", "embed_dim", value=16), "embedding.weight: .*100, 8.* asks for .*100, 16"),
        (put("config", "embed_dim", value=2**40), "card.config.embed_dim: 1099511627776, but"),
        (put("config", "embed_dim", value="8"), "card.config.embed_dim: not a valid integer: '8'"),
        (put("config", "embed_dim", value=0), "card.config: "),
        (put("config", "num_heads", value=2.0), "card.config.num_heads: not a valid integer"),
        (put("config", "num_heads", value=3), "card.config: "),
        (put("config", "num_layers", value=2), "card.config.num_layers: 2, but .* at most 1"),
        (put("config", "num_knots", value=10**12), "card.config.num_knots: 1000000000000, but"),
        (put("config", "num_knots", value=True), "card.config.num_knots: not a valid integer"),
        (put("config", "r_max", value=float("inf")), "card: numbers that are not finite"),
        (put("config", "basis", value={"num_basis": 6}), "card.config: "),
        (put("config", "basis", value=[6, 12.0]), "card.config: "),
        (put("config", "basis", "num_basis", value=10**12), "card.config.num_basis: 10000"),
        (put("config", "basis", "r_max", value=-1.0), "card.config: r_max: expected"),
        (put("config", "score", value="bias"), "layers.0.attention.radial"),
        (put("config", "radial", value=None), "card.config.radial: not a valid string: None"),
        (put("config", "colour", value="red"), "card.config: .*colour"),
        (put("config", "backend", value="eager"), "card.config: .*backend"),
        (put("config", "parallel", value=True), r"layers.0.norm2.bias: .* asks for none"),
    ],
)
def test_wrong_card_is_named(change, message, path):
    rewrite(path, change_card=change)
    refused(path, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("type_of"),
            "type_of: none where the card asks for torch.int64",
        ),
        (put("more", value=torch.ones(2)), "more: .* asks for none"),
        (put("embedding.weight", value=torch.ones(100, 9)), "embedding.weight: .*100, 9"),
        (
            put("embedding.weight", value=torch.ones(100, 8).double()),
            "embedding.weight: .*float64",
        ),
        (put("output_offset", value=torch.tensor(torch.nan)), "output_offset: .*not finite"),
        (put("output_offset", value=torch.tensor(torch.inf)), "output_offset: .*not finite"),
        (put("type_of", value=torch.arange(100)), "type_of: not the elements"),
    ],
)
def test_wrong_weights_are_named(change, message, path):
    rewrite(path, change_tensors=change)
    refused(path, message)


def test_newer_version_is_named_though_all_else_may_be_different(path):
    rewrite(path, lambda card: card.clear(), version=2)
    refused(path, "version 2 of the format, which a newer geot-kernels wrote; ")
    rewrite(path, version="1")
    refused(path, "version '1' of the format")


def test_rewriting_without_a_change_is_no_damage(path, card):
    rewrite(path)
    assert load_model(path).card == card


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
