"""What happens after each epoch of training: the best model is kept, progress is shown."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from .checkpoint import Checkpoint, save_checkpoint
from .dataset import Settings, Split, elements_of, target_matrix
from .molecules import Molecules
from .qm9 import TARGETS


class Keeper(Callback):
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


class Reporter(Callback):
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


class SettingsSaver(Callback):
    """Puts the settings into the state of training, so that a run goes on with its own."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add them."""
        checkpoint["geot_settings"] = asdict(self.settings)
