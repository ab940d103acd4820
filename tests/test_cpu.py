"""The C++ kernels in float64 against the reference: every pass, variant, size and layout."""

from __future__ import annotations

import random

import pytest
import torch
from cases import NEEDS_CPU, RADIALS, VARIANTS, make_case
from passes import ROUNDING, largest_difference, passes
from test_ops import POLICIES, operator_arguments

pytestmark = NEEDS_CPU
SHAPES = [  # N, H, D
    (1, 3, 8),
    (2, 8, 12),
    (7, 20, 2),
    (8, 1, 128),
    (9, 9, 16),
    (17, 16, 3),
    (31, 1, 80),
    (31, 3, 64),
    (32, 3, 24),
    (33, 8, 32),
    (33, 1, 48),
    (65, 9, 12),
    (127, 2, 16),
    (300, 1, 8),
]
BATCHES = [  # sizes, H: molecules in one piece, in chunks, and both; one group of heads, many
    ((5,) * 40, 2),
    ((1, 2, 64, 0, 65, 33), 1),
    ((300, 130, 70), 2),
    ((257, 3, 256, 0, 31, 300, 2, 9, 64), 1),
    ((20, 90), 17),
]


def assert_passes_agree(case, backend="reference", **options):
    got = passes(case, "cpu", **options)
    name, error = largest_difference(got, passes(case, backend, **options))
    assert error <= ROUNDING, name


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_all_passes_equal_the_reference(variant):
    case = make_case(*variant, sizes=(11, 0, 9), heads=3, channels=5, attention_scale=True)
    assert_passes_agree(case)
    assert_passes_agree(case, tangent=["positions"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_all_passes_equal_the_reference_at_odd_sizes(policy, shape):
    atoms, heads, channels = shape
    radials = RADIALS[:3] if policy[0] == "filter" else RADIALS
    radial = radials[(atoms + channels) % len(radials)]
    layout = ("full", "packed")[heads % 2]
    case = make_case(*policy, radial, layout, sizes=(atoms,), heads=heads, channels=channels)
    assert_passes_agree(case)


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: f"{len(b[0])} molecules {b[1]} heads")
@pytest.mark.parametrize("policy", POLICIES, ids=" ".join)
def test_all_passes_equal_the_reference_for_molecules_of_all_sizes(policy, batch):
    sizes, heads = batch
    case = make_case(*policy, "affine", "packed", sizes=sizes, heads=heads, channels=4)
    assert_passes_agree(case, "eager")


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_any_part_of_the_tangent_and_of_what_is_needed(variant):
    case = make_case(*variant, sizes=(7, 2, 0, 9), heads=9, channels=3)
    arguments = operator_arguments(case)
    chance = random.Random(0)
    for name, tangents in (("attention_bwd", 0), ("attention_bwd_bwd", 6)):
        op = getattr(torch.ops.geot, name).default
        args = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments[name][:-1]]
        at = next(i for i, x in enumerate(args) if isinstance(x, list))  # of `needs`
        optional = [i for i in range(tangents + 2) if args[i] is not None]
        absent = [set(), *({i} for i in optional), *(set(optional) - {i} for i in optional)]
        absent += [set(chance.sample(optional, chance.randrange(len(optional)))) for _ in "abcde"]
        for missing in absent:
            fewer = [None if i in missing else x for i, x in enumerate(args)]
            expected = op(*fewer, "eager")
            some = [n and chance.random() < 0.5 for n in args[at]]
            for needs in (args[at], some):
                fewer[at] = needs
                got = op(*fewer, "cpu")
                wanted = [x for x, n in zip(spread(expected, args[at]), needs, strict=True) if n]
                _, error = largest_difference(*(dict(enumerate(x)) for x in (got, wanted)))
                assert error <= ROUNDING, (missing, needs)


def spread(results, needs):
    rest = iter(results)
    return [next(rest) if needed else None for needed in needs]
