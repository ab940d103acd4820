"""Ways to compute one layer, by the names that rows have: ours, and what one would take instead.

    ours                         the table given; where the pass has its gradient, to the knots
    ours with table              from the radial function's parameters on
    ours, CUDA C++               `ours` by backend "cuda"
    plain                        `scaled_dot_product_attention`, no geometry: the floor
    SDPA, bias given             the same with a bias in memory, for all layers, and its gradient
    SDPA, bias recomputed        from the radial parameters on, as all of the following
    eager, compiled eager        distances, basis, radial function, weights, all in memory
    eager MATH                   the backend of PyTorch's attention with a second derivative
    FlexAttention, Gaussians     in `score_mod`
    FlexAttention, table         in `score_mod`, to the knots
    cuEquivariance               `triangle_attention` with a bias in memory, where installed
    jvp_flash_attention          with a bias in memory, where installed

Ways to which something is given are compared with `ours`, others with `ours with table`
(`opponent`).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import geot_kernels as gk

from .problems import Problem
from .ways import Way, compiled, compiled_force_step

OURS, BUILT, IN_CUDA = "ours", "ours with table", "ours, CUDA C++"
PLAIN, COMPILED = "plain", "compiled eager"
OWN = (OURS, BUILT, IN_CUDA)


@dataclass(frozen=True)
class Peer:
    """A way.

    Attributes:
        make: The way, of a problem, a pass and our backend.
        oracle: Which radial function it computes: "exact", "table" or "none".
        given: Whether it makes neither table nor bias: then nor does the one of ours that it is
            compared with.
        strict: Whether its radial function is never computed in 16 bits.
        tabulates: Whether it takes a table for the exact function.
        filters: Whether it can compute a filter.
        needs: A module that must be installed.
        compiles: Whether `torch.compile` is part of it.
        forces: Whether it stands in rows of force steps.
        only_forces: Whether it stands in no others.
    """

    make: Callable[[Problem, str, str], Way]
    oracle: str = "exact"
    given: bool = False
    strict: bool = False
    tabulates: bool = False
    filters: bool = False
    needs: str = ""
    compiles: bool = False
    forces: bool = True
    only_forces: bool = False

    def why_not(self, problem: Problem) -> str | None:
        """Why it cannot compute this problem, known beforehand; what is found out is not here."""
        if problem.score == "filter" and not self.filters:
            return "a filter is no bias on the scores"
        if self is PEERS[IN_CUDA]:
            return gk.available_backends(problem.positions.device.type)["cuda"]
        if self.needs and importlib.util.find_spec(self.needs.partition(".")[0]) is None:
            return f"{self.needs.partition('.')[0]} is not installed"
        exact_in_flex = self.compiles and self.oracle == "exact" and not self.filters
        if exact_in_flex and not isinstance(problem.radial, gk.GaussianSum):
            return "score_mod knows no vectors: a radial network cannot be written in it"
        return None


def _eager_compiled(problem: Problem, name: str, backend: str) -> Way:
    if name == "force_step":
        return compiled_force_step(problem.eager())
    return compiled(problem.eager())


def _cuequivariance(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    attention = importlib.import_module("cuequivariance_torch").triangle_attention
    out: Tensor = attention(q[:, None], k[:, None], v[:, None], bias[:, None])  # [B, 1, H, N, D]
    return out[:, 0]


def _jvp_flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    attention = importlib.import_module("jvp_flash_attention.jvp_attention").attention
    out: Tensor = attention(q, k, v, attn_mask=bias)
    return out


PEERS = {
    OURS: Peer(lambda p, _, b: p.ours(b), "table", strict=True, filters=True),
    BUILT: Peer(
        lambda p, _, b: p.ours_building_the_table(b), strict=True, tabulates=True, filters=True
    ),
    IN_CUDA: Peer(lambda p, *_: p.ours("cuda"), "table", True, strict=True, filters=True),
    PLAIN: Peer(lambda p, *_: p.plain(), "none", True, strict=True, filters=True, forces=False),
    "SDPA, bias given": Peer(lambda p, *_: p.bias_given(), given=True, forces=False),
    "SDPA, bias recomputed": Peer(lambda p, *_: p.bias_recomputed()),
    "eager": Peer(lambda p, *_: p.eager(), filters=True),
    COMPILED: Peer(_eager_compiled, filters=True, compiles=True),
    "eager MATH": Peer(lambda p, *_: p.math(), only_forces=True),
    "FlexAttention, Gaussians": Peer(lambda p, *_: compiled(p.flex()), strict=True, compiles=True),
    "FlexAttention, table": Peer(
        lambda p, *_: compiled(p.flex_table()),
        "table",
        True,
        strict=True,
        compiles=True,
    ),
    "cuEquivariance": Peer(
        lambda p, *_: p.bias_given(_cuequivariance),
        given=True,
        needs="cuequivariance_torch",
        forces=False,
    ),
    "jvp_flash_attention": Peer(
        lambda p, *_: p.bias_given(_jvp_flash),
        given=True,
        needs="jvp_flash_attention",
        forces=False,
    ),
}


def functions(name: str, device: str, backend: str = "") -> list[str]:
    """The ways that stand in rows of a pass."""
    found = [
        function
        for function, peer in PEERS.items()
        if (peer.forces if name == "force_step" else not peer.only_forces)
    ]
    both = device == "cuda" and backend != "cuda"
    return [function for function in found if function != IN_CUDA or both]


def opponent(function: str, name: str) -> str:
    """Which of ours is compared with a function in a pass; "" for our own two.

    Attention without geometry meets `ours` in a forward pass, where a table is kept, and `ours
    with table` in others: nobody trains with a table that is given.
    """
    if function in (OURS, BUILT):
        return ""
    if function == PLAIN:
        return OURS if name == "forward" else BUILT
    return OURS if function not in PEERS or PEERS[function].given else BUILT


def is_float(dtype: str) -> torch.dtype:
    """A dtype by its name."""
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no dtype of torch: {dtype}")
    return found
