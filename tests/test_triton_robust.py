"""The Triton kernels, interpreted, where things get rough for some form of a table."""

from __future__ import annotations

import pytest
import torch
from cases import make_case
from fused import triton_module as module
from passes import passes
from test_cpu_robust import assert_same_bits
from test_fused_robust import HOLED

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize(
    "variant", [v for v in HOLED if v[0] == "bias" and "g" not in v[2]], ids=" ".join
)
def test_everything_is_written_with_rows_and_repeats_bit_for_bit(
    variant, nan_in_new_memory, monkeypatch
):
    monkeypatch.setattr(module("launch"), "_PAIRS_FOR_ROWS", 0)
    shape = {"sizes": (5, 0, 2), "heads": 1, "channels": 2, "dtype": torch.float32}
    case = make_case(*variant, "packed", **shape)
    first = passes(case, "triton")
    assert all(bool(x.isfinite().all()) for x in first.values())
    assert_same_bits(passes(case, "triton"), first)


@pytest.mark.parametrize("form", ["rows", "words"])
def test_nan_in_a_position_shows_whatever_the_form_of_the_table(form, monkeypatch):
    monkeypatch.setattr(module("launch"), "_PAIRS_FOR_ROWS", 0)
    monkeypatch.setattr(module("launch"), "_ATOMS_FOR_WORDS", 0)
    dtype = torch.float16 if form == "words" else torch.float32
    case = make_case("bias", "softmax", layout="full", sizes=(5, 4), dtype=dtype)
    case.tensors = {
        n: x.detach() if n in "qkv" else x.detach().float() for n, x in case.tensors.items()
    }
    case.tensors["positions"][0, 2, 1] = torch.nan
    if form == "rows":
        case.tensors["q"].requires_grad_()
    out = case.attention(backend="triton")
    assert bool(out[0].isnan().all()) and bool(out[1:].isfinite().all())
