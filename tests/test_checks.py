"""What wrong arguments are told: the argument, what was expected, what came; and the backends."""

import dataclasses
import os
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

import geot_kernels
from geot_kernels import (
    GaussianSum,
    RadialTable,
    attention_weights,
    available_backends,
    backends,
    check_inputs,
    geo_attention,
)

B, N, H, D, T = 4, 63, 2, 8, 3
PTR = (0, 20, 20, 63, 100)  # four molecules, one of them without atoms
FUNCTIONS = (geo_attention, attention_weights, check_inputs)
ROOT = Path(geot_kernels.__file__).parents[1]


def knots(channels=H, pairs=1, **options):
    return torch.rand(pairs, 9, 2, channels, **options)


def gaussians(channels=H, count=4):
    return GaussianSum(torch.rand(count), torch.rand(count), torch.rand(channels, count))


def padded():
    """Arguments that are right."""
    return {
        "q": torch.randn(B, N, H, D),
        "k": torch.randn(B, N, H, D),
        "v": torch.randn(B, N, H, D),
        "positions": torch.randn(B, N, 3),
        "radial": RadialTable(knots(), 0.0, 5.0),
        "mask": torch.rand(B, N) < 0.7,
        "backend": "eager",
    }


def packed():
    rows = PTR[-1]
    return {
        "q": torch.randn(rows, H, D),
        "k": torch.randn(rows, H, D),
        "v": torch.randn(rows, H, D),
        "positions": torch.randn(rows, 3),
        "radial": RadialTable(knots(), 0.0, 5.0),
        "ptr": torch.tensor(PTR),
        "max_atoms": 43,
        "backend": "eager",
    }


def typed(**changes):
    index = torch.tensor([[0, 1, 2], [1, 3, 4], [2, 4, 5]])
    table = RadialTable(knots(pairs=6), 0.0, 5.0, index)
    types = torch.randint(T, (B, N))
    return padded() | {"radial": dataclasses.replace(table, **changes), "atom_types": types}


def call(function, arguments):
    if function is attention_weights:
        arguments = {name: x for name, x in arguments.items() if name != "v"}
    return function(**arguments)


def refused(function, arguments, error, message, **changes):
    with pytest.raises(error) as caught:
        call(function, arguments | changes)
    assert re.fullmatch(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("make", [padded, packed, typed])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_right_arguments_pass(function, make):
    result = call(function, make())
    assert result is None or result.isfinite().all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_message_has_the_form_that_was_promised(function):
    arguments = padded() | {"positions": torch.randn(4, 62, 3)}
    with pytest.raises(ValueError) as caught:
        call(function, arguments)
    assert str(caught.value) == "positions: expected [B=4, N=63, 3], got [4, 62, 3]"


FULL = r"\[B=4, N=63, H=2, D=8\]"
META = torch.device("meta")
WRONG = {
    "q list": (TypeError, r"q: expected a tensor \[B, N, H, D\], got list", {"q": [1.0]}),
    "q rank": (
        ValueError,
        r"q: expected \[B, N, H, D\], got \[4, 63, 16\]",
        {"q": torch.ones(B, N, H * D)},
    ),
    "q dtype": (
        TypeError,
        r"q: expected float32, float64, bfloat16 or float16, got torch\.int64",
        {"q": torch.ones(B, N, H, D).long()},
    ),
    "q complex": (
        TypeError,
        r"q: expected .*, got torch\.complex64",
        {"q": torch.ones(B, N, H, D, dtype=torch.complex64)},
    ),
    "k none": (TypeError, rf"k: expected .*{FULL}.*, got NoneType", {"k": None}),
    "k shape": (
        ValueError,
        rf"k: expected {FULL}, got \[4, 63, 2, 7\]",
        {"k": torch.ones(B, N, H, D - 1)},
    ),
    "k dtype": (
        TypeError,
        rf"k: expected float32 {FULL}, got torch\.float64",
        {"k": torch.ones(B, N, H, D).double()},
    ),
    "k device": (
        ValueError,
        r"k: expected on cpu like q, got on meta",
        {"k": torch.ones(B, N, H, D, device=META)},
    ),
    "positions numpy": (
        TypeError,
        r"positions: expected .*\[B=4, N=63, 3\], got ndarray",
        {"positions": torch.ones(B, N, 3).numpy()},
    ),
    "positions 2d": (
        ValueError,
        r"positions: expected \[B=4, N=63, 3\], got \[4, 63, 2\]",
        {"positions": torch.ones(B, N, 2)},
    ),
    "positions bf16": (
        TypeError,
        r"positions: expected float32 or float64 .*, got torch\.bfloat16",
        {"positions": torch.ones(B, N, 3).bfloat16()},
    ),
    "positions int": (
        TypeError,
        r"positions: expected float32 or float64 .*, got torch\.int64",
        {"positions": torch.ones(B, N, 3).long()},
    ),
    "positions device": (
        ValueError,
        r"positions: expected on cpu like q, got on meta",
        {"positions": torch.ones(B, N, 3, device=META)},
    ),
    "mask float": (
        TypeError,
        r"mask: expected bool \[B=4, N=63\], True = real atom, got torch\.float32",
        {"mask": torch.ones(B, N)},
    ),
    "mask uint8": (
        TypeError,
        r"mask: expected bool \[B=4, N=63\], True = real atom, got torch\.uint8",
        {"mask": torch.ones(B, N).byte()},
    ),
    "mask list": (
        TypeError,
        r"mask: expected bool \[B=4, N=63\], True = real atom, got list",
        {"mask": [[True]]},
    ),
    "mask shape": (
        ValueError,
        r"mask: expected \[B=4, N=63\], got \[4, 63, 63\]",
        {"mask": torch.ones(B, N, N).bool()},
    ),
    "mask device": (
        ValueError,
        r"mask: expected on cpu like q, got on meta",
        {"mask": torch.ones(B, N, device=META).bool()},
    ),
    "score": (ValueError, r"score: expected 'bias' or 'filter', got 'dot'", {"score": "dot"}),
    "score None": (ValueError, r"score: expected 'bias' or 'filter', got None", {"score": None}),
    "normalizer": (
        ValueError,
        r"normalizer: expected 'softmax' or 'linear', got 'relu'",
        {"normalizer": "relu"},
    ),
    "backend": (
        ValueError,
        r"backend: expected None or one of 'triton', 'cuda', 'cpu', .*'reference', got 'cudnn'",
        {"backend": "cudnn"},
    ),
    "scale text": (
        (TypeError, ValueError),
        r"scale: expected a number.*, got .*",
        {"scale": "big"},
    ),
    "scale heads": (
        (TypeError, ValueError),
        r"scale: expected a number.*, got .*",
        {"scale": torch.ones(H)},
    ),
    "scale with a gradient that would be lost": (
        (TypeError, ValueError),
        r"scale: expected a number.*, got .*",
        {"scale": torch.tensor(0.5, requires_grad=True)},
    ),
    "max_atoms without ptr": (
        ValueError,
        r"max_atoms: expected None without ptr, got 63",
        {"max_atoms": 63},
    ),
    "atom_types float": (
        TypeError,
        r"atom_types: expected integers, got torch\.float32",
        {"atom_types": torch.ones(B, N)},
    ),
    "atom_types shape": (
        ValueError,
        r"atom_types: expected \[B=4, N=63\], got \[63\]",
        {"atom_types": torch.ones(N).long()},
    ),
    "atom_types list": (
        TypeError,
        r"atom_types: expected .*\[B=4, N=63\], got list",
        {"atom_types": [1]},
    ),
    "atom_types device": (
        ValueError,
        r"atom_types: expected on cpu like q, got on meta",
        {"atom_types": torch.ones(B, N, device=META).long()},
    ),
    "attention_scale number": (
        TypeError,
        r"attention_scale: expected a tensor, \[\] or \[H\], got float",
        {"attention_scale": 0.5},
    ),
    "attention_scale shape": (
        ValueError,
        r"attention_scale: expected \[\] or \[H=2\], got \[3\]",
        {"attention_scale": torch.ones(3)},
    ),
    "attention_scale device": (
        ValueError,
        r"attention_scale: expected on cpu like q, got on meta",
        {"attention_scale": torch.ones(H, device=META)},
    ),
}


def table(**changes):
    return {"radial": dataclasses.replace(RadialTable(knots(), 0.0, 5.0), **changes)}


def sums(**changes):
    return {"radial": dataclasses.replace(gaussians(), **changes)}


WRONG_RADIAL = {
    "number": (
        TypeError,
        r"radial: expected a RadialTable, a GaussianSum or a callable, got float",
        {"radial": 1.5},
    ),
    "tensor": (
        TypeError,
        r"radial: expected a RadialTable, a GaussianSum or a callable, got Tensor",
        {"radial": torch.ones(3)},
    ),
    "function": (
        ValueError,
        r"radial: expected a RadialTable or a GaussianSum, got function: tabulate\(.*"
        r"backend='reference' .*",
        {"radial": lambda d: d},
    ),
    "function, no backend": (
        ValueError,
        r"radial: expected a RadialTable or a GaussianSum, got Linear: .*",
        {"radial": torch.nn.Linear(1, 1), "backend": None},
    ),
    "channels of a bias": (
        ValueError,
        r"radial: expected C=2 channels \(H\) for score 'bias', got 3",
        table(knots=knots(3)),
    ),
    "channels of a filter": (
        ValueError,
        r"radial: expected C=16 channels \(H\*D\) for score 'filter', got 2",
        table() | {"score": "filter"},
    ),
    "knots rank": (
        ValueError,
        r"radial\.knots: expected \[P, G\+1, 2, C\], got \[9, 2, 2\]",
        table(knots=knots()[0]),
    ),
    "knots without slopes": (
        ValueError,
        r"radial\.knots: expected \[P, G\+1, 2, C\], got \[1, 9, 1, 2\]",
        table(knots=knots()[:, :, :1]),
    ),
    "one knot": (
        ValueError,
        r"radial\.knots: expected .*, got \[1, 1, 2, 2\]",
        table(knots=knots()[:, :1]),
    ),
    "knots list": (TypeError, r"radial\.knots: expected a tensor.*, got list", table(knots=[1.0])),
    "knots dtype": (
        TypeError,
        r"radial\.knots: expected float32 or float64, got torch\.bfloat16",
        table(knots=knots().bfloat16()),
    ),
    "knots device": (
        ValueError,
        r"radial(\.knots)?: expected on cpu like q, got on meta",
        table(knots=knots(device=META)),
    ),
    "r_max": (ValueError, r"radial\.r_max: expected a number > 0, got -1\.0", table(r_max=-1.0)),
    "r_max nan": (
        ValueError,
        r"radial\.r_max: expected a number > 0, got nan",
        table(r_max=float("nan")),
    ),
    "r_min": (ValueError, r"radial\.r_min: expected < r_max=5\.0, got 5\.0", table(r_min=5.0)),
    "r_min nan": (
        ValueError,
        r"radial\.r_min: expected < r_max=5\.0, got nan",
        table(r_min=float("nan")),
    ),
    "pairs without pair_index": (
        ValueError,
        r"radial\.knots: expected P=1( without a pair_index)?, got P=6",
        table(knots=knots(pairs=6)),
    ),
    "affine shape": (
        ValueError,
        r"radial\.affine: expected \[P=1, 2\], got \[3, 2\]",
        table(affine=torch.ones(3, 2)),
    ),
    "affine list": (
        TypeError,
        r"radial\.affine: expected a tensor \[P=1, 2\], got list",
        table(affine=[[1.0, 0.0]]),
    ),
    "affine device": (
        ValueError,
        r"radial\.affine: expected on cpu like q, got on meta",
        table(affine=torch.ones(1, 2, device=META)),
    ),
    "gaussians with filter": (
        ValueError,
        r"radial: expected a RadialTable for score 'filter', got a GaussianSum.*tabulate.*",
        {"radial": gaussians(16), "score": "filter"},
    ),
    "gaussians' channels": (
        ValueError,
        r"radial: expected C=2 channels \(H\) for score 'bias', got weights \[3, 4\]",
        {"radial": gaussians(3)},
    ),
    "centers rank": (
        ValueError,
        r"radial\.centers: expected \[K\], got \[1, 4\]",
        sums(centers=torch.ones(1, 4)),
    ),
    "centers list": (
        TypeError,
        r"radial\.centers: expected a tensor.*, got list",
        sums(centers=[1.0]),
    ),
    "gammas number": (
        ValueError,
        r"radial\.gammas: expected \[K=4\], got \[5\]",
        sums(gammas=torch.ones(5)),
    ),
    "gammas float": (
        TypeError,
        r"radial\.gammas: expected a tensor \[K=4\], got float",
        sums(gammas=1.0),
    ),
    "weights number": (
        ValueError,
        r"radial\.weights: expected \[C=2, K=4\], got \[2, 5\]",
        sums(weights=torch.ones(2, 5)),
    ),
    "weights list": (
        TypeError,
        r"radial\.weights: expected a tensor.*, got list",
        sums(weights=[[1.0]]),
    ),
    "weights device": (
        ValueError,
        r"radial\.weights: expected on cpu like q, got on meta",
        sums(weights=torch.ones(2, 4, device=META)),
    ),
}
TYPED_INDEX = torch.zeros(T, T, dtype=torch.int64)
WRONG_TYPES = {
    "missing": (
        ValueError,
        r"atom_types: expected integers for each atom, .*pair_index, got None",
        {},
        {"atom_types": None},
    ),
    "index shape": (
        ValueError,
        r"radial\.pair_index: expected \[T=3, T=3\], got \[3, 2\]",
        {"pair_index": TYPED_INDEX[:, :2]},
        {},
    ),
    "index without sizes": (
        ValueError,
        r"radial\.pair_index: expected \[T, T\], got \[\]",
        {"pair_index": torch.tensor(0)},
        {},
    ),
    "index list": (
        TypeError,
        r"radial\.pair_index: expected .*, got list",
        {"pair_index": [[0]]},
        {},
    ),
    "index dtype": (
        TypeError,
        r"radial\.pair_index: expected int64 or int32, got torch\.float32",
        {"pair_index": TYPED_INDEX.float()},
        {},
    ),
    "index device": (
        ValueError,
        r"radial\.pair_index: expected on cpu like q, got on meta",
        {"pair_index": TYPED_INDEX.to(META)},
        {},
    ),
    "pairs": (
        ValueError,
        r"radial\.knots: expected P=1 or P=6, got P=5",
        {"knots": knots(pairs=5)},
        {},
    ),
    "affine": (
        ValueError,
        r"radial\.affine: expected \[P=6, 2\], got \[5, 2\]",
        {"affine": torch.ones(5, 2)},
        {},
    ),
}
WRONG_PACKED = {
    "q rank": (
        ValueError,
        r"q: expected \[T, H, D\], got \[1, 100, 2, 8\]",
        {"q": torch.ones(1, 100, H, D)},
    ),
    "q list": (TypeError, r"q: expected a tensor \[T, H, D\], got list", {"q": [1.0]}),
    "k shape": (
        ValueError,
        r"k: expected \[T=100, H=2, D=8\], got \[99, 2, 8\]",
        {"k": torch.ones(99, H, D)},
    ),
    "positions": (
        ValueError,
        r"positions: expected \[T=100, 3\], got \[99, 3\]",
        {"positions": torch.ones(99, 3)},
    ),
    "atom_types": (
        ValueError,
        r"atom_types: expected \[T=100\], got \[4, 63\]",
        {"atom_types": torch.ones(B, N).long()},
    ),
    "ptr list": (TypeError, r"ptr: expected an int tensor \[B\+1\], got list", {"ptr": [0, 100]}),
    "ptr float": (
        TypeError,
        r"ptr: expected int64 or int32, got torch\.float32",
        {"ptr": torch.tensor([0.0, 100.0])},
    ),
    "ptr int16": (
        TypeError,
        r"ptr: expected int64 or int32, got torch\.int16",
        {"ptr": torch.tensor(PTR).short()},
    ),
    "ptr rank": (
        ValueError,
        r"ptr: expected \[B\+1\], got \[1, 5\]",
        {"ptr": torch.tensor(PTR)[None]},
    ),
    "ptr empty": (
        ValueError,
        r"ptr: expected \[B\+1\], got \[0\]",
        {"ptr": torch.tensor([], dtype=torch.int64)},
    ),
    "ptr device": (
        ValueError,
        r"ptr: expected on cpu like q, got on meta",
        {"ptr": torch.tensor(PTR, device=META)},
    ),
    "ptr and mask": (
        ValueError,
        r"mask: expected None with ptr .*, got .*",
        {"mask": torch.ones(B, N).bool()},
    ),
    "max_atoms float": (
        (TypeError, ValueError),
        r"max_atoms: expected an int >= 0, got 43\.0",
        {"max_atoms": 43.0},
    ),
    "max_atoms negative": (
        ValueError,
        r"max_atoms: expected an int >= 0, got -2",
        {"max_atoms": -2},
    ),
    "max_atoms text": (
        (TypeError, ValueError),
        r"max_atoms: expected an int >= 0, got '43'",
        {"max_atoms": "43"},
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_wrong_tensor_or_name_is_told(function, case):
    error, message, changes = case
    refused(function, padded(), error, message, **changes)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", WRONG_RADIAL.values(), ids=WRONG_RADIAL)
def test_wrong_radial_is_told(function, case):
    error, message, changes = case
    refused(function, padded(), error, message, **changes)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_wrong_types_are_told(function, case):
    error, message, of_table, changes = case
    refused(function, typed(**of_table), error, message, **changes)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", WRONG_PACKED.values(), ids=WRONG_PACKED)
def test_wrong_packed_argument_is_told(function, case):
    error, message, changes = case
    refused(function, packed(), error, message, **changes)


@pytest.mark.parametrize("function", [geo_attention, check_inputs])
def test_wrong_values_are_told(function):
    arguments = padded()
    refused(function, arguments, TypeError, r"v: expected .*, got NoneType", v=None)
    refused(
        function,
        arguments,
        ValueError,
        rf"v: expected {FULL}, got \[4, 63, 8, 2\]",
        v=torch.ones(B, N, D, H),
    )
    refused(
        function,
        arguments,
        TypeError,
        rf"v: expected float32 {FULL}, got torch\.float16",
        v=torch.ones(B, N, H, D).half(),
    )
    refused(
        function,
        arguments,
        ValueError,
        r"v: expected on cpu like q, got on meta",
        v=torch.ones(B, N, H, D, device=META),
    )


def test_reference_makes_the_same_checks():
    for error, message, changes in (*WRONG.values(), *WRONG_RADIAL.values()):
        if "backend" in changes or "function" in message:
            continue
        refused(geo_attention, padded() | {"backend": "reference"}, error, message, **changes)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_any_callable_passes_with_the_reference(function):
    def radial(dist):
        return torch.cos(dist)[:, None].expand(-1, H)

    result = call(function, padded() | {"radial": radial, "backend": "reference"})
    assert result is None or result.isfinite().all()


def test_wrong_result_of_a_callable_is_told():
    radial = {"radial": lambda d: torch.cos(d)[:, None].expand(-1, 3), "backend": "reference"}
    for function in (geo_attention, attention_weights):
        refused(
            function,
            padded(),
            ValueError,
            r"radial: expected \[M, C=2\] for score 'bias', got \[\d+, 3\]",
            **radial,
        )


def test_metadata_checks_read_no_values():
    # A fake tensor has none to read; a mask or ptr that is read would raise.
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        for make in (padded, packed, typed):
            arguments = make()
            del arguments["radial"], arguments["backend"]
            arguments = {
                name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
                for name, x in arguments.items()
            }
            radial = RadialTable(torch.empty(1, 9, 2, H), 0.0, 5.0)
            out = geo_attention(**arguments, radial=radial, backend="eager")
            assert out.shape == arguments["q"].shape


# Values.


def test_positions_of_real_atoms_must_be_finite():
    for garbage in (torch.nan, torch.inf, -torch.inf):
        arguments = padded()
        arguments["mask"][2, 5] = True
        arguments["positions"][2, 5, 1] = garbage
        message = r"positions: expected finite numbers for real atoms, got \[.*(nan|inf).*\] at "
        refused(check_inputs, arguments, ValueError, message + r"\[2, 5\]", mask=None)
        arguments["mask"][0, 1] = False
        arguments["positions"][0, 1] = garbage  # in a padded row, where it is no mistake
        refused(check_inputs, arguments, ValueError, message + r"\[2, 5\]")
        rows = packed()
        rows["positions"][70, 0] = garbage
        refused(check_inputs, rows, ValueError, message + r"\[70\]")


def test_garbage_in_padded_rows_is_accepted():
    arguments = typed()
    padding = ~arguments["mask"]
    for name in ("q", "k", "v", "positions"):
        arguments[name][padding] = torch.nan
    arguments["atom_types"][padding] = 10**6
    call(check_inputs, arguments)
    assert call(geo_attention, arguments).isfinite().all()


@pytest.mark.parametrize("wrong", [-1, T, 10**6])
def test_types_must_be_in_range(wrong):
    arguments = typed()
    arguments["mask"][1, 4] = True
    arguments["atom_types"][1, 4] = wrong
    refused(check_inputs, arguments, ValueError, rf"atom_types: expected 0\.\.2, got {wrong}.*")


@pytest.mark.parametrize(
    "index",
    [
        [[0, 1, 2], [1, 3, 4], [2, 4, 6]],
        [[0, 1, 2], [1, 3, 4], [2, 4, -1]],
        [[0, 1, 2], [2, 3, 4], [2, 4, 5]],
    ],
    ids=["too large", "negative", "not symmetric"],
)
def test_pair_index_must_be_symmetric_and_in_range(index):
    message = r"radial\.pair_index: expected symmetric, 0\.\.5, got .*"
    refused(check_inputs, typed(pair_index=torch.tensor(index)), ValueError, message)


@pytest.mark.parametrize(
    "ptr",
    [(0, 50, 20, 63, 100), (1, 20, 20, 63, 100), (0, 20, 20, 63, 99), (0, 20, 20, 63, 101), (0,)],
    ids=str,
)
def test_ptr_must_rise_from_zero_to_the_number_of_rows(ptr):
    got = re.escape(str(list(ptr)))
    message = rf"ptr: expected to rise from 0 to T=100, got {got}(, falling to 20 at 2)?"
    refused(check_inputs, packed(), ValueError, message, ptr=torch.tensor(ptr))


def test_fall_in_a_long_ptr_is_shown():
    ptr = torch.arange(101)
    ptr[60] = 40
    with pytest.raises(ValueError, match=r"^ptr: expected to rise .*\b40\b"):
        call(check_inputs, packed() | {"ptr": ptr})


def test_max_atoms_must_hold_the_largest_molecule():
    message = r"max_atoms: expected at least 43, .*got 42"
    refused(check_inputs, packed(), ValueError, message, max_atoms=42)
    for enough in (None, 43, 63):
        call(check_inputs, packed() | {"max_atoms": enough})


def test_empty_batches_pass():
    arguments = packed()
    empty = {name: arguments[name][:0] for name in ("q", "k", "v", "positions")}
    call(check_inputs, arguments | empty | {"ptr": torch.tensor([0])})
    call(check_inputs, arguments | empty | {"ptr": torch.tensor([0, 0, 0])})
    arguments = padded()
    names = ("q", "k", "v", "positions", "mask")
    call(check_inputs, arguments | {name: arguments[name][:0] for name in names})
    call(check_inputs, arguments | {name: arguments[name][:, :0] for name in names})


CHECKED = """
    import sys
    sys.path.insert(0, "tests")
    import torch
    from test_checks import attention_weights, call, geo_attention, packed, padded, typed
    torch.set_num_threads(1)

    def outcome(function, arguments):
        try:
            call(function, arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "fine"

    good, bad, types = padded(), padded(), typed()
    bad["positions"][0, 0] = torch.nan
    bad["mask"][0, 0] = True
    types["mask"][0, 0] = True
    types["atom_types"][0, 0] = 3
    good["positions"][~good["mask"]] = torch.nan
    for arguments in (good, bad, packed() | {"max_atoms": 42}):
        print(outcome(geo_attention, arguments))
        print(outcome(attention_weights, arguments))
    if sys.argv[1] == "1":
        print(outcome(geo_attention, types))
"""


@pytest.mark.parametrize("switch", ["1", "0"])
def test_values_are_checked_in_every_call_only_when_the_environment_says_so(switch):
    command = [sys.executable, "-c", textwrap.dedent(CHECKED), switch]
    environment = os.environ | {"GEOT_CHECK": switch, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["fine", "fine"]
    if switch == "0":
        assert not any("expected finite" in line for line in lines)
        return
    assert all(line.startswith("ValueError: positions: expected finite") for line in lines[2:4])
    assert all(line.startswith("ValueError: max_atoms: expected") for line in lines[4:6])
    assert lines[6].startswith("ValueError: atom_types: expected 0..2, got 3")


# Backends.


def test_available_backends_gives_a_reason_or_none_for_each():
    for device in (None, "cpu", "cuda", torch.device("cpu")):
        found = available_backends(device)
        assert list(found) == ["triton", "cuda", "cpu", "eager", "reference"]
        assert found["eager"] is None
        assert found["reference"] is None
        for reason in found.values():
            assert reason is None or (isinstance(reason, str) and len(reason) > 10)
    assert available_backends("cpu")["cuda"] is not None


def test_available_backends_names_an_unknown_device():
    with pytest.raises(RuntimeError, match="nonsense"):
        available_backends("nonsense")


def test_report_shows_versions_devices_and_reasons():
    command = [sys.executable, "-m", "geot_kernels"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = done.stdout
    assert f"geot-kernels {geot_kernels.__version__}" in report
    assert f"torch {torch.__version__}" in report
    assert re.search(r"^cpu", report, re.MULTILINE)
    for name, reason in available_backends("cpu").items():
        line = re.search(rf"^\s+{name} +(.*)$", report, re.MULTILINE)
        assert line is not None, name
        assert line[1] == ("can run" if reason is None else f"no: {reason}")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_backend_that_cannot_run_raises_with_the_reason(function):
    reason = available_backends("cpu")["cuda"]
    message = rf"backend: expected one that can run here, got 'cuda': {re.escape(reason)}"
    refused(function, padded(), ValueError, message, backend="cuda")


def test_no_backend_warns_once_with_the_reasons(monkeypatch):
    monkeypatch.setitem(backends.ORDER, "cpu", ("cuda",))  # which no CPU tensor can run on
    backends._warn_unfused.cache_clear()
    arguments = padded() | {"backend": None}
    with pytest.warns(UserWarning, match=r"geot_kernels.*'cpu'.*cuda: .*backend='eager'") as found:
        expected = call(geo_attention, arguments)
        call(geo_attention, arguments)
        call(attention_weights, arguments)
    assert len(found) == 1
    backends._warn_unfused.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for backend in ("eager", "reference"):
            out = call(geo_attention, arguments | {"backend": backend})
            assert (out - expected).abs().max() < 1e-5
