"""The CUDA C++ kernels: the three passes of `csrc/cuda`, behind the operators `geot_cuda::*`.

16-bit features are multiplied by tensor cores in the first two passes of a bias in a table;
elsewhere they are computed with in float32, and every result is rounded once. Operators write
into tensors that are made here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import compute_dtype
from . import eager
from .eager import attention_weights
from .gpu import contiguous, molecules_and_atoms, on_its_device, why_not_gpu
from .inputs import Inputs, Tangent
from .native import load_library

__all__ = ["attention", "attention_bwd", "attention_bwd_bwd", "attention_weights", "why_not"]

# Channels of a head, at most: of float64, of others, by the shared memory of a block, KiB.
_HEAD_DIMS = ((227, 128, 128), (160, 64, 128), (0, 32, 64))
_MOST_NUMBERS = 2**31  # of a radial function or the rows of a molecule: counted with 32 bits
_NUM_NORMS = 11
_PER_ROW = 5  # numbers of a row that a sweep by keys reads


def why_not(device: torch.device, inputs: Inputs | None = None) -> str | None:
    """Says what is missing, the device or the compiled library, or what the inputs exceed."""
    reason = why_not_gpu(device) or load_library("cuda")
    return reason or (None if inputs is None else why_not_inputs(inputs))


def why_not_inputs(inputs: Inputs) -> str | None:
    """Says why the kernels cannot run these inputs; None where they can."""
    kib = _shared_memory(inputs.q.device)
    of_float64, of_others = next(most for least, *most in _HEAD_DIMS if kib >= least)
    most = of_float64 if inputs.q.dtype == torch.float64 else of_others
    if inputs.q.shape[-1] > most:
        text = f"its kernels take at most {most} channels a head"
        if most < _HEAD_DIMS[0][1]:
            text += f" of {inputs.q.dtype} with {kib} KiB of shared memory"
        return f"{text}, not {inputs.q.shape[-1]}"
    if inputs.radial.numel() >= _MOST_NUMBERS:
        return "its kernels take radial functions of fewer than 2^31 numbers"
    if max(inputs.q.shape[-3], inputs.max_atoms) >= _MOST_NUMBERS:
        return "its kernels take molecules of fewer than 2^31 rows"
    return None


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Of a block, at most, KiB."""
    return int(_operators().shared_memory.default(device.index or 0)) // 1024


@on_its_device
def attention(inputs: Inputs, forward_only: bool = False) -> tuple[Tensor, Tensor]:
    """Forward: `(out, row)`."""
    call = _Call(inputs, second=False)
    out = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    row = call.empty(*call.q.shape[:-1])
    _operators().attention.default(*call.arguments, out, row, *call.where)
    return out.to(inputs.q.dtype), row


@on_its_device
def attention_bwd(
    inputs: Inputs,
    d_out: Tensor | None,
    d_row: Tensor | None,
    out: Tensor,
    row: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """First backward: those of the six gradients that `needs` asks for."""
    call = _Call(inputs, second=False)
    d_out = call.like_q(torch.zeros_like(out) if d_out is None else d_out)
    d_row, row = contiguous(d_row), row.contiguous()
    results = _Results(call, needs)
    quantum = None
    if results.needs_bounds:
        radial = _radial_bounds(inputs, None, None) if needs[5] else None
        quantum = call.quantum(d_out, d_row, (None,) * 4, row, radial, False)
    parts = _operators().attention_bwd.default(
        *call.arguments,
        d_out,
        d_row,
        row,
        *results.features,
        results.positions,
        call.numbers(),
        results.knot_sums,
        results.affine_sums,
        quantum,
        results.moments,
        *call.where,
    )
    return results.tensors(parts, quantum)


@on_its_device
def attention_bwd_bwd(
    inputs: Inputs,
    tangent: Tangent,
    d_out: Tensor | None,
    d_row: Tensor | None,
    out: Tensor,
    row: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Second backward: those of `(d_out, d_row, *six inputs)` that `needs` asks for.

    That of Gaussians goes through plain PyTorch, block by block.
    """
    if inputs.radial.ndim == 2:
        return eager.attention_bwd_bwd(inputs, tangent, d_out, d_row, out, row, needs)
    call = _Call(inputs, second=True)
    d_out = call.like_q(torch.zeros_like(out) if d_out is None else d_out)
    d_row, row = contiguous(d_row), row.contiguous()
    dots = [None if x is None else call.like_q(x) for x in tangent[:3]]
    dots += [contiguous(x) for x in tangent[3:]]
    results = _Results(call, needs[2:])
    grad_d_out = torch.empty_like(d_out) if needs[0] else None
    grad_d_row = call.empty(*row.shape) if needs[1] else None
    quantum = None
    if results.needs_bounds:
        radial = _radial_bounds(inputs, tangent.radial, tangent.affine)
        quantum = call.quantum(d_out, d_row, dots[:4], row, radial, True)
    parts = _operators().attention_bwd_bwd.default(
        *call.arguments,
        *dots,
        d_out,
        d_row,
        call.like_q(out),
        row,
        grad_d_out,
        grad_d_row,
        *results.features,
        results.positions,
        call.numbers(),
        results.knot_sums,
        results.affine_sums,
        quantum,
        *call.where,
    )
    first = [x for x in (grad_d_out, grad_d_row) if x is not None]
    if grad_d_out is not None:
        first[0] = grad_d_out.to(inputs.q.dtype)
    return [*first, *results.tensors(parts, quantum)]


def _operators() -> Any:
    return torch.ops.geot_cuda


class _Call:
    """The arguments that all operators have, in the dtype that their kernels compute with."""

    def __init__(self, inputs: Inputs, second: bool) -> None:
        self.inputs = inputs
        q = inputs.q
        self.dtype = compute_dtype(q.dtype)  # of geometry and sums
        uses_tensor_cores = not second and inputs.score == "bias" and inputs.radial.ndim == 4
        self.feature_dtype = q.dtype if uses_tensor_cores else self.dtype
        self.molecules, self.atoms = molecules_and_atoms(inputs)
        self.q, k, v = (self._features(x) for x in inputs[:3])
        types, pairs = inputs.atom_types, inputs.pair_index
        if pairs is None:
            types = None
        self.radial = inputs.radial.contiguous()
        self.arguments = (
            self.q,
            k,
            v,
            inputs.positions.contiguous(),
            self.radial,
            contiguous(inputs.affine),
            contiguous(inputs.mask),
            *(None if x is None else x.long().contiguous() for x in (inputs.ptr, types, pairs)),
            self.atoms,
            inputs.r_min,
            inputs.r_max,
            inputs.scale,
            inputs.score == "filter",
            inputs.normalizer == "linear",
        )
        on_gpu = q.device.type == "cuda"
        self.where = (
            (q.device.index, torch.cuda.current_stream(q.device).cuda_stream) if on_gpu else (0, 0)
        )

    def _features(self, x: Tensor) -> Tensor:
        x = x.to(self.feature_dtype)
        return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

    def like_q(self, x: Tensor) -> Tensor:
        """Contiguous features."""
        return x.to(self.feature_dtype).contiguous()

    def empty(self, *shape: int) -> Tensor:
        """Memory in the dtype of sums."""
        return torch.empty(shape, dtype=self.dtype, device=self.q.device)

    def numbers(self) -> Tensor:
        """What the sweep by keys has to know of rows."""
        heads = self.q.shape[-2]
        return self.empty(heads, self.q.shape[:-2].numel(), _PER_ROW)

    def quantum(
        self,
        d_out: Tensor,
        d_row: Tensor | None,
        dots: Sequence[Tensor | None],
        row: Tensor,
        radial: Tensor | None,
        is_second: bool,
    ) -> Tensor:
        """The units of integer sums, `[4]`: of knots, one over it, of the affine map, likewise."""
        device = self.q.device
        norms = torch.zeros(_NUM_NORMS, dtype=torch.int64, device=device)
        quantum = torch.empty(4, dtype=torch.float64, device=device)
        _operators().bounds.default(
            *self.arguments,
            d_out,
            d_row,
            *dots,
            row,
            radial,
            is_second,
            norms,
            quantum,
            *self.where,
        )
        return quantum


class _Results:
    """The gradients of the six inputs that `needs` asks for, and what they are made from."""

    def __init__(self, call: _Call, needs: Sequence[bool]) -> None:
        inputs, q = call.inputs, call.q
        self._call = call
        heads, rows, device = q.shape[-2], q.shape[:-2].numel(), q.device
        self.features = [
            torch.empty_like(q, memory_format=torch.contiguous_format) if n else None
            for n in needs[:3]
        ]
        self.positions = call.empty(2, heads, rows, 3) if needs[3] else None
        self.knot_sums = self.affine_sums = self.moments = None
        if needs[4] and inputs.radial.ndim == 4:
            shape = inputs.radial.shape
            self.knot_sums = torch.zeros(shape, dtype=torch.int64, device=device)
        elif needs[4]:
            chunks = _operators().chunks.default(call.molecules, call.atoms, heads, call.where[0])
            self.moments = call.empty(chunks, heads, 3, inputs.radial.shape[1])
        if needs[5] and inputs.affine is not None:
            shape = inputs.affine.shape
            self.affine_sums = torch.zeros(shape, dtype=torch.int64, device=device)

    @property
    def needs_bounds(self) -> bool:
        """Whether there are integer sums."""
        return self.knot_sums is not None or self.affine_sums is not None

    def tensors(self, parts: int, quantum: Tensor | None) -> list[Tensor]:
        """The gradients, in the dtypes of what they belong to."""
        inputs, dtype = self._call.inputs, self._call.dtype
        results = [x.to(inputs.q.dtype) for x in self.features if x is not None]
        if self.positions is not None:
            gradient = self.positions[:parts].sum((0, 1))
            results.append(gradient.view(inputs.positions.shape))
        if self.knot_sums is not None and quantum is not None:
            results.append((self.knot_sums * quantum[0]).to(dtype))
        elif self.moments is not None:
            results.append(_gaussians_gradient(self._call.radial, self.moments.sum(0)))
        if self.affine_sums is not None and quantum is not None:
            results.append((self.affine_sums * quantum[2]).to(dtype))
        return results


def _gaussians_gradient(radial: Tensor, moments: Tensor) -> Tensor:
    """The gradient of `[2 + C, K]` from `Σ g eᵖ φ`, `e = z - μ`: `[C, 3, K]`."""
    gamma, w = radial[1], radial[2:]
    d_center = (w * moments[:, 1]).sum(0, True) * (2 * gamma)
    d_gamma = -(w * moments[:, 2]).sum(0, True)
    return torch.cat((d_center, d_gamma, moments[:, 0]))


def _radial_bounds(inputs: Inputs, radial_dot: Tensor | None, affine_dot: Tensor | None) -> Tensor:
    """Bounds of `|f|, |f'|, |f''|, |ḟ|, |ḟ'|, |m|, |ṁ|, |ċ|`, and of `d` where `f'` is not 0.

    `[9]` in float64.
    """
    radial, affine = inputs.radial, inputs.affine
    none = torch.zeros((), dtype=torch.float64, device=radial.device)
    f_dot = f1_dot = none
    if radial.ndim == 4:
        per_h = (radial.shape[1] - 1) / (inputs.r_max - inputs.r_min)
        f, f1, f2 = _table_bounds(radial, per_h)
        if radial_dot is not None:
            f_dot, f1_dot, _ = _table_bounds(radial_dot, per_h)
    else:
        gamma, w = radial[1].double().abs(), radial[2:].double().abs()
        f = w.sum(1).max()
        f1 = (w * (2 * gamma / math.e).sqrt()).sum(1).max()
        f2 = none
    m = none + 1 if affine is None else affine[:, 0].double().abs().amax()
    farthest = none + math.inf
    if affine is not None and radial.ndim == 4:  # z = m d + c is in the table's range
        m_least, c_most = affine[:, 0].double().abs().amin(), affine[:, 1].double().abs().amax()
        farthest = (max(abs(inputs.r_min), abs(inputs.r_max)) + c_most) / m_least
    m_dot, c_dot = (none, none) if affine_dot is None else affine_dot.double().abs().amax(0)
    return torch.stack((f, f1, f2, f_dot, f1_dot, m, m_dot, c_dot, farthest))


def _table_bounds(knots: Tensor, per_h: float) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds of `|f|, |f'|, |f''|` of a table: Bernstein's coefficients enclose a cubic."""
    y0, y1 = knots[:, :-1, 0].double(), knots[:, 1:, 0].double()
    s0, s1 = knots[:, :-1, 1].double(), knots[:, 1:, 1].double()
    rise = y1 - y0
    f = (y0, y1, y0 + s0 / 3, y1 - s1 / 3)
    f1 = (s0, s1, 3 * rise - s0 - s1)
    f2 = (6 * rise - 4 * s0 - 2 * s1, 2 * s0 + 4 * s1 - 6 * rise)
    largest = [torch.stack([x.abs().amax() for x in numbers]).amax() for numbers in (f, f1, f2)]
    return largest[0], largest[1] * per_h, largest[2] * per_h**2
