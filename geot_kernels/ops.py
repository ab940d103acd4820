"""The operators: their schemas, fakes and autograd.

    geot::attention          forward          -> out, row
    geot::attention_bwd      first backward   -> gradients of (q, k, v, positions, radial, affine)
    geot::attention_bwd_bwd  second backward  -> gradients of (d_out, d_row) and those six
    geot::attention_weights  the weights themselves, an explicit second pass

`row [B, N, H]` is `L_i = log Σ_j exp(S_ij)` for softmax, not differentiable, and the row sum
`r_i` for linear. `radial` is a table's knots `[P, G+1, 2, C]` or Gaussians `[2 + C, K]`. `needs`
names the gradients wanted; only those are returned, in order. Cotangents are optional, and absent
ones cost nothing.

Each derivative is the next operator: the kernel for the Autograd key is a small
`autograd.Function` whose backward calls it and does nothing else, so `torch.compile`, `make_fx`
and `vmap` see every pass. (`torch.library.register_autograd` would cost twice the time of a
call.) The third order raises. `backends.choose` picks who computes, inside the operator, so no
tracer sees the choice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.utils._pytree import tree_map

from . import reference
from .backends import choose
from .backends.inputs import Inputs, Tangent
from .checks import check_values
from .radial import GaussianSum
from .table import RadialTable, autocast_off

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor positions, Tensor radial, Tensor? affine"
_CONSTANTS = (
    "Tensor? mask, Tensor? ptr, Tensor? atom_types, Tensor? pair_index, SymInt max_atoms, "
    "float r_min, float r_max, float scale, str score, str normalizer, str backend"
)
_PULLED = "Tensor? d_out, Tensor? d_row, Tensor out, Tensor row"
_DOTTED = ", ".join(f"Tensor? {x}_dot" for x in ("q", "k", "v", "positions", "radial", "affine"))
_NUM_INPUTS, _NUM_PULLED = 6, 4
_NUM_ARGS = 16  # of `attention`, before the backend
_NUM_INDICES = 4  # mask, ptr, atom_types, pair_index: the constants that are tensors

_library = torch.library.Library("geot", "DEF")
_library.define(f"attention({_INPUTS}, {_CONSTANTS}, bool forward_only=False) -> (Tensor, Tensor)")
_library.define(f"attention_weights({_INPUTS.replace('Tensor v, ', '')}, {_CONSTANTS}) -> Tensor")
_library.define(f"attention_bwd({_PULLED}, {_INPUTS}, bool[] needs, {_CONSTANTS}) -> Tensor[]")
_library.define(
    f"attention_bwd_bwd({_DOTTED}, {_PULLED}, {_INPUTS}, bool[] needs, {_CONSTANTS}) -> Tensor[]"
)
_attention = torch.ops.geot.attention.default
_attention_weights = torch.ops.geot.attention_weights.default
_attention_bwd = torch.ops.geot.attention_bwd.default
_attention_bwd_bwd = torch.ops.geot.attention_bwd_bwd.default

_CHECK_VALUES = os.environ.get("GEOT_CHECK") == "1"


# What runs.


def _run(launcher: str, backend: str, inputs: Inputs, *rest: Any) -> Any:
    """Calls the launcher of the backend chosen, with autocast off."""
    if _CHECK_VALUES:
        check_values(inputs)
    launch = getattr(choose(backend, inputs), launcher)
    device = inputs.q.device.type
    if torch.is_autocast_enabled(device):
        with autocast_off(device):
            return launch(inputs, *rest)
    return launch(inputs, *rest)


def _run_attention(*args: Any) -> Any:
    inputs, backend, forward_only = args[:_NUM_ARGS], args[_NUM_ARGS], args[_NUM_ARGS + 1 :]
    return _run("attention", backend, Inputs(*inputs), *forward_only)


def _run_attention_weights(*args: Any) -> Any:
    q, k, *inputs, backend = args
    return _run("attention_weights", backend, Inputs(q, k, k, *inputs))


def _run_attention_bwd(*args: Any) -> Any:
    *pulled, q, k, v, x, radial, affine, needs = args[: _NUM_PULLED + _NUM_INPUTS + 1]
    inputs = Inputs(q, k, v, x, radial, affine, *args[_NUM_PULLED + _NUM_INPUTS + 1 : -1])
    return _run("attention_bwd", args[-1], inputs, *pulled, needs)


def _run_attention_bwd_bwd(*args: Any) -> Any:
    tangent, args = Tangent(*args[:_NUM_INPUTS]), args[_NUM_INPUTS:]
    *pulled, q, k, v, x, radial, affine, needs = args[: _NUM_PULLED + _NUM_INPUTS + 1]
    inputs = Inputs(q, k, v, x, radial, affine, *args[_NUM_PULLED + _NUM_INPUTS + 1 : -1])
    return _run("attention_bwd_bwd", args[-1], inputs, tangent, *pulled, needs)


# What a tracer sees: contiguous results, gradients in the dtype of what they belong to.


def _fake_attention(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    row = q.new_empty(q.shape[:-1], dtype=reference.compute_dtype(q.dtype))
    return q.new_empty(q.shape), row


def _fake_attention_weights(*args: Any) -> Tensor:
    q: Tensor = args[0]
    ptr, max_atoms = args[6], args[9]
    molecules, atoms = q.shape[:2] if ptr is None else (ptr.shape[0] - 1, max_atoms)
    return q.new_empty(molecules, q.shape[-2], atoms, atoms)


def _fake_like(like: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, n in zip(like, needs, strict=True) if n and x is not None]


def _fake_attention_bwd(*args: Any) -> list[Tensor]:
    inputs, needs = args[_NUM_PULLED:][:_NUM_INPUTS], args[_NUM_PULLED + _NUM_INPUTS]
    return _fake_like(inputs, needs)


def _fake_attention_bwd_bwd(*args: Any) -> list[Tensor]:
    args = args[_NUM_INPUTS:]
    inputs, needs = args[_NUM_PULLED:][:_NUM_INPUTS], args[_NUM_PULLED + _NUM_INPUTS]
    return _fake_like((*args[:2], *inputs), needs)


# Derivatives: each is a call of the next operator.


def _call(op: Callable[..., Any], *args: Any) -> Any:
    """Calls an operator, past its Autograd kernel where no gradient of it can be asked for."""
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *inputs, constants = args
        with torch._C._AutoDispatchBelowAutograd():
            out, row = _attention(*inputs, *constants)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, row, *inputs, *constants[:_NUM_INDICES])
        ctx.constants = constants[_NUM_INDICES:]
        if constants[-2] == "softmax":
            ctx.mark_non_differentiable(row)
        return out, row

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_row: Tensor | None) -> Any:
        if d_out is None and d_row is None:
            return (None,) * (_NUM_INPUTS + 1)
        needs = ctx.needs_input_grad[:_NUM_INPUTS]
        out, row, *tensors = ctx.saved_tensors
        inputs, indices = tensors[:_NUM_INPUTS], tensors[_NUM_INPUTS:]
        grads = _call(
            _attention_bwd, d_out, d_row, out, row, *inputs, needs, *indices, *ctx.constants
        )
        return *_spread(grads, needs), None


class _AttentionBackward(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *tensors, (needs, *constants) = args
        with torch._C._AutoDispatchBelowAutograd():
            grads = _attention_bwd(*tensors, needs, *constants)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *constants[:_NUM_INDICES])
        ctx.needs, ctx.constants = needs, constants[_NUM_INDICES:]
        return tuple(grads)

    @staticmethod
    def backward(ctx: Any, *dots: Tensor | None) -> Any:
        wanted = ctx.needs_input_grad[: _NUM_PULLED + _NUM_INPUTS]
        if all(x is None for x in dots):
            return (None,) * (len(wanted) + 1)
        needs = (*wanted[:2], *wanted[_NUM_PULLED:])
        tangent, saved = _spread(dots, ctx.needs), ctx.saved_tensors
        tensors, indices = saved[:-_NUM_INDICES], saved[-_NUM_INDICES:]
        grads = _call(_attention_bwd_bwd, *tangent, *tensors, needs, *indices, *ctx.constants)
        d_out, d_row, *rest = _spread(grads, needs)
        return d_out, d_row, None, None, *rest, None


class _AttentionSecondBackward(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *tensors, rest = args
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_attention_bwd_bwd(*tensors, *rest))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "geot_kernels: the third derivative of geo_attention is not implemented; "
            "backend='reference' is differentiable to any order"
        )


def _spread(present: Sequence[Tensor | None], flags: Sequence[bool]) -> list[Tensor | None]:
    """Puts what is there into the places that `flags` marks, None elsewhere."""
    rest = iter(present)
    return [next(rest) if flag else None for flag in flags]


def _differentiable(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a derivative, of whatever mode, may be asked for."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def _autograd(
    op: Callable[..., Any],
    function: type[Function],
    num_tensors: int,
    result: type,
    forward_only: tuple[bool, ...] = (),
) -> Callable[..., Any]:
    """The Autograd kernel: `function` where a derivative may be asked for, else the operator.

    `forward_only` is what the operator is then told.
    """

    def kernel(*args: Any) -> Any:
        if forward_only:  # what a tracer once found need not hold now
            args = args[: _NUM_ARGS + 1]
        if _differentiable(args[:num_tensors]):
            return result(function.apply(*args[:num_tensors], args[num_tensors:]))
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, *forward_only)

    return kernel


def _attention_weights_autograd(*args: Any) -> Any:
    """Weights that need a gradient are those of the reference: their size is N² anyway."""
    q, k, *rest, backend = args
    inputs = Inputs(q, k, k, *rest)
    if not _differentiable(inputs[:6]):
        with torch._C._AutoDispatchBelowAutograd():
            return _attention_weights(*args)
    if backend:
        choose(backend, inputs)
    fn: Callable[..., Tensor]
    if inputs.radial.ndim == 2:
        fn = GaussianSum(inputs.radial[0], inputs.radial[1], inputs.radial[2:])
    else:
        table = (inputs.radial, inputs.r_min, inputs.r_max, inputs.pair_index, inputs.affine)
        fn = RadialTable(*table)
    with autocast_off(q.device.type):
        return reference.attention_weights(
            q,
            k,
            inputs.positions,
            fn,
            mask=inputs.mask,
            ptr=inputs.ptr,
            max_atoms=None if inputs.ptr is None else inputs.max_atoms,
            atom_types=inputs.atom_types,
            score=inputs.score,
            normalizer=inputs.normalizer,
            scale=inputs.scale,
        )


# vmap: one call for each slice. Hessians with `vectorize=True` come through PyTorch's older
# batched tensors, which have a dispatch key of their own.


def _each_slice(op: Callable[..., Any], args: Sequence[Any], dims: Sequence[Any]) -> Any:
    """Calls `op` for each index of the dimension that `dims` names; stacks what comes."""
    count = next(x.shape[d] for x, d in zip(args, dims, strict=True) if _batched(x, d))
    if not count:
        raise ValueError("vmap: expected at least one slice, got a dimension of size 0")
    results = [
        op(*(x.select(d, i) if _batched(x, d) else x for x, d in zip(args, dims, strict=True)))
        for i in range(count)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return type(results[0])(map(torch.stack, zip(*results, strict=True)))


def _batched(x: Any, dim: Any) -> bool:
    return isinstance(x, Tensor) and dim is not None


def _vmap(op: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, dims: Any, *args: Any) -> Any:
        results = _each_slice(op, args, dims)
        return results, tree_map(lambda _: 0, results)

    return rule


def _older_vmap(op: Callable[..., Any]) -> Callable[..., Any]:
    def rule(*args: Any) -> Any:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        dims = [
            0 if isinstance(x, Tensor) and torch._C._functorch.is_legacy_batchedtensor(x) else None
            for x in args
        ]
        args = tuple(
            x if dim is None else torch._remove_batch_dim(x, level, 1, 0)
            for x, dim in zip(args, dims, strict=True)
        )
        results = _each_slice(op, args, dims)
        return tree_map(lambda x: torch._add_batch_dim(x, 0, level), results)

    return rule


_PASSES = (
    ("attention", _run_attention, _fake_attention),
    ("attention_weights", _run_attention_weights, _fake_attention_weights),
    ("attention_bwd", _run_attention_bwd, _fake_attention_bwd),
    ("attention_bwd_bwd", _run_attention_bwd_bwd, _fake_attention_bwd_bwd),
)
for _name, _kernel, _fake in _PASSES:
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"geot::{_name}", _fake, lib=_library)
    _op = getattr(torch.ops.geot, _name).default
    torch.library.register_vmap(f"geot::{_name}", _vmap(_op), lib=_library)
    _library.impl(_name, _older_vmap(_op), "Batched")
_library.impl("attention", _autograd(_attention, _Attention, 6, tuple, (True,)), "Autograd")
_library.impl("attention_weights", _attention_weights_autograd, "Autograd")
_library.impl("attention_bwd", _autograd(_attention_bwd, _AttentionBackward, 10, list), "Autograd")
_library.impl(
    "attention_bwd_bwd",
    _autograd(_attention_bwd_bwd, _AttentionSecondBackward, 16, list),
    "Autograd",
)
