"""GeoT: a transformer for molecules whose attention sees the distances between the atoms.

    x_i = embedding[z_i] -> layers -> y = W_2 elu(W_1 Σ_i x_i + b_1) + b_2 + output_offset

The attention of each layer has no softmax: `A_ij = Σ_c q_ic k_jc F_c(d_ij) / sqrt(D)`, with a
filter `F`, a network on Gaussians of the distance. `published` brings the authors' weights here,
`readout` has other ways from atoms to a molecule, and score and normalizer can be chosen.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from geot_kernels import FusedGeoAttention
from geot_kernels.radial import GaussianBasis, RadialMLP

from . import published
from .molecules import Molecule, Molecules
from .readout import Layout, Readout

if TYPE_CHECKING:
    from .checkpoint import Card
    from .prediction import Prediction

QM9_ELEMENTS = (1, 6, 7, 8, 9)
"""H, C, N, O, F."""

# The table of a filter: GeoT's Gaussians end at 29.9 Å and have died away, to 1e-5, at 31 Å. Up to
# there the table has to follow them; beyond, the filter is constant, as the table is. Largest
# errors of f, f', f'' between the knots (`table_error`), relative to the largest |f|, |f'|, |f''|,
# over the 9 published filters with random weights in tests/golden:
#
#     2048 knots up to 31 Å, computed in float64   1.2e-7  2.1e-5  1.5e-3
#     1024 knots up to 31 Å, computed in float32   3.0e-6  2.8e-4  7.1e-3
#     1024 knots up to 14 Å, computed in float32   1.3e-6  8.5e-5  3.2e-3
#
# Beyond 1024 knots a table is computed in float64, and takes several times as long. No two atoms
# of a molecule in QM9 are further apart than 12.04 Å.
R_MAX = 31.0
NUM_KNOTS = 2048

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_EPSILON = 1e-6  # of the published LayerNorm
_FIRST_SCALE = 0.1  # of the published attention scale


class GeoTLayer(nn.Module):
    """One layer of GeoT: attention and feed-forward, one after the other or side by side.

        sequential   y = LN1(x + attention(x)),   LN2(y + ffn(y))
        parallel     LN1(x + attention(x) + ffn(x))
        ffn(x) = W_2 elu(W_1 x + b_1) + b_2

    What stands in padded rows is not read; in the result those rows hold something finite.

    Attributes:
        attention: A `FusedGeoAttention`, with the filter in `attention.radial`.

    Source: GeoT (Kwak et al., ACS Omega 2023, arXiv 2106.15516).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        ffn_dim: int | None = None,
        parallel: bool = False,
        attention_scale: bool = False,
        num_types: int | None = None,
        basis: nn.Module | None = None,
        filter_hidden: int = 64,
        r_max: float = R_MAX,
        num_knots: int = NUM_KNOTS,
        radial: str = "table",
        score: str = "filter",
        normalizer: str = "linear",
        backend: str | None = None,
    ) -> None:
        """Makes the layer, initialised as `GeoT` says.

        Args:
            embed_dim: Width `E`.
            num_heads: Heads `H`, a divisor of `embed_dim`.
            ffn_dim: Width of the feed-forward's hidden layer; None: `embed_dim`.
            parallel: Whether the feed-forward stands beside the attention, not after it.
            attention_scale: Whether the attention has the learned scale `s`.
            num_types: Number of atom types that the filter sees; None: only the distance.
            basis: As for `GeoT`; the layer gets a copy.
            filter_hidden: Width of the filter's hidden layer.
            r_max: Where the table of the filter ends, Å; it is constant beyond.
            num_knots: Of the table.
            radial: `"table"`, or `"exact"` for the filter itself, with `backend="reference"`.
            score: `"filter"`, or `"bias"`, where the network on the basis gives one number a head.
            normalizer: `"linear"` or `"softmax"`.
            backend: As for `geot_kernels.geo_attention`.

        Raises:
            ValueError: A number, a name or a combination is wrong.
        """
        super().__init__()
        if radial not in ("table", "exact"):
            raise ValueError(f"radial: expected 'table' or 'exact', got {radial!r}")
        if radial == "exact" and backend not in (None, "reference"):
            raise ValueError(
                f"backend: expected None or 'reference' for radial='exact', got {backend!r}"
            )
        ffn_dim = embed_dim if ffn_dim is None else ffn_dim
        if ffn_dim < 1:
            raise ValueError(f"ffn_dim: expected at least 1, got {ffn_dim}")
        filters = RadialMLP(
            GaussianBasis.geot() if basis is None else copy.deepcopy(basis),
            filter_hidden,
            embed_dim if score == "filter" else num_heads,
            activation="ssp",
            final_activation="ssp" if score == "filter" else None,
            num_types=num_types,
            type_dim=published.TYPE_DIM,
        )
        self.attention = FusedGeoAttention(
            embed_dim,
            num_heads,
            radial=filters,
            score=score,
            normalizer=normalizer,
            attention_scale=attention_scale,
            num_types=num_types,
            r_max=r_max,
            num_knots=None if radial == "exact" else num_knots,
            backend="reference" if radial == "exact" else backend,
        )
        self.ffn = _feed_forward(embed_dim, ffn_dim, embed_dim)
        self.norm1 = nn.LayerNorm(embed_dim, eps=_EPSILON)
        self.norm2 = None if parallel else nn.LayerNorm(embed_dim, eps=_EPSILON)
        self._initialise()

    def _initialise(self) -> None:
        _initialise(self)
        for weight in self.attention.in_proj.weight.chunk(3):  # of queries, keys and values
            nn.init.xavier_uniform_(weight)
        if isinstance(self.attention.attention_scale, Tensor):
            nn.init.constant_(self.attention.attention_scale, _FIRST_SCALE)

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
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the layer, and on request its attention weights.

        Args:
            x: `[B, N, E]`, or packed `[T, E]` with `ptr`. Differentiable, twice.
            positions: `[B, N, 3]` (packed `[T, 3]`), Å. Differentiable, twice.
            mask: bool `[B, N]`, True = real atom; None: all are.
            ptr: int `[B+1]`: molecule `b` is the packed rows `ptr[b]:ptr[b+1]`.
            max_atoms: Size of the largest packed molecule; without it that is read back.
            atom_types: int `[B, N]` (packed `[T]`), needed with `num_types`.
            need_weights: Whether the weights are wanted: a second pass of size `N²`.

        Returns:
            `(y, weights)`: `y` like `x`; weights `[B, H, N, N]`, or None unless wanted.

        Raises:
            TypeError: An argument is no tensor, or of the wrong dtype.
            ValueError: A shape, a device or a combination is wrong.
        """
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0)
        attended, weights = self.attention(
            x,
            positions,
            mask,
            ptr=ptr,
            max_atoms=max_atoms,
            atom_types=atom_types,
            need_weights=need_weights,
        )
        return self.update(x, attended), weights

    def update(self, x: Tensor, attended: Tensor) -> Tensor:
        """Computes what follows the attention: sums, norms and feed-forward; all like `x`."""
        if self.norm2 is None:
            parallel: Tensor = self.norm1(x + attended + self.ffn(x))
            return parallel
        y = self.norm1(x + attended)
        sequential: Tensor = self.norm2(y + self.ffn(y))
        return sequential


class GeoT(nn.Module):
    """GeoT: atoms and their positions in, properties of the molecule out.

        x_i = embedding[z_i] -> layers -> y = W_2 elu(W_1 Σ_i x_i + b_1) + b_2 + output_offset

    The sum over the real atoms makes outputs grow with the molecule: of a new network they are 6
    to 9 (root mean square) for QM9's. So train on targets of zero mean and unit spread; a target
    that does not grow the network has to learn as one. A molecule without atoms is an empty sum.

    Initialised as the authors' code does it, by Keras' defaults: kernels Glorot-uniform, biases 0,
    attention scale 0.1; but the embeddings are normal with standard deviation 1, not 0.05. (With
    0.05 the first layer's attention is 5e-4 of what it is added to, with 1 it is 0.2.)

    That read-out is "pooled"; `Readout` has others, one for each target if need be.

    Inputs are molecules `[B, N]` with padding, or packed one after the other. What stands in
    padded rows, NaN included, reaches neither results nor gradients. A real atom of an element
    that the model does not have raises on the CPU; on other devices and under `torch.compile`,
    `torch.export` and `make_fx`, where values cannot be read cheaply, the properties of its
    molecule are NaN.

    Attributes:
        layers: Of `GeoTLayer`.
        output_offset: A buffer, added to all outputs.
        card: What a trained model was trained on and predicts; None for a new one.

    Source: GeoT (Kwak et al., ACS Omega 2023, arXiv 2106.15516), and
    https://github.com/oleneyl/geometry-aware-transformer.
    """

    type_of: Tensor
    output_offset: Tensor
    card: Card | None = None

    def __init__(
        self,
        num_targets: int,
        *,
        embed_dim: int = 64,
        num_heads: int = 4,
        num_layers: int = 4,
        ffn_dim: int | None = None,
        readout_dim: int = 64,
        readout: str | Sequence[str] = "pooled",
        elements: Sequence[int] = QM9_ELEMENTS,
        parallel: bool = False,
        attention_scale: bool = False,
        atom_embedding: bool = False,
        basis: nn.Module | None = None,
        filter_hidden: int = 64,
        r_max: float = R_MAX,
        num_knots: int = NUM_KNOTS,
        radial: str = "table",
        score: str = "filter",
        normalizer: str = "linear",
        output_offset: float = 0.0,
        backend: str | None = None,
    ) -> None:
        """Makes the network; the authors' has `embed_dim=1024, num_heads=64, num_layers=8`.

        Args:
            num_targets: Outputs `T`.
            embed_dim: Width `E`.
            num_heads: Heads `H`, a divisor of `embed_dim`.
            num_layers: Layers `L`.
            ffn_dim: Width of the feed-forward's hidden layer; None: `embed_dim`.
            readout_dim: Width of the read-out's hidden layer.
            readout: "pooled" (published), "sum", "mean" or "dipole": one for all targets, or one
                for each; see `geot_model.readout.Readout`.
            elements: Atomic numbers the filters can tell apart with `atom_embedding`: each pair
                of them has a table of its own. Without, all of 1 to 99 are accepted.
            parallel: Whether each feed-forward stands beside the attention, not after it.
            attention_scale: Whether each attention has the learned scale `s`.
            atom_embedding: Whether the filters depend on the elements of the two atoms too.
            basis: Of the filters: distances `[M]`, Å, to `[M, K]`, with an attribute `num_basis`,
                such as those of `geot_kernels.radial`; each layer gets a copy. None: GeoT's 300
                Gaussians, every 0.1 Å up to 29.9 Å.
            filter_hidden: Width of the filters' hidden layer.
            r_max: Where the tables of the filters end, Å; they are constant beyond.
            num_knots: Of the tables.
            radial: `"table"`, or `"exact"` for the filters themselves, without tables, in plain
                PyTorch (`backend="reference"`), differentiable to any order.
            score: `"filter"` (published), or `"bias"`: `q·k/sqrt(D) + f_h(d)`.
            normalizer: `"linear"` (published: none), or `"softmax"`.
            output_offset: Added to all outputs, in their unit.
            backend: As for `geot_kernels.geo_attention`.

        Raises:
            ValueError: A number, a name or a combination is wrong.
        """
        super().__init__()
        sizes = {"num_targets": num_targets, "num_layers": num_layers, "readout_dim": readout_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        type_of = _number_types(elements)
        self.atom_embedding = atom_embedding
        if not atom_embedding:
            type_of = torch.arange(published.NUM_ROWS) - 1
        self.register_buffer("type_of", type_of)
        self.register_buffer("output_offset", torch.tensor(float(output_offset)))
        self.embedding = nn.Embedding(published.NUM_ROWS, embed_dim)
        self.layers = nn.ModuleList(
            GeoTLayer(
                embed_dim,
                num_heads,
                ffn_dim=ffn_dim,
                parallel=parallel,
                attention_scale=attention_scale,
                num_types=len(elements) if atom_embedding else None,
                basis=basis,
                filter_hidden=filter_hidden,
                r_max=r_max,
                num_knots=num_knots,
                radial=radial,
                score=score,
                normalizer=normalizer,
                backend=backend,
            )
            for _ in range(num_layers)
        )
        kinds = (readout,) * num_targets if isinstance(readout, str) else tuple(readout)
        if len(kinds) != num_targets:
            raise ValueError(f"readout: expected one or {num_targets} names, got {len(kinds)}")
        self.readout = Readout(embed_dim, readout_dim, kinds, _feed_forward)
        _initialise(self.readout)

    @classmethod
    def from_published(
        cls,
        weights: Mapping[str, Any],
        num_heads: int,
        output_offset: float = 0.0,
        radial: str = "table",
        *,
        elements: Sequence[int] = QM9_ELEMENTS,
        backend: str | None = None,
    ) -> GeoT:
        """Makes the published network from its arrays.

        Sizes, feed-forward after or beside the attention, attention scale and atom embedding
        follow from names and shapes.

        Args:
            weights: Published names (`embedding`, `layer0.attention.query.kernel`, ...) to arrays,
                numpy or torch, such as an opened npz; a kernel is `[in, out]`. Where some names
                begin with `w:`, only those are weights.
            num_heads: Heads `H`, the one number that arrays do not tell.
            output_offset: Added to all outputs; in the published code for QM9 it is -6.52999, and
                it is not among the weights.
            radial: `"table"` or `"exact"`.
            elements: Those of the atom embedding that the model keeps, if there is one.
            backend: As for `geot_kernels.geo_attention`.

        Returns:
            The model, in `train()`, in the default dtype, on the CPU.

        Raises:
            ValueError: An array is missing, unexpected or of the wrong shape (it names the array),
                or another argument is wrong.
        """
        arrays = published.collect(weights)
        model = cls(
            **published.read_settings(arrays),
            num_heads=num_heads,
            elements=elements,
            radial=radial,
            output_offset=output_offset,
            backend=backend,
        )
        state = published.network_state(arrays, elements)
        model.load_state_dict(dict(model.named_buffers()) | state)
        return model

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str | None = None) -> GeoT:
        """Reads a trained model: nothing but tensors and plain values, so any file is safe.

        Args:
            path: What `geot train` wrote: `model.safetensors`, or the folder of the run.
            device: Where to; None: a GPU if there is one.

        Returns:
            The model, in `eval()`, with its `card`.

        Raises:
            geot_model.CheckpointError: There is no such file, or it is no model.
        """
        from .checkpoint import load_model

        return load_model(path, device=device)

    def predict(self, molecules: Molecules | Sequence[Molecule]) -> Prediction:
        """Predicts properties of molecules, in the units of the training's targets.

        Args:
            molecules: M of them, as `geot_model.read(...).molecules` gives them.

        Returns:
            Values `[M, T]`, NaN for what the model does not know, such as elements not seen in
            training; and why.

        Raises:
            ValueError: The model is new: it has no `card`.
        """
        from .prediction import predict

        return predict(self, molecules)

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that the model accepts, by their type."""
        known = (self.type_of >= 0).nonzero().flatten()
        return tuple(known[self.type_of[known].argsort()].tolist())

    def forward(
        self,
        atomic_numbers: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        *,
        ptr: Tensor | None = None,
        max_atoms: int | None = None,
    ) -> Tensor:
        """Computes the properties of molecules.

        Args:
            atomic_numbers: int `[B, N]`, 0 = padding; or packed `[T]` with `ptr`.
            positions: `[B, N, 3]` (packed `[T, 3]`), Å; float32 or float64. Differentiable, twice.
            mask: bool `[B, N]`, **True = real atom**; None: `atomic_numbers > 0`.
            ptr: int `[B+1]`: molecule `b` is the packed rows `ptr[b]:ptr[b+1]`.
            max_atoms: Size of the largest packed molecule; without it that is read back.

        Returns:
            `[B, T]`.

        Raises:
            TypeError: An argument is no tensor, or of the wrong dtype.
            ValueError: A shape or a device is wrong, or (on the CPU) a real atom is of an element
                that the model does not have.
        """
        x, layout, types = self._embed(atomic_numbers, positions, mask, ptr, max_atoms)
        for layer in self.layers:
            x, _ = layer(x, positions, atom_types=types, **vars(layout))
        out: Tensor = self.readout(x, positions, layout) + self.output_offset
        return out

    def attention_maps(
        self,
        atomic_numbers: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        *,
        ptr: Tensor | None = None,
        max_atoms: int | None = None,
    ) -> Tensor:
        """Computes the weights with which each layer's attention multiplies the values.

        Unless there is a softmax, they have any sign, and rows do not sum to 1. Differentiable.

        Args:
            atomic_numbers: As for `forward`.
            positions: `[B, N, 3]` (packed `[T, 3]`), Å.
            mask: bool `[B, N]`, True = real atom; None: `atomic_numbers > 0`.
            ptr: As for `forward`.
            max_atoms: As for `forward`.

        Returns:
            `[L, B, H, N, N]` (packed: `N = max_atoms`), query atom before key atom, exact zeros
            where either is padding.

        Raises:
            TypeError: As for `forward`.
            ValueError: As for `forward`.
        """
        x, layout, types = self._embed(atomic_numbers, positions, mask, ptr, max_atoms)
        maps = []
        for layer in self.layers:
            x, weights = layer(x, positions, atom_types=types, need_weights=True, **vars(layout))
            maps.append(weights)
        return torch.stack(maps)

    def _embed(
        self,
        atomic_numbers: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        ptr: Tensor | None,
        max_atoms: int | None,
    ) -> tuple[Tensor, Layout, Tensor | None]:
        """Computes the atoms' first features, their layout, and the types the filters see."""
        _check(atomic_numbers, positions, mask, ptr)
        if ptr is None and mask is None:
            mask = atomic_numbers > 0
        inside = atomic_numbers.long().clamp(0, published.NUM_ROWS - 1)
        types = self.type_of[inside]
        unknown = (types < 0) | (inside != atomic_numbers)
        if mask is not None:
            unknown = mask & unknown
        if _readable(unknown) and unknown.any():
            self._refuse(atomic_numbers[unknown])
        x = self.embedding(inside).masked_fill(unknown.unsqueeze(-1), torch.nan)
        layout = Layout(mask, ptr, max_atoms)
        return x, layout, types.clamp(min=0) if self.atom_embedding else None

    def _refuse(self, numbers: Tensor) -> None:
        known = ", ".join(map(str, self.elements)) if self.atom_embedding else "1 to 99"
        got = ", ".join(map(str, numbers.unique().tolist()))
        raise ValueError(
            f"atomic_numbers: expected elements that the model has ({known}), got {got}"
        )


def _feed_forward(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ELU(), nn.Linear(hidden, outputs))


def _initialise(module: nn.Module) -> None:
    """Fills the linear maps in a module: Glorot-uniform kernels, biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)


def _number_types(elements: Sequence[int]) -> Tensor:
    """Makes the table from atomic number to type, -1 for none."""
    inside = all(0 < element < published.NUM_ROWS for element in elements)
    if not elements or not inside or len(set(elements)) < len(elements):
        raise ValueError(
            f"elements: expected different atomic numbers from 1 to {published.NUM_ROWS - 1}, "
            f"got {tuple(elements)}"
        )
    type_of = torch.full((published.NUM_ROWS,), -1)
    type_of[list(elements)] = torch.arange(len(elements))
    return type_of


def _check(
    atomic_numbers: Tensor, positions: Tensor, mask: Tensor | None, ptr: Tensor | None
) -> None:
    """Checks what the attention does not check: it sees only the positions."""
    tensors = {"atomic_numbers": atomic_numbers, "positions": positions, "mask": mask, "ptr": ptr}
    for name, tensor in tensors.items():
        if tensor is None and name in ("mask", "ptr"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.device != atomic_numbers.device:
            raise ValueError(
                f"{name}: expected on {atomic_numbers.device} like atomic_numbers, "
                f"got on {tensor.device}"
            )
    if atomic_numbers.dtype not in _INTEGERS:
        raise TypeError(f"atomic_numbers: expected integers, got {atomic_numbers.dtype}")
    layout = "[B, N]" if ptr is None else "[T]"
    if atomic_numbers.ndim != (2 if ptr is None else 1):
        raise ValueError(f"atomic_numbers: expected {layout}, got {list(atomic_numbers.shape)}")
    if mask is None:
        return
    if ptr is not None:
        raise ValueError("mask: expected None with ptr (packed rows are all real), got a mask")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool [B, N], True = real atom, got {mask.dtype}")
    if mask.shape != atomic_numbers.shape:
        size = f"B={atomic_numbers.shape[0]}, N={atomic_numbers.shape[1]}"
        raise ValueError(f"mask: expected [{size}], got {list(mask.shape)}")


def _readable(x: Tensor) -> bool:
    """Whether values can be read here and now, at no cost worth the name."""
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" and type(x) is Tensor and get_proxy_mode() is None
