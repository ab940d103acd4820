"""The command `geot`: train a model, predict with it, explain it, see all in a few minutes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

# Everything heavy is imported by the command that needs it, so that `geot --help` is quick.
if TYPE_CHECKING:
    from .checkpoint import Card
    from .molecules import Molecules
    from .readers import Data
    from .settings import Settings
    from .splits import Split
    from .training import Outcome

app = typer.Typer(
    help="GeoT: a transformer for molecules whose attention sees the distances between atoms.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

_NOTHING_DONE = 1
_BAD_INPUT = 2
_INTERRUPTED = 130

_DEMO_EPOCHS = 30
_EXAMPLES = 4  # molecules to explain where none are named

# Options of `geot train` and the settings that they are.
_SETTINGS = {
    "data": "data.source",
    "targets": "data.targets",
    "molecules": "data.molecules",
    "preset": "model.preset",
    "epochs": "training.epochs",
    "batch_size": "training.batch_size",
    "learning_rate": "training.learning_rate",
    "seed": "training.seed",
    "precision": "training.precision",
    "devices": "training.devices",
    "max_minutes": "training.max_minutes",
}
_CHANGEABLE = ("devices", "max_minutes")  # with --resume

_Model = Annotated[
    Path, typer.Argument(help="A model: model.safetensors of a run, or its folder.")
]
_Smiles = Annotated[
    str | None, typer.Option(help="Column of the SMILES. Default: the one called so.")
]
_Name = Annotated[str | None, typer.Option(help="Column of the names.")]


@app.command()
def train(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(help="Settings in YAML. Default: those of the options.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")] = Path(
        "geot-run"
    ),
    data: Annotated[
        str | None, typer.Option(help="A file of molecules, qm9-sample, or qm9 (needs qm9pack).")
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="What to predict: columns, separated by commas.")
    ] = None,
    molecules: Annotated[
        int | None, typer.Option(help="Draw so many molecules at random. Default: all.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Size of the network: tiny, base or published.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training molecules.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Molecules in a step.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="The highest.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of weights and order; of the split: split.seed.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="32 or bf16-mixed.")] = None,
    devices: Annotated[
        int | None, typer.Option(help="GPUs, or processes on a CPU, that share each batch.")
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop after the last epoch that ends in this time.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any other setting."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder.")
    ] = False,
) -> None:
    """Train GeoT on molecules and measure it on some that it never saw."""
    console = Console()
    with _bad_input():
        changes = _changes(context, assignments or [])
        settings = _resumed(context, output) if resume else _read_settings(config, changes, output)
        split = _load(settings)
        _make_folder(output)
    outcome = _train(console, settings, split, output, resume=resume)
    _list_files(console, outcome.files)


@app.command()
def predict(
    model: _Model,
    file: Annotated[str, typer.Argument(metavar="INPUT", help="Molecules, with or without 3-D.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="CSV to write.")] = Path(
        "predictions.csv"
    ),
    smiles_column: _Smiles = None,
    name_column: _Name = None,
) -> None:
    """Predict properties of molecules."""
    import numpy as np

    from .checkpoint import load_model
    from .prediction import write_csv
    from .readers import read

    console = Console()
    with _bad_input():
        trained = load_model(model)
        data = read(file, smiles=smiles_column, name=name_column)
        prediction = trained.predict(data.molecules)
        _complain(*data.problems, *prediction.problems)
        done = int(np.isfinite(prediction.values).any(axis=1).sum())
        if done:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_csv(prediction, data.molecules, output, data.rows)
    if not done:
        _complain(f"{file}: no molecule to predict")
        raise typer.Exit(_NOTHING_DONE)
    count = f"predicted {done:,} of {len(data.molecules):,} molecules that could be read"
    console.print(count, highlight=False)
    _list_files(console, [output])


@app.command()
def explain(
    model: _Model,
    file: Annotated[
        str | None,
        typer.Argument(metavar="[INPUT]", help="Molecules. Default: some that it never saw."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the pictures.")
    ] = Path("geot-explained"),
    count: Annotated[
        int, typer.Option(min=1, help="How many molecules where no file is given.")
    ] = _EXAMPLES,
    pairs: Annotated[
        int, typer.Option(min=0, help="Pairs of atoms to mark in each structure.")
    ] = 5,
    method: Annotated[
        str | None, typer.Option(help="How pairs are weighed. Default: the one that tells most.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Property that the method asks about. Default: the first.")
    ] = None,
    smiles_column: _Smiles = None,
    name_column: _Name = None,
) -> None:
    """Draw which pairs of atoms predictions rest on."""
    from . import explain as explaining
    from .checkpoint import load_model
    from .readers import read

    console = Console()
    with _bad_input():
        trained = load_model(model)
        if file is None:
            assert trained.card is not None
            data = _held_out(trained.card, count)
        else:
            data = read(file, smiles=smiles_column, name=name_column)
        _make_folder(output)
        _complain(*data.problems)
        options: dict[str, Any] = {} if method is None else {"method": method}
        files = explaining.run(
            trained, data, output, num_pairs=pairs, target=target, complain=_complain, **options
        )
    if not files:
        _complain(f"{file}: no molecule to explain")
        raise typer.Exit(_NOTHING_DONE)
    _list_files(console, files)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for everything; overwritten.")
    ] = Path("geot-demo"),
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the training molecules.")
    ] = _DEMO_EPOCHS,
    max_minutes: Annotated[
        float, typer.Option(help="Stop training after the last epoch that ends in this time.")
    ] = 3.25,
    molecules: Annotated[
        int | None, typer.Option(help="Draw so many molecules at random. Default: all.")
    ] = None,
) -> None:
    """Train on the sample of QM9 for some minutes and explain four molecules it never saw."""
    start = time.monotonic()
    console = Console()
    console.print("GeoT learns orbital energies (homo, lumo, gap) from 3-D structures of QM9 ...")
    from . import explain as explaining
    from .checkpoint import load_model
    from .settings import Settings
    from .training import BEST

    with _bad_input():
        settings = Settings(
            data={"molecules": molecules},
            training={"epochs": epochs, "max_minutes": max_minutes},
        )
        split = _load(settings)
        _make_folder(output)
    outcome = _train(console, settings, split, output)
    trained = load_model(output / BEST)
    files = explaining.run(trained, _first(split.test, _EXAMPLES), output)
    _list_files(console, [*outcome.files, *files])
    console.print(f"{time.monotonic() - start:.0f} s in all", highlight=False)


def _held_out(card: Card, count: int) -> Data:
    """Molecules that were not seen in training nor in the choice of the model.

    Raises:
        ValueError: The data are not there any more, or none was held out.
        ModuleNotFoundError: A package is missing that the data need.
        OSError: They cannot be read.
    """
    import numpy as np

    from .readers import read

    source = card.training["data"]
    found = read(
        source["source"],
        targets=card.scaler.names,
        smiles=source["smiles"],
        name=source["name"],
    )
    molecules = found.molecules
    chosen = molecules[np.isin(molecules.names, card.held_out)]
    if not len(chosen):
        raise ValueError(f"{source['source']}: no molecule was held out; name an INPUT")
    return _first(chosen, count)


def _first(molecules: Molecules, count: int) -> Data:
    import numpy as np

    from .readers import Data

    chosen = molecules[:count]
    return Data(chosen, [], np.arange(len(chosen)) + 1)


def _changes(context: typer.Context, assignments: Sequence[str]) -> list[dict[str, Any]]:
    """Settings that the options give, nested, one after the other."""
    from .settings import parse_assignment

    changes = []
    for name, key in _SETTINGS.items():
        if (value := context.params[name]) is not None:
            section, setting = key.split(".")
            changes.append({section: {setting: value}})
    return changes + [parse_assignment(text) for text in assignments]


def _read_settings(
    config: Path | None, changes: Sequence[dict[str, Any]], output: Path
) -> Settings:
    """Settings of a new run.

    Raises:
        ValueError: A setting is wrong, or there is a run already.
        OSError: The file cannot be read.
    """
    from .settings import Settings

    settings = Settings.of(*changes) if config is None else Settings.read(config, *changes)
    if (output / "last.ckpt").exists():
        raise ValueError(
            f"{output}: there is a run already; --resume goes on with it, -o names another folder"
        )
    return settings


def _resumed(context: typer.Context, output: Path) -> Settings:
    """Settings of the run in a folder.

    Raises:
        ValueError: There is no run, or a setting is given that cannot be changed.
    """
    from .training import load_settings

    given = {name for name in context.params if _is_given(context, name)}
    for name in sorted(given - {"output", "resume", *_CHANGEABLE}):
        option = {"assignments": "--set", "config": "CONFIG"}.get(name)
        option = option or "--" + name.replace("_", "-")
        raise ValueError(f"{option}: cannot be changed with --resume; the run has its own")
    changed = {name: context.params[name] for name in _CHANGEABLE if name in given}
    return load_settings(output).change(training=changed)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _load(settings: Settings) -> Split:
    """Read and split the data; complain of what cannot be used.

    Raises:
        ModuleNotFoundError: A package is missing that the data need.
        OSError: A file cannot be read.
        ValueError: There are not so many devices, no such targets, or too few molecules.
    """
    from .training import choose_devices, load_split

    choose_devices(settings)
    split, problems = load_split(settings)
    _complain(*problems)
    return split


def _train(
    console: Console, settings: Settings, split: Split, folder: Path, *, resume: bool = False
) -> Outcome:
    """Train, and show the table."""
    from . import training
    from .callbacks import DivergedError
    from .distributed import ProcessError
    from .results import errors_table

    counts = f"{len(split.train):,} molecules, {len(split.validation):,} to choose the best epoch"
    console.print(f"training on {counts}; writing to {folder}", highlight=False, soft_wrap=True)
    try:
        outcome = training.train(settings, split, folder, resume=resume, console=console)
    except KeyboardInterrupt:
        _complain(
            f"interrupted; to go on after the last whole epoch: geot train --resume -o {folder}"
            if (folder / training.LAST).exists()
            else "interrupted in the first epoch: nothing to go on from"
        )
        raise typer.Exit(_INTERRUPTED) from None
    except (DivergedError, ProcessError) as error:
        _complain(str(error))
        raise typer.Exit(_NOTHING_DONE) from None
    if outcome.stopped:
        console.print(
            f"the time was up after {outcome.epochs} of {settings.training.epochs} epochs "
            "(--max-minutes): the errors would still fall",
            highlight=False,
            soft_wrap=True,
        )
    console.print(errors_table(outcome.errors, outcome.counts[0]))
    return outcome


@contextlib.contextmanager
def _bad_input() -> Iterator[None]:
    """Ends the command with one line where what the user gave cannot be used."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        _complain(str(error))
        raise typer.Exit(_BAD_INPUT) from None


def _make_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, got a file")
    folder.mkdir(parents=True, exist_ok=True)


def _complain(*messages: str) -> None:
    for message in messages:
        typer.echo(f"geot: {message}", err=True)


def _list_files(console: Console, files: Sequence[Path]) -> None:
    console.print("written:", highlight=False)
    for file in files:
        console.print(f"  {file}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    app()
