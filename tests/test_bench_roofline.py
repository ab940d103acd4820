"""What a pass must move and compute, counted by hand, and what a machine is found to give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import roofline, rows
from bench.ways import PASSES

SIZES: dict[str, Any] = {"pairs": 7**2, "atoms": 7, "heads": 1, "head_dim": 16, "score": "bias"}
SIZES |= {"table_bytes": 1000, "dtype": torch.float32}


def cost(name: str, **others: Any) -> roofline.Cost:
    return roofline.cost(name, **{**SIZES, **others})


def test_forward_of_one_head_is_what_a_hand_counts():
    products = 2 * 16 + 2 * 16  # q·k, P v
    distance = (8 + 10) / 2  # f and the distance, which two pairs share
    least = cost("forward")
    assert least.operations == 49 * (products + 5 + distance)
    features = 4 * 7 * 16 * 4  # q, k, v, O
    assert least.least_traffic_bytes == features + 7 * 4 + 7 * 3 * 4 + 1000


def test_forward_of_a_filter_is_what_a_hand_counts():
    least = cost("forward", score="filter")
    products = 3 * 16 + 2 * 16  # q f k, P v
    assert least.operations == 49 * (products + 16 * 8 / 2 + 10 / 2)
    assert least.least_traffic_bytes == 4 * 7 * 16 * 4 + 7 * 3 * 4 + 1000  # no row statistics


def test_a_backward_pass_adds_five_products_to_two_and_its_tensors():
    forward, both = cost("forward"), cost("backward+table")
    radial = 8 + 8 + 2 + 8  # f, f', its sum over heads, the table's gradient
    pair = 5 * 2 * 16 + 5 + (radial + 10 + 10) / 2
    assert both.operations - forward.operations == 49 * pair
    features, row, positions = 8 * 7 * 16 * 4, 7 * 4, 2 * 7 * 3 * 4
    added = both.least_traffic_bytes - forward.least_traffic_bytes
    assert added == features + row + positions + 2 * 1000


def test_the_second_backward_of_a_filter_has_two_products_for_values_and_no_row_numbers():
    step, both = (cost(n, score="filter") for n in ("force_step", "backward+table"))
    # A and grad v 2+2; k f̃, S 1+2; sums to q and k 1+2+2; g̃ 1, added 1; f' 8, f̃ 1, sum 9
    pair = 16 * (4 + 3 + 5 + 2) + 16 * (8 + 1 + 9) / 2 + (10 + 8) / 2
    assert step.operations - both.operations == 49 * pair
    added = step.least_traffic_bytes - both.least_traffic_bytes
    assert added == 7 * 7 * 16 * 4 + 2 * 7 * 3 * 4 + 2 * 1000  # q k v dO, dq dk dv; x ẋ; f, df


def test_the_second_backward_of_a_bias_computes_its_scores_twice():
    step, both = (cost(name, pairs=98) for name in ("force_step", "backward+table"))
    sweep = 2 * 16 + 2 * 16  # S, A
    rest = 3 * 2 * 16 + 8 + 13  # sums to q, k, v; what both sweeps do with P, Ṡ, A
    radial = 2 * (8 + 8) + 8 + 9 + 2  # f, f' in both; the table's gradient, of both directions
    assert step.operations - both.operations == 98 * (2 * sweep + rest + (radial + 2 * 18) / 2)
    added = step.least_traffic_bytes - both.least_traffic_bytes
    assert added == 8 * 7 * 16 * 4 + 7 * 4 + 2 * 7 * 3 * 4 + 2 * 1000


def test_heads_share_the_geometry_of_a_pair_and_nothing_else():
    for score, radial in (("bias", 8), ("filter", 16 * 8)):
        one, three = cost("forward", score=score), cost("forward", score=score, heads=3)
        geometry = 49 * 10 / 2
        assert three.operations - geometry == 3 * (one.operations - geometry)
        assert one.operations > 49 * radial / 2


@pytest.mark.parametrize("score", ["bias", "filter"])
def test_what_a_pass_does_not_need_is_not_counted(score):
    backward, table = cost("backward", score=score), cost("backward+table", score=score)
    training = cost("training", score=score)
    channels = 1 if score == "bias" else 16
    assert table.least_traffic_bytes - backward.least_traffic_bytes == 1000
    assert 2 * (table.operations - backward.operations) == 49 * channels * 8
    assert table.least_traffic_bytes - training.least_traffic_bytes == 7 * 3 * 4
    assert training.operations < table.operations


@pytest.mark.parametrize("score", ["bias", "filter"])
def test_costs_grow_as_their_sizes_do(score):
    for name in PASSES:
        one = cost(name, score=score, table_bytes=0, pairs=64)
        two = cost(name, score=score, table_bytes=0, pairs=2 * 64, atoms=14)
        assert two == replace(
            one,
            operations=2 * one.operations,
            least_traffic_bytes=2 * one.least_traffic_bytes,
        )
        narrow = cost(name, score=score, dtype=torch.bfloat16)
        wide = cost(name, score=score)
        assert narrow.operations == wide.operations
        assert 0.5 < narrow.least_traffic_bytes / wide.least_traffic_bytes < 0.9


def test_a_machine_is_measured_into_rows(tmp_path, monkeypatch):
    monkeypatch.setitem(roofline.COPIED, "cpu", (1 << 24, 1 << 22))
    monkeypatch.setitem(roofline.MATRIX, "cpu", (512, 256))
    path = tmp_path / "machine.csv"
    written = rows.Rows(path, roofline.MACHINE_COLUMNS, roofline.MACHINE_KEY)
    for _ in range(2):
        written.add(roofline.machine("cpu", quick=True, dtypes=("float32", "float64")))
    names = [(row["measure"], row["dtype"], row["unit"]) for row in written.rows]
    products = [("matrix product", dtype, "TFLOP/s") for dtype in ("float32", "float64")]
    assert names == [("copy", "float32", "GB/s"), *products]
    for row in written.rows:
        low, value, high = (float(row[n]) for n in ("lower_quartile", "value", "upper_quartile"))
        assert 0 < low <= value <= high
        assert row["device"] and row["torch"]


def test_a_product_and_a_copy_do_as_much_as_they_count(monkeypatch):
    slow = {"": [2e6, 1e6, 4e6]}  # us
    monkeypatch.setattr(roofline.timing, "interleaved", lambda *_, **__: slow)
    monkeypatch.setitem(roofline.COPIED, "cpu", (8000, 4000))
    monkeypatch.setitem(roofline.MATRIX, "cpu", (100, 10))
    copy, product = roofline.machine("cpu", dtypes=("float32",))
    assert float(copy["value"]) == 2 * 8000 / 1e9 / 2
    assert float(product["value"]) == 2 * 100**3 / 1e12 / 2
    assert float(product["lower_quartile"]) == pytest.approx(2e6 / 1e12 / 3, rel=0.2)
