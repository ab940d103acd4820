"""Training steps of whole models, with our layer and with the attention they were written with.

    GeoT published         y = W_2 elu(W_1 Σ_i x_i), 8 layers of 1024, on energies (MAE)
    Graphormer-3D-like     softmax(q·k/√D + f_h(m_p d + c_p)), 12 layers of 768, on energies (MAE)
    TorchMD-ET-like        Σ_c q_c k_c f_c(d)/√D, 6 layers of 128, on energies and forces (MSE)

A step is forward, loss, backward and Adam. The models compared have the same weights, the same
molecules and the same code but for the attention, and are timed after their losses and gradients
were found equal. In 16 bits they run under autocast. What their models' authors do:

- GeoT: filters `[B, N, N, H, D]` of all pairs, 300 Gaussians and a network anew in each layer.
- Graphormer-3D: one bias `[B, H, N, N]`, which all layers hand to `scaled_dot_product_attention`.
  Left out: the sum of the Gaussians over all pairs among an atom's first features, the force
  head, and that the layers are applied four times.
- TorchMD-ET: filters of all pairs, each layer its own. Left out, as our scores end in a softmax or
  in nothing: its vector channel, the SiLU of the scores, the filtered values; and its neighbor
  embedding and the SiLU of the filters, which would need nothing new.

Ours tabulates its radial functions in each step: GeoT and TorchMD-ET one in each layer,
Graphormer-3D one in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import geot_kernels as gk
from geot_kernels.radial import CosineCutoff, ExponentialNormalBasis, GaussianBasis, RadialMLP
from geot_kernels.reference import distances
from geot_kernels.table import number_pairs, radial_coordinate
from geot_model.model import GeoT

from . import geometry
from .rows import numbers, where
from .timing import STABLE, interleaved, stopwatch, watch
from .ways import relative_error

OURS, ORIGINAL, COMPILED = "ours", "original attention", "original attention, compiled"
BUDGET = {"loss": 1e-5, "gradient": 2e-4}
"""Largest allowed difference in float32, relative to the largest number of the result. Measured
on a CPU: 5e-7 and 3e-5."""

LEARNING_RATE = 1e-12
"""Leaves the weights where they are; with 1e-9 a step of GeoT changes its loss by 3e-4."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, N, H, D] to [B, N, H, D]


class Size(NamedTuple):
    """How large a model and its batch are; None for all atoms of the molecules."""

    molecules: int
    max_atoms: int | None
    width: int
    heads: int
    layers: int
    basis: int


class Batch(NamedTuple):
    """Molecules and what is to be learned: energies `[B]`, and forces `[B, N, 3]`."""

    atom_types: Tensor
    positions: Tensor
    mask: Tensor
    energies: Tensor
    forces: Tensor


class PublishedGeoT(nn.Module):
    """GeoT as `geot_model` has it, with tables for QM9, whose atoms are within 12.1 Å."""

    def __init__(self, size: Size, num_types: int, attention: str, backend: str | None) -> None:
        super().__init__()
        self.network = GeoT(
            1,
            embed_dim=size.width,
            num_heads=size.heads,
            num_layers=size.layers,
            basis=GaussianBasis(size.basis, 29.9, gamma=10.0),
            r_max=15.0,
            num_knots=512,
            backend=backend,
        )
        if attention == ORIGINAL:
            for layer in self.network.layers:
                layer.attention = DenseFilterAttention(layer.attention)

    def forward(self, atom_types: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        numbers = atom_types + 1  # any will do
        return self.network(numbers, positions, mask).squeeze(-1)


class Graphormer3D(nn.Module):
    """Attention with one bias for all layers, a function of distances mapped for pairs of types.

    x <- x + W attention(LN(x)),   x <- x + ffn(LN(x)),   E = Σ_i W_2 gelu(W_1 LN(x_i))
    """

    def __init__(self, size: Size, num_types: int, attention: str, backend: str | None) -> None:
        super().__init__()
        self.num_types, self.heads, self.backend = num_types, size.heads, backend
        self.attention = {OURS: self.fused, ORIGINAL: self.dense}[attention]
        basis = GaussianBasis(size.basis, 12.0, gamma=2.0, trainable=True)  # 0.5 Å wide
        self.radial = RadialMLP(basis, size.basis, size.heads, activation="gelu")
        # What is added to all scores of a softmax has no gradient, only rounding.
        self.radial.layers[-1].bias.requires_grad_(False)
        pairs = num_types * (num_types + 1) // 2
        near = 0.1 * (2 * torch.rand(pairs, 2) - 1)
        self.affine = nn.Parameter(torch.tensor([1.0, 0.0]) + near)
        self.embedding = nn.Embedding(num_types, size.width)
        self.layers = nn.ModuleList(_GraphormerLayer(size) for _ in range(size.layers))
        self.readout = nn.Sequential(
            nn.LayerNorm(size.width), _feed_forward(size.width, size.width, 1, nn.GELU())
        )

    def forward(self, atom_types: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        attend = self.attention(atom_types, positions, mask)
        x = self.embedding(atom_types)
        for layer in self.layers:
            x = layer(x, attend)
        return _sum_atoms(self.readout(x), mask)

    def fused(self, atom_types: Tensor, positions: Tensor, mask: Tensor) -> Attend:
        """Ours: one table for a step, up to where the Gaussians have died away."""
        table = gk.tabulate(
            *(self.radial, 15.0, 1024),
            r_min=-1.0,
            num_types=self.num_types,
            affine=self.affine,
        )

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return gk.geo_attention(
                *(q, k, v, positions, table),
                mask=mask,
                atom_types=atom_types,
                backend=self.backend,
            )

        return attend

    def dense(self, atom_types: Tensor, positions: Tensor, mask: Tensor) -> Attend:
        """Theirs: one bias for a step, with padding as -inf."""
        pair = number_pairs(self.num_types, positions.device)[
            atom_types[:, :, None], atom_types[:, None, :]
        ]
        z, _ = radial_coordinate(distances(positions, positions), self.affine, pair)
        bias = self.radial(z.flatten()).view(*z.shape, self.heads).permute(0, 3, 1, 2)
        bias = bias.masked_fill(~mask[:, None, None, :], -math.inf).contiguous()  # [B, H, N, N]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(*heads_first, bias.to(q.dtype)).transpose(1, 2)

        return attend


class _GraphormerLayer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.in_proj = nn.Linear(size.width, 3 * size.width)
        self.out_proj = nn.Linear(size.width, size.width)
        self.ffn = _feed_forward(size.width, size.width, size.width, nn.GELU())

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.in_proj(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        x = x + self.out_proj(attend(q, k, v).flatten(-2))
        return x + self.ffn(self.norm2(x))


class TorchMDET(nn.Module):
    """The scalar channel of TorchMD-ET: attention without softmax, whose filters end at 5 Å.

    f(d) = (W e(d) + b) φ(d),   x <- x + W attention(LN(x)),   E = Σ_i W_2 silu(W_1 LN(x_i))
    """

    def __init__(self, size: Size, num_types: int, attention: str, backend: str | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_types, size.width)
        self.norms = nn.ModuleList(nn.LayerNorm(size.width) for _ in range(size.layers))
        self.attentions = nn.ModuleList()
        for _ in range(size.layers):
            basis = ExponentialNormalBasis(size.basis, 5.0)
            fused = gk.FusedGeoAttention(
                size.width,
                size.heads,
                radial=RadialMLP(basis, (), size.width, cutoff=CosineCutoff(5.0)),
                score="filter",
                normalizer="linear",
                r_max=5.0,
                num_knots=512,
                backend=backend,
            )
            self.attentions.append(DenseFilterAttention(fused) if attention == ORIGINAL else fused)
        self.readout = nn.Sequential(
            nn.LayerNorm(size.width), _feed_forward(size.width, size.width // 2, 1, nn.SiLU())
        )

    def forward(self, atom_types: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(atom_types)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x), positions, mask)[0]
        return _sum_atoms(self.readout(x), mask)


class DenseFilterAttention(nn.Module):
    """What a `FusedGeoAttention` computes with a filter and no softmax, of all pairs in memory.

    Args:
        fused: Whose parameters it takes, under their names.
    """

    def __init__(self, fused: gk.FusedGeoAttention) -> None:
        super().__init__()
        self.heads, self.scale = fused.num_heads, fused.head_dim**-0.5
        self.in_proj, self.out_proj, self.radial = fused.in_proj, fused.out_proj, fused.radial

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, **_: object
    ) -> tuple[Tensor, None]:
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        dist = distances(positions, positions)
        filters = self.radial(dist.flatten()).view(*dist.shape, *q.shape[2:])  # [B, N, N, H, D]
        scores = (q[:, :, None] * filters * k[:, None]).sum(-1) * self.scale
        scores = scores.masked_fill(~mask[:, None, :, None], 0)  # [B, N, N, H]
        out = torch.einsum("bijh,bjhd->bihd", scores, v).flatten(-2)
        return self.out_proj(out), None


def _feed_forward(inputs: int, hidden: int, outputs: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), activation, nn.Linear(hidden, outputs))


def _sum_atoms(x: Tensor, mask: Tensor) -> Tensor:
    return x.squeeze(-1).masked_fill(~mask, 0).sum(1)


@dataclass(frozen=True)
class Spec:
    """A model: what makes it, its molecules, what it learns, and its sizes by name."""

    make: Callable[[Size, int, str, str | None], nn.Module]
    geometry: str
    forces: bool
    sizes: dict[str, Size]


MODELS = {
    "GeoT published": Spec(
        PublishedGeoT,
        "qm9",
        False,
        {
            "full": Size(32, None, 1024, 64, 8, 300),
            "quick": Size(8, None, 256, 16, 2, 300),
            "tiny": Size(3, 12, 16, 2, 2, 300),
        },
    ),
    "Graphormer-3D-like": Spec(
        Graphormer3D,
        "pcqm_like",
        False,
        {
            "full": Size(32, None, 768, 48, 12, 128),
            "quick": Size(8, None, 192, 12, 2, 128),
            "tiny": Size(3, 16, 16, 2, 2, 32),
        },
    ),
    "TorchMD-ET-like": Spec(
        TorchMDET,
        "aspirin",
        True,
        {
            "full": Size(8, None, 128, 8, 6, 64),
            "quick": Size(4, None, 64, 4, 2, 64),
            "tiny": Size(2, None, 16, 2, 2, 16),
        },
    ),
}


class Step:
    """A training step of one model; called, it returns the loss.

    Args:
        model: Whose parameters are float32.
        batch: Molecules and targets.
        forces: Whether forces are learned too.
        dtype: 16 bits for autocast.
    """

    def __init__(self, model: nn.Module, batch: Batch, forces: bool, dtype: torch.dtype) -> None:
        self.model, self.batch, self.forces, self.dtype = model, batch, forces, dtype
        self.network: Callable[..., Tensor] = model
        self.parameters = [x for x in model.parameters() if x.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=LEARNING_RATE)

    def __call__(self) -> Tensor:
        loss = self.backward()
        self.optimizer.step()
        return loss

    def backward(self) -> Tensor:
        """The loss; gradients are in the parameters."""
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward(inputs=self.parameters)
        return loss.detach()

    def loss(self) -> Tensor:
        """Mean errors: absolute of the energies, or squared of energies and forces."""
        types, positions, mask, energies, forces = self.batch
        positions = positions.detach().requires_grad_(self.forces)
        low = self.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(positions.device.type, self.dtype if low else None, enabled=low):
            predicted = self.network(types, positions, mask).float()
        if not self.forces:
            return (predicted - energies).abs().mean()
        (slope,) = torch.autograd.grad(predicted.sum(), positions, create_graph=True)
        return F.mse_loss(predicted, energies) + F.mse_loss(-slope[mask], forces[mask])

    def results(self) -> dict[str, Tensor]:
        """The loss, and the gradient of each parameter by its name."""
        loss = self.backward()
        named = self.model.named_parameters()
        return {"loss": loss} | {n: x.grad for n, x in named if x.grad is not None}

    def held_bytes(self) -> int:
        """Of parameters, their gradients, and the state of the optimizer."""
        state = [x for values in self.optimizer.state.values() for x in values.values()]
        gradients = [x.grad for x in self.parameters if x.grad is not None]
        tensors = (*self.parameters, *self.model.buffers(), *gradients, *state)
        return sum(x.nbytes for x in tensors if isinstance(x, Tensor))


def load_batch(name: str, size: Size, device: str) -> tuple[Batch, int]:
    """Molecules with random targets, and the number of their atoms' types."""
    found = geometry.load(name, molecules=size.molecules, max_atoms=size.max_atoms)
    generator = torch.Generator().manual_seed(0)
    energies = torch.randn(len(found.mask), generator=generator)
    forces = torch.randn(found.positions.shape, generator=generator)
    tensors = (found.atom_types, found.positions, found.mask, energies, forces)
    return Batch(*(x.to(device) for x in tensors)), found.num_types


def steps(
    name: str, size: str, device: str, dtype: torch.dtype, backend: str | None
) -> dict[str, Step]:
    """Steps of a model with each attention, from the same weights on.

    Args:
        name: One of `MODELS`.
        size: "full", "quick" or "tiny".
        device: "cuda" or "cpu".
        dtype: float32, or bfloat16 or float16 for autocast.
        backend: Of ours.

    Returns:
        By function: ours, the original, and the original under `torch.compile`, which at its first
        call raises where it cannot.
    """
    spec, made = MODELS[name], {}
    options = spec.sizes[size]
    batch, num_types = load_batch(spec.geometry, options, device)
    torch._dynamo.reset()  # beyond a number of recompilations it would go on uncompiled
    for function in (OURS, ORIGINAL, COMPILED):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            attention = OURS if function == OURS else ORIGINAL
            model = spec.make(options, num_types, attention, backend)
            for parameter in model.parameters():  # no bias is 0, which would hide its part
                parameter.data += 0.01 * torch.randn_like(parameter)
        made[function] = Step(model.to(device), batch, spec.forces, dtype)
    made[COMPILED].network = torch.compile(made[COMPILED].model, dynamic=False)
    return made


def check(ours: Step, other: Step) -> dict[str, float]:
    """Holds loss and gradients of a step against those of another, computed in float32.

    In 16 bits each may differ by one unit of rounding, and twice what the other loses by them.

    Returns:
        The largest relative errors of the loss and of the gradients.

    Raises:
        RuntimeError: One is larger than allowed, or a gradient is missing.
    """
    got, lossy, exact = ours.results(), {}, other.results()
    rounding = 0.0
    if other.dtype != torch.float32:
        lossy, rounding = exact, torch.finfo(other.dtype).eps
        exact = Step(other.model, other.batch, other.forces, torch.float32).results()
    if got.keys() != exact.keys():
        raise RuntimeError(f"gradients of {got.keys() ^ exact.keys()} are missing")
    worst = {"loss": 0.0, "gradient": 0.0}
    for name, expected in exact.items():
        kind = "loss" if name == "loss" else "gradient"
        error = _error(got[name], expected)
        allowed = BUDGET[kind] + rounding
        if name in lossy:
            allowed += 2 * _error(lossy[name], expected)
        if not error <= allowed:  # a NaN fails too
            raise RuntimeError(f"{name}: relative error {error:.1e}, allowed {allowed:.1e}")
        worst[kind] = max(worst[kind], error)
    return worst


def _error(got: Tensor, expected: Tensor) -> float:
    """0 where both are: of an absolute error, a bias may have that gradient."""
    return 0.0 if torch.equal(got, expected) else relative_error(got, expected)


def measure(
    name: str,
    size: str,
    device: str,
    dtype: torch.dtype,
    backend: str | None,
    rounds: int,
    at_most_s: float = float("inf"),
) -> list[dict[str, str]]:
    """Times the steps of a model in turn, after they were found to compute the same.

    Args:
        name: As for `steps`, and so are the next four.
        size: "full", "quick" or "tiny".
        device: "cuda" or "cpu".
        dtype: float32, or bfloat16 or float16 for autocast.
        backend: Of ours.
        rounds: Numbers to take of each.
        at_most_s: As for `interleaved`.

    Returns:
        A row for each function; without times, and with a reason, where PyTorch does not compile
        or loss or gradients differ from those of the original.
    """
    functions = steps(name, size, device, dtype, backend)
    reasons = {}
    for n in (OURS, COMPILED):
        try:
            functions[n].backward()
            check(functions[n], functions[ORIGINAL])
        except Exception as error:  # compilers raise whatever they like
            reasons[n] = f"{type(error).__name__}: {error}".splitlines()[0]
    timed = {n: step for n, step in functions.items() if n not in reasons}
    for step in timed.values():
        step()  # the optimizers have their state from here on
    columns = {n: _peak_memory(step, device) for n, step in timed.items()}
    others = watch()
    times = interleaved(
        timed, rounds, measure=stopwatch(device), at_most_s=at_most_s, stable=STABLE
    )
    busy = others()
    for n, values in times.items():
        columns[n] |= {**numbers(values), "other_cores": busy}
    columns |= {n: {"reason": reason} for n, reason in reasons.items()}
    unit = where(device, backend or "") | _unit(name, size, functions[OURS])
    return [{**unit, "function": n, **columns[n]} for n in functions]


def _unit(name: str, size: str, step: Step) -> dict[str, str]:
    spec, mask = MODELS[name], step.batch.mask
    options, (molecules, atoms) = spec.sizes[size], mask.shape
    return {
        "case": name,
        "pass": "force training step" if spec.forces else "training step",
        "dtype": str(step.dtype).removeprefix("torch."),
        "mode": "eager",
        "molecules": str(molecules),
        "atoms": str(atoms),
        "mean_atoms": f"{float(mask.sum()) / molecules:.4g}",
        "heads": str(options.heads),
        "head_dim": str(options.width // options.heads),
        "gaussians": str(options.basis),
    }


def _peak_memory(step: Step, device: str) -> dict[str, str]:
    """Of a step by itself: what the other models hold is not counted."""
    if device != "cuda":
        return {}
    torch.cuda.synchronize()
    others = torch.cuda.memory_allocated() - step.held_bytes()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return {"peak_memory_mb": f"{(torch.cuda.max_memory_allocated() - others) / 1e6:.1f}"}
