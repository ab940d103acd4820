"""Training GeoT: the loop, and what comes of it.

Loss is the mean absolute error of the standardised targets, the optimizer AdamW, the learning rate
rises linearly over the first 5 % of the steps and then falls as a cosine to 0.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from .callbacks import Keeper, Reporter, SettingsSaver
from .checkpoint import build_model, load_checkpoint
from .dataset import Batch, Batches, Settings, Split, elements_of
from .results import TargetError, device_type, measure, write_errors

BEST, LAST, RESULTS = "best.pt", "last.ckpt", "results.csv"

_WARM_UP = 0.05  # of the steps
_LARGEST_GRADIENT = 10.0  # norm; rarely reached, and a bad batch does no harm


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

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """Compute the loss, and log it."""
        return self._error("train", batch)

    def validation_step(self, batch: Batch, _: int) -> None:
        """Log the error."""
        self._error("validation", batch)

    def _error(self, name: str, batch: Batch) -> Tensor:
        *molecules, targets = batch
        error = nn.functional.l1_loss(self.model(*molecules), targets)
        self.log(name, error, on_step=False, on_epoch=True, batch_size=len(targets))
        return error


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
    keeper = Keeper(settings, split, folder / BEST)
    reporter = Reporter(console or Console(), settings.epochs, max_minutes)
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
            callbacks=[reporter, SettingsSaver(settings), keeper, _state_saver(folder)],
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
