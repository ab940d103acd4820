"""Training GeoT: the loop, and what comes of it.

Loss is the mean absolute error of the scaled targets over those that are known, the optimizer
Adam with AMSGrad. The learning rate rises linearly, then falls exponentially with each step.
"""

from __future__ import annotations

import contextlib
import csv
import logging
import os
import re
import shutil
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from . import distributed
from .batches import Batch, Batches
from .callbacks import Averaging, Keeper, Reporter, SettingsSaver
from .checkpoint import FILE, Card, build_model, load_model
from .curve import draw_learning_curve
from .molecules import Molecules
from .readers import read
from .results import TargetError, measure, write_errors
from .settings import Settings
from .splits import Split
from .splits import split as split_molecules
from .targets import TargetScaler

BEST, LAST, RESULTS = FILE, "last.ckpt", "results.csv"
CONFIG, CURVE, LOG = "config.yaml", "learning-curve.png", "log"
METRICS = "metrics.csv"  # in LOG


class TrainingModule(LightningModule):
    """Loss, optimizer and learning rate, for Lightning.

    The gradient is that of the mean over the known targets of a whole batch, also where the batch
    is divided among processes, whose gradients Lightning averages. Logs, once an epoch, "training"
    and "validation", the means over all known targets, and "mae/..." for each target, in its unit.

    Args:
        model: The network.
        settings: The run's.
        steps: Of the whole run.
        scaler: Of the targets.
    """

    def __init__(
        self, model: nn.Module, settings: Settings, steps: int, scaler: TargetScaler
    ) -> None:
        super().__init__()
        self.model, self.settings, self.steps, self.scaler = model, settings, steps, scaler
        self._sums: dict[str, Tensor] = {}

    def configure_optimizers(self) -> Any:
        """Make the optimizer and the schedule of the learning rate."""
        training = self.settings.training
        kind = torch.optim.AdamW if training.weight_decay else torch.optim.Adam
        optimizer = kind(
            self.model.parameters(),
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            amsgrad=True,
            foreach=True,
        )
        schedule = LambdaLR(optimizer, self._learning_rate_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _learning_rate_factor(self, step: int) -> float:
        training = self.settings.training
        warm_up = training.warm_up * (self.steps if training.warm_up < 1 else 1)
        if step + 1 < warm_up:
            return (step + 1) / warm_up
        fall = (step + 1 - warm_up) / max(self.steps - warm_up, 1)
        return float(training.decay ** min(fall, 1.0))

    def on_train_epoch_start(self) -> None:
        """Choose the batches of the epoch, which the loop draws from here on."""
        batches: Any = self.trainer.train_dataloader
        batches.epoch = self.current_epoch
        for name in ("training", "validation"):
            shape = (2, len(self.scaler.names))
            self._sums[name] = torch.zeros(shape, dtype=torch.float64, device=self.device)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """Compute the loss."""
        error = self._error("training", batch)
        return error * (self.trainer.world_size / max(batch.known, 1))

    def validation_step(self, batch: Batch, _: int) -> None:
        """Add up the error."""
        self._error("validation", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the errors of the epoch."""
        validation = self._log_mean("validation")
        self._log_mean("training")
        for name, deviation, (error, known) in zip(
            self.scaler.names, self.scaler.std, validation.T.tolist(), strict=True
        ):
            if known:
                key = re.sub(r"[^\w.+-]", "_", name)
                self.log(f"mae/{key}", error * deviation / known)
        self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])

    def _error(self, name: str, batch: Batch) -> Tensor:
        """Sum of the absolute errors of a batch, which is added to those of the epoch."""
        out = self.model(batch.numbers, batch.positions, ptr=batch.ptr, max_atoms=batch.max_atoms)
        known = batch.targets.isfinite()
        errors = torch.where(known, out.float() - batch.targets, 0).abs()  # [B, targets]
        self._sums[name] += torch.stack([errors.detach().double().sum(0), known.double().sum(0)])
        return errors.sum()

    def _log_mean(self, name: str) -> Tensor:
        """Log the mean of an epoch; the sums of errors and of known targets: [2, targets]."""
        sums: Tensor = self.trainer.strategy.reduce(self._sums[name], reduce_op="sum")
        error, known = sums.sum(1)
        self.log(name, error / known)
        return sums


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


def load_split(settings: Settings) -> tuple[Split, list[str]]:
    """Read the data and split them: the same for the same settings.

    Molecules for validation and test with an element that no training molecule has are left out.

    Returns:
        The split, and what could not be read or used, one line each.

    Raises:
        ModuleNotFoundError: A package is missing that the data need.
        OSError: A file cannot be read.
        ValueError: There are no such targets, or too few molecules.
    """
    data, options = settings.data, settings.split
    found = read(data.source, targets=tuple(data.targets), smiles=data.smiles, name=data.name)
    molecules, problems = found.molecules, list(found.problems)
    given = {name: target.unit for name, target in data.targets.items() if target.unit}
    molecules = replace(molecules, units={**molecules.units, **given})
    if data.molecules is not None:
        if data.molecules > len(molecules):
            raise ValueError(
                f"data.molecules: expected at most {len(molecules)}, got {data.molecules}"
            )
        order = np.random.RandomState(options.seed).permutation(len(molecules))
        molecules = molecules[np.sort(order[: data.molecules])]
    parts = split_molecules(
        molecules,
        kind=options.kind,
        fractions=options.fractions,
        seed=options.seed,
        file=options.file,
    )
    kept = {}
    for name in ("validation", "test"):
        kept[name], left_out = _with_elements(getattr(parts, name), parts.train.elements)
        if left_out:
            problems.append(
                f"{name}: {left_out} molecules left out: no training molecule has their elements"
            )
    parts = replace(parts, **kept)
    for name in ("train", "validation"):
        part = getattr(parts, name)
        if not any(np.isfinite(part.targets[target]).any() for target in data.targets):
            raise ValueError(
                f"split: expected some molecules with known targets for {name}, got none of the "
                f"{len(part)} there"
            )
    return parts, problems


def _with_elements(molecules: Molecules, elements: tuple[int, ...]) -> tuple[Molecules, int]:
    """The molecules of some elements alone, and how many others there were."""
    strange = ~np.isin(molecules.numbers, elements)
    owner = np.repeat(np.arange(len(molecules)), np.diff(molecules.ptr))
    usable = np.bincount(owner[strange], minlength=len(molecules)) == 0
    return molecules[usable], int((~usable).sum())


def train(
    settings: Settings,
    split: Split,
    folder: str | Path,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Train a model and measure it on molecules that it never saw.

    Writes into `folder`: `model.safetensors`, the model of the epoch with the least validation
    error (`GeoT.load` reads it); `last.ckpt`, the state after the last epoch, from which an
    interrupted run goes on as if nothing had happened; `config.yaml`, the settings; `results.csv`,
    the table; `learning-curve.png`; `log`, for TensorBoard and as `metrics.csv`.

    Args:
        settings: The run's; with `resume` those of `last.ckpt` (`load_settings`).
        split: `load_split(settings)`, or another.
        folder: Made if it is not there.
        resume: Whether to go on from `folder`'s `last.ckpt`.
        console: Where progress is shown; None for stdout.

    Raises:
        KeyboardInterrupt: The run was interrupted.
        DivergedError: An error is not a number.
        ProcessError: One of several processes failed.
        ValueError: There are not so many devices.
    """
    folder, console = Path(folder), console or Console()
    kind, world = choose_devices(settings)
    folder.mkdir(parents=True, exist_ok=True)
    settings.write(folder / CONFIG)
    job: dict[str, Any] = {"settings": settings, "split": split, "folder": folder}
    job["resume"] = resume
    if world == 1:
        epochs, stopped = fit(**job, console=console)
    else:
        backend = "nccl" if kind == "gpu" else "gloo"
        epochs, stopped = distributed.launch(fit, job, world, backend=backend, console=console)
    errors = measure(load_model(folder / BEST), split)
    write_errors(errors, folder / RESULTS)
    draw_learning_curve(folder / LOG / METRICS, folder / CURVE)
    return Outcome(
        errors,
        (len(split.train), len(split.validation), len(split.test)),
        epochs,
        stopped,
        tuple(folder / name for name in (BEST, CONFIG, RESULTS, CURVE, LAST, LOG)),
    )


def choose_devices(settings: Settings) -> tuple[str, int]:
    """Choose "gpu" or "cpu", and how many.

    Raises:
        ValueError: There are not so many.
    """
    training, there = settings.training, torch.cuda.device_count()
    kind = training.accelerator
    if kind == "auto":
        kind = "gpu" if there else "cpu"
    if kind == "gpu" and training.devices > there:
        raise ValueError(
            f"training.devices: expected at most the {there} GPUs that PyTorch sees, "
            f"got {training.devices}"
        )
    return kind, training.devices


def fit(
    settings: Settings, split: Split, folder: Path, *, resume: bool, console: Console
) -> tuple[int, bool]:
    """Run the loop in one process, which may be one of several; how `train` calls it.

    Returns:
        How many epochs there are now, and whether the time was up.
    """
    training = settings.training
    kind, world = choose_devices(settings)
    share = {"rank": int(os.environ["LOCAL_RANK"]) if world > 1 else 0, "world": world}
    targets = settings.data.targets
    scaler = TargetScaler.fit(
        split.train,
        tuple(targets),
        tuple(target.readout for target in targets.values()),
        {name: target.reference for name, target in targets.items()},
    )
    size = training.batch_size
    batches = Batches(
        split.train,
        scaler.scale(split.train),
        size,
        training.seed,
        bucket=training.bucket,
        **share,
    )
    validation = Batches(split.validation, scaler.scale(split.validation), size, **share)
    card = _card(settings, split, scaler)
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        model = build_model(card, device="cuda" if kind == "gpu" else "cpu")
    module = TrainingModule(model, settings, training.epochs * len(batches), scaler)
    averaging = Averaging(training.ema) if training.ema else None
    reporter = Reporter(console, settings)
    keeper = Keeper(card, folder / BEST, averaging)
    callbacks = [reporter, SettingsSaver(settings), keeper, _state_saver(folder)]
    if averaging is not None:
        callbacks.append(averaging)
    if training.early_stopping:
        callbacks.append(
            EarlyStopping(
                "validation", patience=training.early_stopping, check_on_train_epoch_end=True
            )
        )
    with _quiet_lightning():
        trainer = Trainer(
            accelerator=kind,
            devices=world,
            strategy=DDPStrategy() if world > 1 else "auto",
            plugins=[LightningEnvironment()],
            precision="bf16-mixed" if training.precision == "bf16-mixed" else "32-true",
            max_epochs=training.epochs,
            gradient_clip_val=training.clip or None,
            callbacks=callbacks,
            default_root_dir=folder,
            logger=_loggers(folder, resume=resume),
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        last = os.fspath(folder / LAST) if resume else None
        _fit(trainer, module, batches, validation, last)
    return trainer.current_epoch, reporter.stopped


def _card(settings: Settings, split: Split, scaler: TargetScaler) -> Card:
    """What is written with the weights."""
    return Card(
        config=settings.model.arguments(),
        scaler=scaler,
        elements=split.train.elements,
        max_atoms=split.train.max_atoms,
        held_out=tuple(map(str, split.test.names)),
        training=settings.model_dump(mode="json"),
    )


def load_settings(folder: str | Path) -> Settings:
    """Read the settings of the run in a folder, but for its time limit.

    Raises:
        ValueError: There is no run, or its state is damaged.
    """
    values = _load_state(Path(folder))["geot_settings"]
    return Settings(**values).change(training={"max_minutes": None})


def _load_state(folder: Path) -> dict[str, Any]:
    path = folder / LAST
    expected = "the state of training that 'geot train' writes after each epoch"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected {expected}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: state[name] for name in ("geot_settings", "global_step")}
    except Exception as error:  # bytes that are no checkpoint can raise anything
        raise ValueError(f"{path}: damaged or something else; expected {expected}") from error


def _loggers(folder: Path, *, resume: bool) -> list[Logger]:
    """Logs for people and for TensorBoard; of a run that goes on, they go on."""
    rows: list[dict[str, str]] = []
    step = None
    if resume:
        step = _load_state(folder)["global_step"]
        with contextlib.suppress(FileNotFoundError), (folder / LOG / METRICS).open() as file:
            # What was logged after the state was written comes again.
            rows = [row for row in csv.DictReader(file) if int(row["step"] or step + 1) <= step]
    else:
        shutil.rmtree(folder / LOG, ignore_errors=True)
    table = CSVLogger(folder, name="", version=LOG, flush_logs_every_n_steps=1)
    for row in rows:
        values: dict[str, Any] = {
            name: float(value) for name, value in row.items() if value and name != "step"
        }
        table.log_metrics(values | {"epoch": int(row["epoch"])}, int(row["step"]))
    return [table, TensorBoardLogger(folder, name="", version=LOG, purge_step=step)]


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
            warnings.filterwarnings("ignore", "Experiment logs directory .* exists")
            warnings.filterwarnings("ignore", "The dirpath has changed from")
            # What we log is reduced already.
            warnings.filterwarnings("ignore", "It is recommended to use .self.log")
            yield
    finally:
        logger.setLevel(level)
