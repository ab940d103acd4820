"""What the Triton kernels, interpreted, lose to rounding where a table is in rows."""

from __future__ import annotations

import pytest
import torch
from fused import triton_module as module
from passes import over_budget, typical_errors
from test_fused_accuracy import draws

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("normalizer", ["softmax", "linear"])
def test_tiles_and_rows_stay_within_twice_the_error_of_the_reference(
    normalizer, dtype, monkeypatch
):
    monkeypatch.setattr(module("launch"), "_PAIRS_FOR_ROWS", 0)
    cases = draws("bias", normalizer, "table", dtype=dtype, sizes=(70,), heads=1)
    assert not over_budget(typical_errors(cases, "triton"))
