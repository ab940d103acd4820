"""What happens during training besides training: averaging, keeping the best, showing progress."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from .checkpoint import Card, save_model
from .settings import Settings

_LINES = 20  # printed in a run, about


class DivergedError(RuntimeError):
    """The error of an epoch is not a number."""


class Averaging(WeightAveraging):
    """The exponential moving average of the weights, which is what is validated and kept.

        average <- d average + (1 - d) weights,    d = min(decay, (1 + step) / (10 + step))

    so that the first weights are soon forgotten, also in a short run. Buffers are copied: those of
    GeoT are numbers of elements.

    Args:
        decay: What `d` becomes.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False, multi_avg_fn=self._update)
        self.decay = decay

    @torch.no_grad()
    def _update(self, averaged: list[Tensor], current: list[Tensor], _: Any) -> None:
        step = self._latest_update_step
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def averaged(self) -> Any:
        """The `LightningModule` with the averages."""
        assert self._average_model is not None
        return self._average_model.module


class Keeper(Callback):
    """Writes the model of the best epoch so far.

    It runs before the state of training is saved: if the run ends between the two, that epoch is
    repeated.

    Args:
        card: What to write with the weights; the number of the epoch is added to its `training`.
        path: Where to.
        averaging: Whose weights are kept; None: the trained ones.
    """

    def __init__(self, card: Card, path: Path, averaging: Averaging | None) -> None:
        self.card, self.path, self.averaging = card, path, averaging
        self.best = math.inf

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the model if it is the best.

        Raises:
            DivergedError: An error is not a number.
        """
        metrics, epoch = trainer.callback_metrics, trainer.current_epoch + 1
        for name in ("training", "validation"):
            if not math.isfinite(metrics[name]):
                raise DivergedError(
                    f"the {name} error of epoch {epoch} is {float(metrics[name])}; a smaller "
                    "training.learning_rate or a longer training.warm_up may help"
                )
        error = float(metrics["validation"])
        if not error < self.best:
            return
        self.best = error
        if trainer.is_global_zero:
            module = pl_module if self.averaging is None else self.averaging.averaged()
            training = self.card.training | {"epoch": epoch}
            save_model(module.model, replace(self.card, training=training), self.path)

    def state_dict(self) -> dict[str, Any]:
        """What an interrupted run has to know."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.best = state_dict["best"]


class Reporter(Callback):
    """A progress bar on a terminal, a line for some epochs everywhere, the clock.

    Stops the run after an epoch if the next one would end after `max_minutes`.

    Attributes:
        stopped: Whether it did.

    Args:
        console: Where to print.
        settings: The run's.
    """

    def __init__(self, console: Console, settings: Settings) -> None:
        training = settings.training
        self.console, self.epochs = console, training.epochs
        self.every = training.log_every or math.ceil(self.epochs / _LINES)
        minutes = training.max_minutes
        self.limit = math.inf if minutes is None else 60 * minutes
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
        late = not last and now - self.start + self.longest > self.limit
        # All processes stop where one is late.
        if trainer.strategy.reduce_boolean_decision(late, all=False):
            self.stopped = last = trainer.should_stop = True
        if last or epoch == 1 or epoch % self.every == 0:
            errors = trainer.callback_metrics
            self.console.print(
                f"epoch {epoch:3d}/{self.epochs}   error/σ: training {errors['training']:.3f}, "
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
        checkpoint["geot_settings"] = self.settings.model_dump(mode="json")
