"""What a call costs beside its kernel, and what a table costs: `python -m bench.calls`.

Operators run with trivial kernels (they allocate their results and compute nothing), interleaved
with a bare `autograd.Function` of the same five tensors and with PyTorch's own attention. The
table is that of GeoT's radial network, 300 Gaussians, 64 hidden, 1024 channels, 1024 knots.
Microseconds of processor time in one thread for the calls, of wall time in all for the table.
"""

from __future__ import annotations

import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import geot_kernels as gk
from geot_kernels import ops
from geot_kernels.backends.inputs import Inputs

from .timing import Times, interleaved

CALLS, ROUNDS = 200, 25


class Trivial:
    """A backend whose launchers only allocate their results."""

    def attention(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Forward."""
        return torch.empty(inputs.q.shape), torch.empty(inputs.q.shape[:-1])

    def attention_bwd(self, inputs: Any, *rest: Any) -> list[Tensor]:
        """First backward."""
        pairs = zip(inputs[:6], rest[-1], strict=True)
        return [torch.empty(x.shape) for x, needed in pairs if needed]

    def attention_bwd_bwd(self, inputs: Any, tangent: Any, *rest: Any) -> list[Tensor]:
        """Second backward."""
        pairs = zip((*rest[:2], *inputs[:6]), rest[-1], strict=True)
        return [torch.empty(x.shape) for x, needed in pairs if needed]


class Bare(torch.autograd.Function):
    """What PyTorch itself takes for a function of five tensors and its gradient."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        """Allocates a result."""
        ctx.save_for_backward(*tensors)
        return torch.empty(tensors[0].shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Allocates the gradients."""
        return tuple(torch.empty(x.shape) for x in ctx.saved_tensors)


def call_functions() -> dict[str, Callable[[], Any]]:
    """The calls to compare; the operators must run with `Trivial`."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 2, 4) for _ in range(3))
    x, knots = torch.randn(2, 4, 3), torch.randn(1, 9, 2, 2)
    mask = torch.ones(2, 4, dtype=torch.bool)
    constants = (mask, None, None, None, -1, 0.0, 5.0, 0.5, "bias", "softmax", "trivial")
    trivial, inputs = Trivial(), Inputs(q, k, v, x, knots, None, *constants[:-1])
    needs = [True] * 5 + [False]
    leaves = [t.clone().requires_grad_() for t in (q, k, v, x, knots)]
    table, leaf_table = (gk.RadialTable(t, 0.0, 5.0) for t in (knots, leaves[4]))

    def forward() -> Tensor:
        return ops._attention(*leaves, None, *constants)[0]

    def second() -> None:
        (force,) = torch.autograd.grad(forward(), leaves[3], q, create_graph=True)
        torch.autograd.grad(force, leaves, x)

    return {
        "operator, forward, no gradient": lambda: ops._attention(
            q, k, v, x, knots, None, *constants
        ),
        "operator, forward": forward,
        "operator, forward+backward": lambda: torch.autograd.grad(forward(), leaves, q),
        "operator, forward+backward+second backward": second,
        "geo_attention, forward, no gradient": lambda: gk.geo_attention(
            q, k, v, x, table, mask=mask
        ),
        "geo_attention, forward+backward": lambda: torch.autograd.grad(
            gk.geo_attention(*leaves[:4], leaf_table, mask=mask), leaves, q
        ),
        "the trivial kernels alone, forward+backward": lambda: (
            trivial.attention(inputs),
            trivial.attention_bwd(inputs, None, None, None, None, needs),
        ),
        "bare autograd.Function, forward+backward": lambda: torch.autograd.grad(
            Bare.apply(*leaves), leaves, q
        ),
        "scaled_dot_product_attention, forward, no gradient": lambda: (
            torch.nn.functional.scaled_dot_product_attention(q, k, v)
        ),
    }


def measure_calls() -> Times:
    """Times the calls with trivial kernels, in one thread."""
    chosen, threads = ops.choose, torch.get_num_threads()
    ops.choose = lambda *_: Trivial()  # type: ignore[assignment, return-value]
    torch.set_num_threads(1)
    try:
        return interleaved(call_functions(), ROUNDS, calls=CALLS, clock=time.process_time)
    finally:
        ops.choose = chosen
        torch.set_num_threads(threads)


def measure_table() -> Times:
    """Times `tabulate` and its parts for GeoT's radial network at the published size."""
    basis = gk.radial.GaussianBasis.geot()
    fn = gk.radial.RadialMLP(basis, 64, 1024, activation="ssp", final_activation="ssp")
    knots = torch.linspace(0, 30, 1024)

    def both() -> None:
        gk.tabulate(fn, 30.0, 1024).knots.sum().backward()

    functions = {
        "radial network at 1024 knots, forward": lambda: fn(knots),
        "tabulate, forward": lambda: gk.tabulate(fn, 30.0, 1024),
        "tabulate, forward+backward": both,
    }
    return interleaved(functions, ROUNDS, calls=1)


def main() -> None:
    """Prints the rows, and appends them to the file named on the command line."""
    rows = []
    for name, values in {**measure_calls(), **measure_table()}.items():
        low, median, high = statistics.quantiles(values, n=4)
        least = min(values)
        rows.append([name, f"{least:.1f}", f"{low:.1f}", f"{median:.1f}", f"{high:.1f}"])
        print(f"{name:52} min {least:8.1f}  median {median:8.1f} us  ({low:.1f} to {high:.1f})")
    if len(sys.argv) > 1:
        machine = [platform.machine(), torch.get_num_threads(), torch.__version__]
        with Path(sys.argv[1]).open("w", newline="") as file:
            writer = csv.writer(file)
            numbers = ["min_us", "lower_quartile_us", "median_us", "upper_quartile_us"]
            writer.writerow(["call", *numbers, "machine", "threads", "torch", "geot_kernels"])
            writer.writerows([*row, *machine, gk.__version__] for row in rows)


if __name__ == "__main__":
    main()
