"""The Triton kernels, interpreted: the choice of tiles, and heads that share programs."""

from __future__ import annotations

import pytest
from fused import assert_equal, exact_case
from fused import triton_module as module
from passes import passes
from test_fused_shapes import SHAPES

pytestmark = pytest.mark.interpreted


def test_the_sizes_of_the_tests_reach_every_choice_of_tiles():
    tiles = module("tiles")
    for choose in (
        lambda n: tiles.forward_tiles(n, 16, False, 4),
        lambda n: tiles.backward_tiles(n, 16, False, 4),
        lambda n: tiles.second_backward_tiles(n, 16, False),
        lambda n: tiles.scatter_tiles(n, 16, False),
        lambda n: tiles.scatter_tiles(n, 16, True),
    ):
        every = {choose(n) for n in range(1, 1000)}
        assert every == {choose(atoms) for atoms, _, _ in SHAPES["bias"]}
    kinds = {  # of a filter: all of D, or a query atom at a time, or one key; all keys, or some
        tuple(x > 1 for x in t[:2]) + tuple(t[3:])
        for t in (tiles.filter_tiles(n, d) for n in (16, 32, 64, 256) for d in (2, 8, 32, 128))
    }
    seen = {
        tuple(x > 1 for x in t[:2]) + tuple(t[3:])
        for t in (tiles.filter_tiles(n, tiles.power_of_two(d)) for n, _, d in SHAPES["filter"])
    }
    assert kinds <= seen


@pytest.mark.parametrize(
    ("policy", "radial", "sizes"),
    [
        (("bias", "softmax"), "affine", (33,)),
        (("bias", "softmax"), "affine", (5, 0, 4)),
        (("bias", "linear"), "gaussians", (5, 0, 4)),
        (("filter", "softmax"), "affine", (5, 4)),
        (("filter", "linear"), "table", (2, 18)),
    ],
    ids=str,
)
def test_heads_may_share_programs_in_any_way(policy, radial, sizes, monkeypatch):
    heads = 3
    case = exact_case(*policy, radial, sizes=sizes, heads=heads, channels=2)
    expected = passes(case, "reference")
    groups = module("launch").Problem.groups
    seen = set()

    def counted(self, programs):
        seen.add(groups(self, programs))
        return groups(self, programs)

    monkeypatch.setattr(module("launch").Problem, "groups", counted)
    for multiprocessors in (1, 2, 10**6):  # one group, an uneven division, a head in each
        monkeypatch.setattr(module("launch"), "multiprocessors", lambda _, n=multiprocessors: n)
        assert_equal(passes(case, "triton"), expected)
    assert {(heads, 1), (2, 2)} <= seen
    assert (1, heads) in seen or sizes == (33,)
