"""The command `geot`: train a model, explain molecules with it, see both in a few minutes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

# Everything heavy is imported by the command that needs it, so that `geot --help` is quick.
if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .dataset import Settings, Split
    from .explain import Explanation
    from .molecules import Molecule
    from .training import Outcome

app = typer.Typer(
    help="GeoT: a transformer for molecules whose attention sees the distances between atoms.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

_BAD_INPUT = 2
_INTERRUPTED = 130

_DEMO_EPOCHS = 30
_DEMO_SEED = 0


class Data(str, Enum):
    """The data sets."""

    sample = "qm9-sample"
    full = "qm9"


@app.command()
def train(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")] = Path(
        "geot-run"
    ),
    data: Annotated[
        Data, typer.Option(help="The 3,000 molecules that come along, or all (needs qm9pack).")
    ] = Data.sample,
    targets: Annotated[
        str, typer.Option(help="What to predict, separated by commas.")
    ] = "homo,lumo,gap",
    molecules: Annotated[
        int | None, typer.Option(help="Draw so many molecules at random. Default: all.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training molecules.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Molecules in a step.")] = 32,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", help="The highest, after the warm-up.")
    ] = 1e-3,
    embed_dim: Annotated[int, typer.Option(help="Width of the network.")] = 64,
    heads: Annotated[int, typer.Option(help="Heads of each attention.")] = 4,
    layers: Annotated[int, typer.Option(help="Layers.")] = 4,
    seed: Annotated[int, typer.Option(help="Of weights, split and order.")] = 0,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop after the last epoch that ends in this time.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder.")
    ] = False,
) -> None:
    """Train GeoT on QM9 and measure it on molecules it never saw."""
    from .dataset import Settings, Split
    from .training import LAST, load_settings

    console = Console()
    with _bad_input():
        if resume:
            _forbid_changes(context)
            settings = load_settings(output)
        else:
            settings = Settings(
                data=data.value,
                targets=tuple(name.strip() for name in targets.split(",") if name.strip()),
                molecules=molecules,
                epochs=epochs,
                batch_size=batch_size,
                learning_rate=learning_rate,
                seed=seed,
                embed_dim=embed_dim,
                num_heads=heads,
                num_layers=layers,
            )
            if (output / LAST).exists():
                raise ValueError(
                    f"{output}: there is a run already; --resume goes on with it, "
                    "-o names another folder"
                )
        split = Split.load(settings)
        _make_folder(output)
    outcome = _train(console, settings, split, output, max_minutes, resume=resume)
    _list_files(console, outcome.files)


@app.command()
def explain(
    checkpoint: Annotated[Path, typer.Argument(help="A model: best.pt of a run.")],
    file: Annotated[
        Path | None,
        typer.Argument(help="Molecules: SMILES, SDF or XYZ. Default: some it never saw."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the pictures.")
    ] = Path("geot-explained"),
    count: Annotated[
        int, typer.Option(min=1, help="How many molecules where no file is given.")
    ] = 4,
    pairs: Annotated[
        int, typer.Option(min=0, help="Pairs of atoms to mark in each structure.")
    ] = 5,
) -> None:
    """Predict molecules' properties and draw the attention between their atoms."""
    from .checkpoint import load_checkpoint
    from .explain import held_out
    from .molecule import read_molecules

    console = Console()
    problems: list[str] = []
    with _bad_input():
        trained = load_checkpoint(checkpoint)
        if file is None:
            chosen = held_out(trained, count)
            if not chosen:
                raise ValueError(
                    f"{checkpoint}: no molecule of the sample was held out in its training; "
                    "name a FILE of molecules"
                )
        else:
            molecules, problems = read_molecules(file)
            chosen = [(molecule, {}) for molecule in molecules]
        _make_folder(output)
    for problem in problems:
        _complain(problem)
    files = _explain(console, trained, chosen, output, pairs)
    if not files:
        _complain(f"{file}: no molecule to explain")
        raise typer.Exit(1)
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
    from .checkpoint import load_checkpoint
    from .dataset import Settings, Split
    from .explain import held_out
    from .training import BEST

    with _bad_input():
        settings = Settings(epochs=epochs, seed=_DEMO_SEED, molecules=molecules)
        split = Split.load(settings)
        _make_folder(output)
    outcome = _train(console, settings, split, output, max_minutes)
    trained = load_checkpoint(output / BEST)
    files = _explain(console, trained, held_out(trained, 4), output, num_pairs=5)
    _list_files(console, [*outcome.files, *files])
    console.print(f"{time.monotonic() - start:.0f} s in all", highlight=False)


def _train(
    console: Console,
    settings: Settings,
    split: Split,
    folder: Path,
    max_minutes: float | None,
    *,
    resume: bool = False,
) -> Outcome:
    """Train, and show the table."""
    from . import training

    counts = f"{len(split.train):,} molecules, {len(split.validation):,} to choose the best epoch"
    console.print(f"training on {counts}; writing to {folder}", highlight=False, soft_wrap=True)
    try:
        outcome = training.train(
            settings, split, folder, resume=resume, max_minutes=max_minutes, console=console
        )
    except KeyboardInterrupt:
        _complain(
            f"interrupted; to go on after the last whole epoch: geot train --resume -o {folder}"
            if (folder / training.LAST).exists()
            else "interrupted in the first epoch: nothing to go on from"
        )
        raise typer.Exit(_INTERRUPTED) from None
    if outcome.stopped:
        console.print(
            f"the time was up after {outcome.epochs} of {settings.epochs} epochs "
            "(--max-minutes): the errors would still fall",
            highlight=False,
            soft_wrap=True,
        )
    console.print(outcome.table())
    return outcome


def _explain(
    console: Console,
    checkpoint: Checkpoint,
    chosen: list[tuple[Molecule, dict[str, float]]],
    folder: Path,
    num_pairs: int,
) -> list[Path]:
    """Explain molecules, those that can be; show and write predictions, draw the attention."""
    from . import explain as explaining

    model = checkpoint.model()
    explanations: list[Explanation] = []
    for molecule, truth in chosen:
        problem = explaining.why_not(checkpoint, molecule)
        if problem is not None:
            _complain(problem)
            continue
        if len(molecule.numbers) > checkpoint.max_atoms:
            _complain(
                f"{molecule.name}: {len(molecule.numbers)} atoms, more than the "
                f"{checkpoint.max_atoms} of the largest training molecule: do not trust its values"
            )
        explanations.append(
            explaining.explain_molecule(checkpoint, molecule, truth=truth, model=model)
        )
    if not explanations:
        return []
    stems = explaining.file_stems([one.molecule.name for one in explanations])
    files = [folder / explaining.PREDICTIONS]
    explaining.write_predictions(checkpoint, explanations, files[0])
    for one, stem in zip(explanations, stems, strict=True):
        files += explaining.write_pictures(checkpoint, one, folder, stem=stem, num_pairs=num_pairs)
    console.print(_predictions_table(checkpoint, explanations))
    return files


def _predictions_table(checkpoint: Checkpoint, explanations: list[Explanation]) -> Table:
    """A table of predictions, with the truth in brackets where it is known."""
    from .explain import formula

    known = any(one.truth for one in explanations)
    table = Table(title="Predictions" + (" (QM9's values in brackets)" if known else ""))
    table.add_column("molecule")
    table.add_column("formula")
    for target, unit in checkpoint.targets.items():
        table.add_column(f"{target} [{unit}]".replace("[", r"\["), justify="right")
    for one in explanations:
        cells = []
        for target in checkpoint.targets:
            truth = f" ({one.truth[target]:.2f})" if target in one.truth else ""
            cells.append(f"{one.predictions[target]:.2f}{truth}")
        name = one.molecule.name.replace("[", r"\[")
        table.add_row(name, formula(one.molecule.numbers), *cells)
    return table


def _forbid_changes(context: typer.Context) -> None:
    """Raise if a setting is given that a run which goes on already has."""
    for name in context.params:
        source = context.get_parameter_source(name)
        given = source is not None and source.name != "DEFAULT"
        if given and name not in ("output", "resume", "max_minutes"):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option}: cannot be changed with --resume; the run has its own")


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


def _complain(message: str) -> None:
    typer.echo(f"geot: {message}", err=True)


def _list_files(console: Console, files: list[Path] | tuple[Path, ...]) -> None:
    console.print("written:", highlight=False)
    for file in files:
        console.print(f"  {file}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    app()
