"""`FusedGeoAttention`: multi-head self-attention with a learned radial function, as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .attention import attention_weights, geo_attention
from .backends import check_name
from .checks import check_policies
from .radial import GaussianBasis, GaussianSum, RadialMLP
from .table import (
    MIN_KNOTS,
    RadialTable,
    is_traced,
    number_pairs,
    radial_coordinate,
    tabulate,
)

_BASIS = 64  # Gaussians of the default radial network, and its hidden width


class FusedGeoAttention(nn.Module):
    """Self-attention of atoms whose scores carry a learned function of their distance.

        q, k, v = x W_in + b_in,   y = geo_attention(q, k, v, positions, f) W_out + b_out

    Takes the place of self-attention by `nn.MultiheadAttention(batch_first=True)` and returns what
    it returns. **The mask is the other way round**: `mask` says True for a real atom,
    `key_padding_mask` says True for padding. Rows of padded atoms are 0 in the result, and what
    stands in them (NaN too) reaches neither the result nor a gradient.

    The radial function is tabulated once a call, so its cost depends on neither its depth nor the
    number of atoms. In `eval()` with gradients off the table is kept (not under `torch.compile`,
    which builds it in each call). `train()`, `eval()`, `load_state_dict()`, `.to()`, other
    parameters and in-place changes that PyTorch counts discard it. After writing through
    `parameter.data`, or changing what a plain function depends on, call `refresh()`.

    Attributes:
        radial: The radial network, distances `[M]` to `[M, C]`.
        affine: `[P, 2]`, `(m, c)` of each pair of types, or None.
        attention_scale: GeoT's `s`, a scalar parameter, or None.

    Source: GeoT (Kwak et al., ACS Omega 2023) with `score="filter"`, `normalizer="linear"`;
    Graphormer-3D (Shi et al., arXiv 2203.04810) with `score="bias"`, `normalizer="softmax"`.
    """

    affine: Tensor | None
    attention_scale: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        radial: nn.Module | GaussianSum | Callable[..., Tensor] | None = None,
        score: str = "bias",
        normalizer: str = "softmax",
        attention_scale: bool = False,
        num_types: int | None = None,
        r_max: float = 12.0,
        num_knots: int | None = 1024,
        bias: bool = True,
        dropout: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes the projections and, unless one is given, the radial network.

        Args:
            embed_dim: Width `E` of the atoms' features.
            num_heads: Number of heads `H`, a divisor of `embed_dim`; `D = E / H`.
            radial: The radial function with `C = H` channels (score "bias") or `H*D` ("filter"):
                a module or function of distances `[M]`; one with `takes_types = True` also of the
                two atoms' types `[M]`; or a `GaussianSum`, whose tensors become parameters. None:
                64 Gaussians up to `r_max` and a network with one hidden layer.
            score: `"bias"` or `"filter"`.
            normalizer: `"softmax"` or `"linear"`.
            attention_scale: Whether there is GeoT's learned scalar `s`, 0 at first.
            num_types: Number of atom types. With a `radial` that takes no types, each pair of
                types gets a learned affine map of the distance (1, 0 at first), as in
                Graphormer-3D and Uni-Mol; else one table for each pair.
            r_max: Where the table of the radial function ends, Å; it is constant beyond.
            num_knots: Knots of the table; None evaluates the function exactly, for
                `backend="reference"` only.
            bias: Whether the projections have a bias.
            dropout: Of the attention weights; anything but 0 raises until it exists.
            backend: As for `geo_attention`.
            device: Of the parameters.
            dtype: Of the parameters.

        Raises:
            ValueError: A number, a name or a combination is wrong.
        """
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim: expected a multiple of num_heads={num_heads}, got {embed_dim}"
            )
        check_policies(score, normalizer)
        check_name(backend)
        if num_types is not None and num_types < 1:
            raise ValueError(f"num_types: expected at least 1, got {num_types}")
        if num_knots is not None and num_knots < MIN_KNOTS:
            raise ValueError(f"num_knots: expected at least {MIN_KNOTS}, got {num_knots}")
        if radial is not None and not callable(radial):
            raise TypeError(f"radial: expected a function, got {type(radial).__name__}")
        if dropout != 0:
            raise ValueError(f"dropout: expected 0, others are not implemented, got {dropout}")
        if not r_max > 0:
            raise ValueError(f"r_max: expected a number > 0, got {r_max}")
        if num_knots is None and backend != "reference":
            raise ValueError(
                "num_knots: expected a number; None, for the exact function, needs "
                f"backend='reference', got backend={backend!r}"
            )
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.head_dim = embed_dim // num_heads
        self.score, self.normalizer, self.backend = score, normalizer, backend
        self.r_max, self.num_knots, self.num_types = r_max, num_knots, num_types
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(embed_dim, 3 * embed_dim, bias=bias, **factory)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        channels = num_heads if score == "bias" else embed_dim
        if radial is None:
            radial = RadialMLP(GaussianBasis(_BASIS, r_max), _BASIS, channels).to(**factory)
        elif isinstance(radial, GaussianSum):
            radial = _GaussianSumParameters(radial).to(**factory)
        self.radial = radial
        self._takes_types = bool(getattr(radial, "takes_types", False))
        if self._takes_types and num_types is None:
            raise ValueError("num_types: expected a number, since radial takes types, got None")
        affine: nn.Parameter | None = None
        if num_types is not None and not self._takes_types:
            pairs = num_types * (num_types + 1) // 2
            affine = nn.Parameter(torch.tensor([[1.0, 0.0]] * pairs, **factory))
        self.register_parameter("affine", affine)
        scale = nn.Parameter(torch.zeros((), **factory)) if attention_scale else None
        self.register_parameter("attention_scale", scale)
        self._table: RadialTable | None = None
        self._table_of: list[Any] = []

    @classmethod
    def from_mha(cls, mha: nn.MultiheadAttention, **kwargs: Any) -> FusedGeoAttention:
        """Makes a layer with the projections of `mha`, copied.

        It computes what `mha(x, x, x, key_padding_mask=~mask)` computes where the radial function
        is 0 (on real atoms; `mha` in `eval()` or without dropout).

        Args:
            mha: Self-attention with `batch_first=True`.
            **kwargs: Further arguments of `FusedGeoAttention`.

        Raises:
            ValueError: `mha` does something this layer does not.
        """
        unlike = {
            "batch_first=False": not mha.batch_first,
            "kdim or vdim": not mha._qkv_same_embed_dim,
            "add_bias_kv": mha.bias_k is not None,
            "add_zero_attn": mha.add_zero_attn,
            f"dropout={mha.dropout}": mha.dropout != 0 and "dropout" not in kwargs,
        }
        for what, there in unlike.items():
            if there:
                raise ValueError(
                    f"mha: expected plain self-attention, batch first, without dropout, got {what}"
                )
        weight = mha.in_proj_weight
        layer = cls(
            mha.embed_dim,
            mha.num_heads,
            bias=mha.in_proj_bias is not None,
            device=weight.device,
            dtype=weight.dtype,
            **kwargs,
        )
        with torch.no_grad():
            layer.in_proj.weight.copy_(weight)
            layer.out_proj.weight.copy_(mha.out_proj.weight)
            if mha.in_proj_bias is not None:
                layer.in_proj.bias.copy_(mha.in_proj_bias)
                layer.out_proj.bias.copy_(mha.out_proj.bias)
        return layer.train(mha.training)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        *,
        ptr: Tensor | None = None,
        max_atoms: int | None = None,
        atom_types: Tensor | None = None,
        need_weights: bool = False,
        average_attn_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the layer, and on request the attention weights.

        Args:
            x: Features of the atoms, `[B, N, E]`, or packed `[T, E]` with `ptr`. Differentiable,
                twice.
            positions: `[B, N, 3]` (packed `[T, 3]`), Å. Differentiable, twice.
            mask: bool `[B, N]`, **True for a real atom**; None: all are.
            ptr: int `[B+1]`: molecule `b` is the packed rows `ptr[b]:ptr[b+1]`.
            max_atoms: Size of the largest packed molecule; without it that is read back.
            atom_types: int `[B, N]` (packed `[T]`), needed with `num_types`.
            need_weights: Whether the weights are wanted: a second pass of size `N²`.
            average_attn_weights: Whether they are averaged over the heads.

        Returns:
            `(y, weights)`: `y` like `x`, 0 for padded atoms; weights `[B, H, N, N]`
            (`[B, N, N]` averaged; packed: `N = max_atoms`), or None unless wanted.

        Raises:
            TypeError: An argument is no tensor, or of the wrong dtype.
            ValueError: A shape, a device or a combination is wrong.
        """
        self._check(x, mask, ptr)
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0)
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        radial = self._radial()
        options: dict[str, Any] = {
            "mask": mask,
            "ptr": ptr,
            "max_atoms": max_atoms,
            "atom_types": None if self.num_types is None else atom_types,
            "score": self.score,
            "normalizer": self.normalizer,
            "attention_scale": self.attention_scale,
            "backend": self.backend,
        }
        if self.num_types is not None and atom_types is None:
            raise ValueError("atom_types: expected integers for each atom (num_types), got None")
        out = self.out_proj(geo_attention(q, k, v, positions, radial, **options).flatten(-2))
        if mask is not None:
            out = out.masked_fill(~mask.unsqueeze(-1), 0)
        if not need_weights:
            return out, None
        weights = attention_weights(q, k, positions, radial, **options)
        return out, weights.mean(1) if average_attn_weights else weights

    def _check(self, x: Tensor, mask: Any, ptr: Any) -> None:
        layout = "[B, N, E" if ptr is None else "[T, E"
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor {layout}], got {type(x).__name__}")
        if x.ndim != (3 if ptr is None else 2) or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x: expected {layout}={self.embed_dim}], got {list(x.shape)}")
        if mask is None:
            return
        if ptr is not None:
            raise ValueError("mask: expected None with ptr (packed rows are all real), got a mask")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: expected bool [B, N], True = real atom, got {got}")
        if mask.shape != x.shape[:-1]:
            expected = ", ".join(f"{n}={s}" for n, s in zip("BN", x.shape, strict=False))
            raise ValueError(f"mask: expected [{expected}], got {list(mask.shape)}")
        if mask.device != x.device:
            raise ValueError(f"mask: expected on {x.device} like x, got on {mask.device}")

    def _radial(self) -> RadialTable | Callable[..., Tensor]:
        """The radial function in the form that `geo_attention` takes: the table, mostly."""
        if self.num_knots is None:
            return self._exact
        if is_traced():
            return self._tabulate(self.num_knots)
        if self.training or torch.is_grad_enabled():
            self.refresh()  # an optimizer may step next, and fused ones leave no trace
            return self._tabulate(self.num_knots)
        owned = [*self.parameters(), *self.buffers()]
        made_of = [self.radial, self.r_max, self.num_knots, *owned, *map(_state, owned)]
        if self._table is not None and _same(made_of, self._table_of):
            return self._table
        self._table, self._table_of = self._tabulate(self.num_knots), made_of
        return self._table

    def _function(self) -> Callable[..., Tensor]:
        return self.radial() if isinstance(self.radial, _GaussianSumParameters) else self.radial

    def _tabulate(self, num_knots: int) -> RadialTable:
        return tabulate(
            self._function(),
            self.r_max,
            num_knots,
            num_types=self.num_types,
            affine=self.affine,
            device=self.in_proj.weight.device,
        )

    def _exact(self, dist: Tensor, *types: Tensor) -> Tensor:
        """Evaluates the radial network itself at distances `[M]` of atoms of some types."""
        fn = self._function()
        if self._takes_types:
            return fn(dist, *types)
        if self.num_types is None or self.affine is None:
            return fn(dist)
        pair = number_pairs(self.num_types, dist.device)[types]
        return fn(radial_coordinate(dist, self.affine, pair)[0])

    def refresh(self) -> None:
        """Discards the table kept in `eval()`, after parameters were written through `.data`."""
        self._table = None

    def train(self, mode: bool = True) -> FusedGeoAttention:
        """Sets the mode and discards the table kept in `eval()`."""
        self.refresh()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.refresh()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.refresh()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: not the table."""
        return self.__dict__ | {"_table": None, "_table_of": []}

    def extra_repr(self) -> str:
        """The settings that the submodules do not show."""
        return (
            f"num_heads={self.num_heads}, score={self.score!r}, normalizer={self.normalizer!r}, "
            f"r_max={self.r_max} Å, num_knots={self.num_knots}, num_types={self.num_types}"
        )


def _state(x: Tensor) -> tuple[int, int]:
    """Where the numbers of a tensor are, and how often PyTorch saw them change in place."""
    return x.data_ptr(), 0 if x.is_inference() else x._version


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        x is y if isinstance(x, (Tensor, nn.Module)) else x == y for x, y in zip(a, b, strict=True)
    )


class _GaussianSumParameters(nn.Module):
    """Owns the tensors of a `GaussianSum` as parameters and makes it again in each call."""

    def __init__(self, gaussians: GaussianSum) -> None:
        super().__init__()
        self.centers = nn.Parameter(gaussians.centers.detach().clone())
        self.gammas = nn.Parameter(gaussians.gammas.detach().clone())
        self.weights = nn.Parameter(gaussians.weights.detach().clone())

    def forward(self) -> GaussianSum:
        return GaussianSum(self.centers, self.gammas, self.weights)
