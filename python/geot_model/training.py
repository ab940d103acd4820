"""Training GeoT on QM9: settings, the loop, and the table of errors on molecules never seen.

Loss is the mean absolute error of the standardised targets, the optimizer AdamW, the learning rate
rises linearly over the first 5 % of the steps and then falls as a cosine to 0.
"""

from __future__ import annotations

import contextlib
import csv
import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from .checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from .qm9 import TARGETS, Molecules, load_qm9, pad_batch, random_split

DATA = ("qm9-sample", "qm9")
FRACTIONS = (0.85, 0.05, 0.10)
"""Shares of training, validation (which model is best) and test (the table)."""

BEST, LAST, RESULTS = "best.pt", "last.ckpt", "results.csv"

_WARM_UP = 0.05  # of the steps
_LARGEST_GRADIENT = 10.0  # norm; rarely reached, and a bad batch does no harm
_EVALUATION_BATCH = 64

_Batch = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """What a training run depends on; the same settings give the same model.

    Attributes:
        data: "qm9-sample", the 3,000 molecules that ship with the package, or "qm9".
        targets: What to predict, names of `qm9.TARGETS`.
        molecules: How many molecules to draw from the data at random; None for all.
        epochs: Passes over the training molecules.
        batch_size: Molecules in a step.
        learning_rate: The highest, after the warm-up.
        weight_decay: Of AdamW.
        seed: Of the weights, the split and the order of the batches.
        embed_dim: Width of the network.
        num_heads: Heads of each attention, a divisor of `embed_dim`.
        num_layers: Layers.
        attention_scale: Whether each attention has GeoT's learned scale.
        num_gaussians: Gaussians of the filters' radial basis, evenly spaced up to `r_max`.
        filter_hidden: Width of the filters' hidden layer.
        r_max: Where the filters' tables end, Å. QM9's largest distance is 12.04 Å.
        num_knots: Of those tables.

    Raises:
        ValueError: A setting is out of its range, or contradicts another.
    """

    data: str = "qm9-sample"
    targets: tuple[str, ...] = ("homo", "lumo", "gap")
    molecules: int | None = None
    epochs: int = 100
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    seed: int = 0
    embed_dim: int = 64
    num_heads: int = 4
    num_layers: int = 4
    attention_scale: bool = True
    num_gaussians: int = 128
    filter_hidden: int = 64
    r_max: float = 13.0
    num_knots: int = 256

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.data not in DATA:
            raise ValueError(f"data: expected one of {', '.join(DATA)}, got '{self.data}'")
        for name in self.targets:
            if name not in TARGETS:
                raise ValueError(f"targets: expected names of {', '.join(TARGETS)}, got '{name}'")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            got = ", ".join(self.targets) or "none"
            raise ValueError(f"targets: expected one or several different ones, got {got}")
        least = {"epochs": 1, "batch_size": 1, "embed_dim": 1, "num_heads": 1, "num_layers": 1}
        for name, least_value in least.items():
            if getattr(self, name) < least_value:
                got = getattr(self, name)
                raise ValueError(f"{name}: expected at least {least_value}, got {got}")
        if self.molecules is not None and self.molecules < _FEWEST:
            raise ValueError(f"molecules: expected at least {_FEWEST}, got {self.molecules}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a number > 0, got {self.learning_rate}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected 0 to 2^32 - 1, got {self.seed}")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim: expected a multiple of num_heads={self.num_heads}, "
                f"got {self.embed_dim}"
            )

    def model_config(self) -> dict[str, Any]:
        """What a `Checkpoint` says of the network."""
        basis = {"num_basis": self.num_gaussians, "r_max": self.r_max}
        return {
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "num_layers": self.num_layers,
            "attention_scale": self.attention_scale,
            "basis": basis,
            "filter_hidden": self.filter_hidden,
            "r_max": self.r_max,
            "num_knots": self.num_knots,
        }


_FEWEST = 20  # molecules of which a tenth is 2 and a twentieth 1


@dataclass(frozen=True, eq=False)
class Split:
    """The molecules of a run.

    Attributes:
        train: For the weights, and all that is fitted or averaged.
        validation: For the choice of the best epoch.
        test: For the table of errors and nothing else.
    """

    train: Molecules
    validation: Molecules
    test: Molecules

    @classmethod
    def load(cls, settings: Settings) -> Split:
        """Read the data and split it: the same for the same data, `molecules` and seed.

        Raises:
            ModuleNotFoundError: The data "qm9" without the package qm9pack.
            ValueError: There are fewer molecules than asked for.
        """
        molecules = load_qm9(full=settings.data == "qm9")
        if settings.molecules is not None:
            if settings.molecules > len(molecules):
                raise ValueError(
                    f"molecules: expected at most {len(molecules)}, got {settings.molecules}"
                )
            order = np.random.RandomState(settings.seed).permutation(len(molecules))
            molecules = molecules[np.sort(order[: settings.molecules])]
        train, validation, test = random_split(len(molecules), FRACTIONS, settings.seed)
        return cls(molecules[train], molecules[validation], molecules[test])


def target_matrix(molecules: Molecules, targets: tuple[str, ...]) -> NDArray[np.float64]:
    """Stack targets: float64 [M, T], in the units of `TARGETS`."""
    return np.stack([molecules.targets[name] for name in targets], axis=1)


class Batches:
    """Batches of molecules of about one size, so that little of a batch is padding.

    Attributes:
        epoch: Chooses the batches, the same for the same seed and epoch.

    Args:
        molecules: What to make batches of.
        targets: float32 [M, T].
        batch_size: Molecules in a batch, the last one may have fewer.
        seed: None: the molecules come by size, the same batches in each epoch.
    """

    def __init__(
        self, molecules: Molecules, targets: Tensor, batch_size: int, seed: int | None = None
    ) -> None:
        self.molecules, self.targets, self.batch_size = molecules, targets, batch_size
        self.seed, self.epoch = seed, 0
        self._sizes = np.diff(molecules.ptr)

    def rows(self) -> list[NDArray[np.int64]]:
        """Choose the molecules of each batch."""
        count = len(self.molecules)
        cuts = range(self.batch_size, count, self.batch_size)
        if self.seed is None:
            return np.split(np.argsort(self._sizes, kind="stable"), cuts)
        random = np.random.RandomState([self.seed, self.epoch])
        order = random.permutation(count)
        batches = np.split(order[np.argsort(self._sizes[order], kind="stable")], cuts)
        return [batches[i] for i in random.permutation(len(batches))]

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.molecules) // self.batch_size)

    def __iter__(self) -> Iterator[_Batch]:
        """Give atomic numbers, positions, mask (as `pad_batch`) and targets of each batch."""
        for rows in self.rows():
            yield *pad_batch(self.molecules[rows]), self.targets[torch.from_numpy(rows)]


class TrainingModule(LightningModule):
    """Loss, optimizer and learning rate, for Lightning.

    Args:
        model: The network.
        settings: The run's.
        steps: Of the whole run.
    """

    def __init__(self, model: nn.Module, settings: Settings, steps: int) -> None:
        super().__init__()
        self.model, self.settings, self.steps = model, settings, steps

    def on_train_epoch_start(self) -> None:
        """Choose the batches of the epoch, which the loop draws from here on."""
        batches: Any = self.trainer.train_dataloader
        batches.epoch = self.current_epoch

    def configure_optimizers(self) -> Any:
        """Make the optimizer and the schedule of the learning rate."""
        optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
        )
        schedule = LambdaLR(optimizer, self._learning_rate_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _learning_rate_factor(self, step: int) -> float:
        warm_up = min((step + 1) / max(_WARM_UP * self.steps, 1.0), 1.0)
        return warm_up * (1 + math.cos(math.pi * min(step / self.steps, 1.0))) / 2

    def training_step(self, batch: _Batch, _: int) -> Tensor:
        """Compute the loss, and log it."""
        return self._error("train", batch)

    def validation_step(self, batch: _Batch, _: int) -> None:
        """Log the error."""
        self._error("validation", batch)

    def _error(self, name: str, batch: _Batch) -> Tensor:
        *molecules, targets = batch
        error = nn.functional.l1_loss(self.model(*molecules), targets)
        self.log(name, error, on_step=False, on_epoch=True, batch_size=len(targets))
        return error


class _Keeper(Callback):
    """Writes the model of the best epoch so far.

    It runs before the state of training is saved: if the run ends between the two, that epoch is
    repeated.
    """

    def __init__(self, settings: Settings, split: Split, path: Path) -> None:
        values = target_matrix(split.train, settings.targets)
        self.settings, self.split, self.path = settings, split, path
        self.mean = torch.from_numpy(values.mean(axis=0))
        # A target that is the same for all molecules is left as it is.
        self.std = torch.from_numpy(np.where(np.ptp(values, axis=0) > 0, values.std(axis=0), 1.0))
        self.best = math.inf

    def standardised(self, molecules: Molecules) -> Tensor:
        """Standardise targets by their mean and deviation on the training split."""
        values = torch.from_numpy(target_matrix(molecules, self.settings.targets))
        return ((values - self.mean) / self.std).float()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the model if it is the best."""
        error = float(trainer.callback_metrics["validation"])
        if not error < self.best:
            return
        self.best = error
        settings, split = self.settings, self.split
        checkpoint = Checkpoint(
            config=settings.model_config(),
            state_dict=pl_module.model.state_dict(),
            targets={name: TARGETS[name] for name in settings.targets},
            mean=self.mean,
            std=self.std,
            elements=elements_of(split),
            max_atoms=split.train.max_atoms,
            held_out=tuple(map(str, split.test.names)),
            training=asdict(settings) | {"epoch": trainer.current_epoch + 1},
        )
        save_checkpoint(checkpoint, self.path)

    def state_dict(self) -> dict[str, Any]:
        """What an interrupted run has to know."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.best = state_dict["best"]


class _Reporter(Callback):
    """A progress bar on a terminal, a line for each of some twenty epochs everywhere, the clock.

    Stops the run after an epoch if the next one would end after `max_minutes`.
    """

    def __init__(self, console: Console, epochs: int, max_minutes: float | None) -> None:
        self.console, self.epochs = console, epochs
        self.limit = math.inf if max_minutes is None else 60 * max_minutes
        self.start = self.epoch_start = time.monotonic()
        self.longest = 0.0
        self.stopped = False
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, transient=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar."""
        steps = int(trainer.num_training_batches)
        self.task = self.bar.add_task(
            "training", total=steps * self.epochs, completed=steps * trainer.current_epoch
        )
        if self.console.is_terminal:
            self.bar.start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the epoch in the bar."""
        self.epoch_start = time.monotonic()
        description = f"epoch {trainer.current_epoch + 1}/{self.epochs}"
        self.bar.update(self.task, description=description)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Move the bar."""
        self.bar.advance(self.task)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the errors, look at the clock."""
        epoch = trainer.current_epoch + 1
        now = time.monotonic()
        self.longest = max(self.longest, now - self.epoch_start)
        last = epoch == self.epochs
        if not last and now - self.start + self.longest > self.limit:
            self.stopped = last = trainer.should_stop = True
        if last or epoch == 1 or epoch % math.ceil(self.epochs / 20) == 0:
            errors = trainer.callback_metrics
            self.console.print(
                f"epoch {epoch:3d}/{self.epochs}   error/σ: training {errors['train']:.3f}, "
                f"validation {errors['validation']:.3f}   {now - self.start:.0f} s",
                highlight=False,
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar away."""
        self.bar.stop()

    def on_exception(self, *_: Any) -> None:
        """Take the bar away."""
        self.bar.stop()


class _SettingsSaver(Callback):
    """Puts the settings into the state of training, so that a run goes on with its own."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add them."""
        checkpoint["geot_settings"] = asdict(self.settings)


@dataclass(frozen=True)
class TargetError:
    """Mean absolute errors on the test molecules, in `unit`.

    Attributes:
        target: Name of the target.
        unit: Its unit.
        geot: Of the model.
        mean: Of predicting the mean of the training molecules.
        linear: Of a linear model on element counts, fitted to the training molecules.
    """

    target: str
    unit: str
    geot: float
    mean: float
    linear: float


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        errors: One for each target.
        counts: Molecules for training, validation and test.
        epochs: How many were done.
        stopped: Whether the time was up before the last epoch.
        files: What was written.
    """

    errors: tuple[TargetError, ...]
    counts: tuple[int, int, int]
    epochs: int
    stopped: bool
    files: tuple[Path, ...]

    def table(self) -> Table:
        """Make the table of errors."""
        train, _, test = self.counts
        table = Table(
            title=f"Mean absolute error on {test:,} molecules never seen",
            caption=f"fitted to {train:,} molecules; linear model: on element counts",
        )
        for column in ("target", "unit"):
            table.add_column(column)
        for column in ("GeoT", "linear model", "always the mean"):
            table.add_column(column, justify="right", style="bold" if column == "GeoT" else None)
        for row in self.errors:
            numbers = (f"{value:.3f}" for value in (row.geot, row.linear, row.mean))
            table.add_row(row.target, row.unit, *numbers)
        return table


def train(
    settings: Settings,
    split: Split,
    folder: str | Path,
    *,
    resume: bool = False,
    max_minutes: float | None = None,
    console: Console | None = None,
) -> Outcome:
    """Train a model and measure it on molecules that it never saw.

    Writes into `folder`: `best.pt`, the model of the epoch with the least validation error
    (`load_checkpoint` reads it); `last.ckpt`, the state after the last epoch, from which an
    interrupted run goes on as if nothing had happened; `results.csv`, the table.

    Args:
        settings: The run's; with `resume` those of `last.ckpt` (`load_settings`).
        split: `Split.load(settings)`.
        folder: Made if it is not there.
        resume: Whether to go on from `folder`'s `last.ckpt`.
        max_minutes: Stop after an epoch if the next one would end later than that.
        console: Where progress is shown; None for stdout.

    Raises:
        KeyboardInterrupt: The run was interrupted.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    keeper = _Keeper(settings, split, folder / BEST)
    reporter = _Reporter(console or Console(), settings.epochs, max_minutes)
    size = settings.batch_size
    batches = Batches(split.train, keeper.standardised(split.train), size, settings.seed)
    validation = Batches(split.validation, keeper.standardised(split.validation), size)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = build_model(settings.model_config(), len(settings.targets), elements_of(split))
    module = TrainingModule(model, settings, settings.epochs * len(batches))
    with _quiet_lightning():
        trainer = Trainer(
            accelerator=device_type().replace("cuda", "gpu"),
            devices=1,
            plugins=[LightningEnvironment()],
            max_epochs=settings.epochs,
            gradient_clip_val=_LARGEST_GRADIENT,
            callbacks=[reporter, _SettingsSaver(settings), keeper, _state_saver(folder)],
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        last = os.fspath(folder / LAST) if resume else None
        _fit(trainer, module, batches, validation, last)
    errors = measure(load_checkpoint(folder / BEST), split)
    write_errors(errors, folder / RESULTS)
    return Outcome(
        errors,
        (len(split.train), len(split.validation), len(split.test)),
        trainer.current_epoch,
        reporter.stopped,
        tuple(folder / name for name in (BEST, LAST, RESULTS)),
    )


def device_type() -> str:
    """Where to compute: "cuda" if it is there, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def elements_of(split: Split) -> tuple[int, ...]:
    """Atomic numbers in a data set, sorted."""
    parts = (split.train, split.validation, split.test)
    return tuple(sorted({element for part in parts for element in part.elements}))


def load_settings(folder: str | Path) -> Settings:
    """Read the settings of the run in a folder.

    Raises:
        ValueError: There is no run, or its state is damaged.
    """
    path = Path(folder) / LAST
    expected = "the state of training that 'geot train' writes after each epoch"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected {expected}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        values = state["geot_settings"]
        names = {field.name for field in fields(Settings)}
        return Settings(**{name: value for name, value in values.items() if name in names})
    except Exception as error:  # bytes that are no checkpoint can raise anything
        raise ValueError(f"{path}: damaged or something else; expected {expected}") from error


def _state_saver(folder: Path) -> ModelCheckpoint:
    """Makes the callback that writes `last.ckpt` after each epoch (Lightning runs it last)."""
    return ModelCheckpoint(
        dirpath=folder,
        filename=Path(LAST).stem,
        save_top_k=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


def _fit(
    trainer: Trainer,
    module: LightningModule,
    batches: Batches,
    validation: Batches,
    state: str | None,
) -> None:
    """Run Lightning's loop; an interruption is a KeyboardInterrupt and leaves Ctrl-C working."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, batches, validation, ckpt_path=state, weights_only=True)
    except SystemExit as exit_:  # what Lightning makes of Ctrl-C
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from exit_


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silences Lightning's notes on devices and on its other products, and warnings of no use."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Lightning 2.6 calls what torch 2.13 deprecates.
            warnings.filterwarnings("ignore", ".*treespec, LeafSpec.* is deprecated")
            # To overwrite last.ckpt, and to go on in a folder that was moved, is what we want.
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            warnings.filterwarnings("ignore", "The dirpath has changed from")
            yield
    finally:
        logger.setLevel(level)


def measure(checkpoint: Checkpoint, split: Split) -> tuple[TargetError, ...]:
    """Measure a model on the test molecules, beside the mean and the linear model."""
    targets = tuple(checkpoint.targets)
    fitted, truth = (target_matrix(part, targets) for part in (split.train, split.test))
    elements = elements_of(split)
    design = element_counts(split.train, elements)
    weights = np.linalg.lstsq(design, fitted, rcond=None)[0]
    predictions = {
        "geot": predict(checkpoint, split.test).numpy(),
        "mean": np.broadcast_to(fitted.mean(axis=0), truth.shape),
        "linear": element_counts(split.test, elements) @ weights,
    }
    errors = {name: np.abs(values - truth).mean(axis=0) for name, values in predictions.items()}
    return tuple(
        TargetError(
            target, unit, **{name: float(values[column]) for name, values in errors.items()}
        )
        for column, (target, unit) in enumerate(checkpoint.targets.items())
    )


def element_counts(molecules: Molecules, elements: tuple[int, ...]) -> NDArray[np.float64]:
    """Count the atoms of each element, and put 1 before: float64 [M, 1 + elements]."""
    is_element = molecules.numbers[:, None] == np.array(elements)  # [T, elements]
    sums = np.concatenate([np.zeros((1, len(elements))), np.cumsum(is_element, axis=0)])
    counts = sums[molecules.ptr[1:]] - sums[molecules.ptr[:-1]]
    return np.concatenate([np.ones((len(molecules), 1)), counts], axis=1)


def predict(checkpoint: Checkpoint, molecules: Molecules) -> Tensor:
    """Predict the targets of molecules: float64 [M, T], in their units."""
    model = checkpoint.model(device_type())
    out = torch.empty(len(molecules), len(checkpoint.targets), dtype=torch.float64)
    nothing = torch.empty(len(molecules), 0)
    for rows in Batches(molecules, nothing, _EVALUATION_BATCH).rows():
        batch = pad_batch(molecules[rows])
        out[torch.from_numpy(rows)] = checkpoint.predict(model, *batch)
    return out


def write_errors(errors: tuple[TargetError, ...], path: Path) -> None:
    """Write the table of errors as CSV."""
    rows: list[Mapping[str, Any]] = [
        {
            "target": row.target,
            "unit": row.unit,
            "mae_geot": row.geot,
            "mae_linear": row.linear,
            "mae_mean": row.mean,
        }
        for row in errors
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
