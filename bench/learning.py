"""Training of any network under a budget of processor seconds, the same for all who compare.

    loss    mean absolute error of the scaled target
    steps   Adam with AMSGrad, gradients clipped at norm 10
    rate    rises over 300 steps, then falls exponentially with the share of the budget spent
    result  an exponential moving average of the weights

Networks run on one thread each, and seconds are those of the processor: so other processes of the
machine take no share of a budget. Validation is outside it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from geot_model.batches import Batch, Batches
from geot_model.molecules import Molecules
from geot_model.targets import TargetScaler

CLIP = 10.0
WARM_UP = 300
LAST = 0.01  # of the learning rate
AVERAGED = 0.999
POINTS = 12  # of a learning curve

Call = Callable[[nn.Module, Batch], Tensor]  # [B, T], in scaled units


@dataclass
class Learned:
    """What came of a budget.

    Attributes:
        network: With averaged weights.
        curve: Processor seconds, steps, and validation error in the target's unit.
        steps: How many.
        seconds: Spent in them.
        molecules: How many went through them.
    """

    network: nn.Module
    curve: list[tuple[float, int, float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    molecules: int = 0


def learn(
    network: nn.Module,
    call: Call,
    scaler: TargetScaler,
    train: Molecules,
    validation: Molecules,
    *,
    seconds: float,
    learning_rate: float,
    batch_size: int = 32,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Learned:
    """Trains a network for so many processor seconds.

    Args:
        network: The network; it is changed.
        call: Its outputs for a batch.
        scaler: Of the one target.
        train: To learn from.
        validation: For the curve, and nothing else.
        seconds: The budget.
        learning_rate: The highest.
        batch_size: Molecules of a step.
        seed: Of the batches.
        say: Takes a line at each point of the curve.
    """
    averaged = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, amsgrad=True)
    batches = Batches(train, scaler.scale(train), batch_size, seed)
    out = Learned(averaged)
    while out.seconds < seconds:
        for batch in batches:
            start = time.process_time()
            share = out.seconds / seconds
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1, (out.steps + 1) / WARM_UP) * LAST**share
            loss = (call(network, batch) - batch.targets).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()
            out.steps += 1
            out.molecules += len(batch.targets)
            _average(averaged, network, min(AVERAGED, (out.steps + 1) / (out.steps + 10)))
            out.seconds += time.process_time() - start
            if out.seconds >= (len(out.curve) + 1) / POINTS * seconds or out.seconds >= seconds:
                error = mean_absolute_error(averaged, call, scaler, validation)
                out.curve.append((out.seconds, out.steps, error))
                say(f"{out.seconds:.0f} s, {out.steps} steps: {error:.5g}")
            if out.seconds >= seconds:
                break
        batches.epoch += 1
    return out


@torch.no_grad()
def _average(averaged: nn.Module, network: nn.Module, keep: float) -> None:
    own = list(averaged.parameters())
    torch._foreach_lerp_(own, list(network.parameters()), 1 - keep)


@torch.no_grad()
def outputs(network: nn.Module, call: Call, molecules: Molecules, batch_size: int = 64) -> Tensor:
    """Computes the outputs for molecules: `[M, T]`, scaled, in their order."""
    network.train(False)  # and discards tables of weights that have changed
    batches = Batches(molecules, None, batch_size)
    parts = [call(network, batch) for batch in batches]
    out = torch.empty(len(molecules), parts[0].shape[-1])
    out[torch.from_numpy(np.concatenate(batches.rows()))] = torch.cat(parts)
    return out


def mean_absolute_error(
    network: nn.Module, call: Call, scaler: TargetScaler, molecules: Molecules
) -> float:
    """Of the one target, in its unit."""
    predicted = scaler.unscale(outputs(network, call, molecules), molecules)
    truth = torch.from_numpy(molecules.targets[scaler.names[0]])
    return float((torch.as_tensor(predicted)[:, 0] - truth).abs().mean())
