"""Reports say what rows say: fair ratios, their noise, why something is missing, growth."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from bench import demo, engine, ratios, report
from bench.ratios import Notes, Ratio
from bench.rows import COLUMNS, Rows
from bench.ways import MEASURED

ROOT = Path(__file__).parents[1]
SAME = {
    **{"case": "case", "pass": "forward", "dtype": "float32", "mode": "eager"},
    **{"molecules": "8", "atoms": "128", "heads": "8", "head_dim": "32", "gaussians": "64"},
    **{"backend": "cpu", "device": "CPU, 2 cores", "threads": "2", "processor": "a processor"},
    **{"torch": "2.13.0", "geot_kernels": "0.1.0", "commit": "abc1234"},
}
SPEEDS = [
    {**SAME, "measure": "copy", "dtype": "", "value": "20"},  # GB/s
    {**SAME, "measure": "matrix product", "dtype": "float32", "value": "0.1"},  # TFLOP/s
]


def row(function: str, ms: float | None = None, spread: float = 0.01, **other: str):
    """A row; quartiles lie `spread` of the median from it."""
    found = {**SAME, "function": function}
    if ms is not None:
        names = ("lower_quartile_ms", "median_ms", "upper_quartile_ms")
        shown = (f"{ms * (1 + side * spread):.6g}" for side in (-1, 0, 1))
        found |= dict(zip(names, shown, strict=True))
    return {**dict.fromkeys(COLUMNS, ""), **found, **other}


def layer(**other: str):
    """Rows of one setting: ours, the floor and the usual way."""
    times = {
        **{"ours": 1.0, "ours with table": 2.0, "plain": 4.0, "eager": 30.0, "eager MATH": 60.0},
        **{"compiled eager": 20.0, "FlexAttention, table": 9.0, "SDPA, bias given": 1.5},
    }
    passes = enumerate(MEASURED, 1)
    return [
        row(function, n * ms, **{"pass": name, **other})
        for n, name in passes
        for function, ms in times.items()
    ]


def growing(function: str, power: float, axis: str = "atoms", **other: str):
    sizes = (128, 256, 512, 1024, 2048, 4096)
    return [
        row(function, 1e-5 * n**power, **{axis: str(n), "extra_memory_mb": f"{n / 64}", **other})
        for n in sizes
    ]


def device(folder: Path, **files):
    """A folder with rows."""
    for name, rows in files.items():
        Rows(folder / f"{name.replace('_', '-')}.csv").add(rows)
    return ratios.read(folder)


def full(folder: Path):
    """A folder with rows for every table and plot."""
    steps = {"case": "GeoT published", "pass": "training step"}
    return device(
        folder,
        geot_qm9=layer(case="geot-qm9"),
        drug_like=layer(case="drug-like"),
        grid=layer(case="grid-8x128"),
        scaling_n=[*growing("ours", 2), *growing("eager", 2.5)],
        scaling_b=growing("ours", 1, "molecules"),
        models=[row("ours", 10, **steps), row("original attention", 25, **steps)],
    )


def line(table: str, start: str) -> str:
    return next(text for text in table.splitlines() if text.startswith(f"| {start} |"))


def test_each_peer_is_compared_with_what_does_its_work():
    table = report.case_table(layer(), [])
    assert line(table, "ours") == "| ours | 1.00 ms | 2.00 ms | 3.00 ms |"
    assert line(table, "plain").startswith("| plain | 4.00 ms · 4.0× |")
    assert line(table, "eager").startswith("| eager | 30.0 ms · 15× |")
    assert "| forward | forward+backward | force step |" in table


def test_nothing_is_compared_across_settings():
    rows = [row("ours", 1.0, threads="1"), row("plain", 4.0)]
    assert line(report.case_table(rows[1:], []), "plain") == "| plain | 4.00 ms |"
    lines = report.headline(ratios.Device(ROOT, {"case": rows}))
    assert line(lines, "case, 1 threads") != line(lines, "case, 2 threads")


def test_a_ratio_within_the_noise_says_so():
    assert ratios.ratio(row("a", 2.0), row("b", 1.0)).value == 2
    apart = ratios.ratio(row("a", 1.1, 0.01), row("b", 1.0, 0.01))
    within = ratios.ratio(row("a", 1.1, 0.05), row("b", 1.0, 0.06))
    assert str(apart) == "1.1×"
    assert str(within) == "≈ 1 (0.99 to 1.23)"
    assert within.low == pytest.approx(1.045 / 1.06) and within.high == pytest.approx(1.155 / 0.94)
    assert str(Ratio(1.5, 1.0, 2.0)) == "≈ 1 (1.00 to 2.00)"
    assert str(Ratio(1.03, 1.02, 1.04)) == "1.03×"
    assert ratios.ratio(row("a", 1.0), row("b")) is None
    assert ratios.ratio(row("a", 1.0), None) is None


def test_what_could_not_run_has_its_reason_below():
    reasons = {"plain": "no | CPU\nhere", "cuEquivariance": "not installed"}
    reasons["jvp_flash_attention"] = "no | CPU here"
    rows = [row("ours", 1.0), *(row(name, reason=why) for name, why in reasons.items())]
    table = report.case_table([*rows, row("eager", 9.0, **{"pass": "backward"})], [])
    assert line(table, "plain") == "| plain | –<sup>1</sup> |  |"
    assert line(table, "cuEquivariance") == "| cuEquivariance | –<sup>2</sup> |  |"
    assert line(table, "jvp_flash_attention") == "| jvp_flash_attention | –<sup>1</sup> |  |"
    assert table.endswith("\n\n<sup>1</sup> no | CPU here; <sup>2</sup> not installed")


def test_memory_stands_in_a_table_of_its_own():
    rows = [row("ours", 1.0, extra_memory_mb="0.5"), row("plain", 1.0), row("eager", 9.0)]
    rows[2]["extra_memory_mb"] = "1234.5"
    memory = report.case_table(rows, []).split("\n\n")[1]
    assert line(memory, "ours") == "| ours | 0.500 |"
    assert line(memory, "eager") == "| eager | 1234 |"
    assert "plain" not in memory


@pytest.mark.parametrize(
    ("traffic", "gflop", "share"),
    [
        ("20", "0.01", "50 % of the roofline (memory)"),
        ("2", "0.03", "15 % of the roofline (compute)"),
    ],
)
def test_ours_is_held_against_the_roofline(traffic, gflop, share):
    needs = {"least_traffic_mb": traffic, "gflop": gflop}
    unit = {name: row(name, 2.0, **needs) for name in ("ours", "plain")}
    assert report.cell(unit, "ours", SPEEDS, Notes()) == f"2.00 ms · {share}"
    assert "roofline" not in report.cell(unit, "plain", SPEEDS, Notes())
    assert "roofline" not in report.cell(unit, "ours", SPEEDS[:1], Notes())
    unit["ours"]["dtype"] = "bfloat16"
    assert "roofline" not in report.cell(unit, "ours", SPEEDS, Notes())


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 2.0])
def test_exponents_of_power_laws_are_exact(power):
    xs = [128.0, 512.0, 1000.0, 8192.0]
    assert ratios.exponent(xs, [3 * x**power for x in xs]) == pytest.approx(power, abs=1e-12)


def test_exponents_are_those_of_the_largest_sizes(tmp_path):
    rows = growing("ours", 2)
    for small in rows[:2]:  # what a call costs
        small["median_ms"] = "5"
    failed = row("eager", reason="out of memory", atoms="8192")
    found = device(tmp_path, scaling_n=[*rows[::-1], *growing("eager", 1.5), failed])
    table = report.scaling(found)
    assert (
        line(table, "ours, forward")
        == "| ours, forward | N^2.00 | N^1.00 | 4096 | 168 ms | 64.0 MB |"
    )
    assert "| N^1.50 | N^1.00 | 4096<sup>1</sup> |" in line(table, "eager, forward")
    assert "<sup>1</sup> N = 8192: out of memory" in table


def test_grid_and_headline_show_each_pass(tmp_path):
    found = full(tmp_path)
    assert line(report.grid(found), "8 × 128") == "| 8 × 128 | 0.25× | 0.50× | 10× | 15× |"
    lines = report.headline(found).splitlines()
    assert lines[2].startswith("| geot-qm9 | 1.00 / 4.00 / 6.00 | 0.25× / 0.50× / 0.50× |")
    assert "9.0×<sup>1</sup>" in lines[2] and "| 15× / 15× / 15× |" in lines[2]
    assert "<sup>1</sup> FlexAttention, table" in lines[-1]


def test_models_are_compared_with_their_own_attention(tmp_path):
    table = report.models(full(tmp_path))
    assert "| GeoT published, training step | 10.0 ms | 25.0 ms · 2.5× |" in table


def test_captions_name_every_commit_and_the_noise():
    rows = [row("a", 1.0), row("b", 1.0, commit="def5678-dirty", other_cores="0.12")]
    quiet = "CPU, 2 cores; a processor; 2 threads; torch 2.13.0; geot_kernels 0.1.0; "
    assert ratios.caption(rows) == quiet + "commit abc1234, def5678-dirty"
    rows[0]["other_cores"] = "0.31"
    assert ratios.caption(rows).endswith("; other processes were running")


def test_files_with_other_columns_are_left_out(tmp_path, capsys):
    folder = tmp_path / "cpu"
    device(folder, geot_qm9=layer())
    (folder / "calls.csv").write_text("call,min_us\nforward,1\n")
    (folder / "machine.csv").write_text("measure,dtype,value,unit\ncopy,,20,GB/s\n")
    (tmp_path / "empty").mkdir()
    report.main([], tmp_path)
    printed = capsys.readouterr()
    assert "calls.csv has other columns" in printed.err
    assert [found.folder.name for found in ratios.devices(tmp_path)] == ["cpu"]
    assert (folder / "report.md").read_text() in printed.out


def test_quick_runs_have_reports_of_their_own(tmp_path, capsys):
    device(tmp_path / "cpu" / "quick", geot_qm9=layer())
    report.main(["--device", "cpu", "--quick"], tmp_path)
    assert "# cpu, quick runs" in capsys.readouterr().out
    assert (tmp_path / "cpu" / "quick" / "report.md").exists()
    assert report.blocks(tmp_path)["headline"] == report.NOTHING


def test_readme_is_filled_and_known_to_be_stale(tmp_path):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    full(results / "cpu")
    names = list(report.BLOCKS)
    parts = [f"<!-- bench:{name} -->\nold\n<!-- /bench:{name} -->" for name in names]
    readme.write_text("before\n" + "\nbetween\n".join(parts) + "\nafter\n")
    assert report.stale(readme.read_text(), results) == names
    report.main(["--readme"], results, readme)
    text = readme.read_text()
    assert report.stale(text, results) == [] and "old" not in text
    assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n")
    assert text.count("between") == len(names) - 1
    report.main(["--readme"], results, readme)
    assert readme.read_text() == text
    device(results / "cpu", grid=[row("ours", 2.0, case="grid-8x128")])
    assert report.stale(text, results) == ["grid"]


@pytest.mark.parametrize("text", ["<!-- bench:grid -->", "<!-- bench:x --><!-- /bench:x -->"])
def test_a_marker_that_cannot_be_filled_is_refused(tmp_path, text):
    assert len(report.stale(text, tmp_path)) == 1
    with pytest.raises(ValueError, match="bench:"):
        report.filled(text, report.blocks(tmp_path))


def test_the_best_peer_is_not_claimed_where_another_was_not_tried(tmp_path):
    rows = [row("ours", 1.0), row("ours with table", 2.0), row("eager", 9.0)]
    late = [row("compiled eager", reason=engine.QUICK), row("FlexAttention, table", reason="no")]
    text = report.headline(ratios.Device(tmp_path, {"case": [*rows, *late]}))
    assert text.endswith("<sup>1</sup> eager, without compiled eager")
    math = row("eager MATH", 8.0)
    text = report.headline(ratios.Device(tmp_path, {"case": [*rows, math]}))
    assert "| 4.0× / – / – |" in text and text.endswith("<sup>1</sup> eager MATH")


def test_what_the_demo_ends_with_is_told(tmp_path):
    errors = {"mae_geot": "0.1876", "mae_linear": "0.3591", "mae_mean": "0.3877"}
    line = {"target": "homo", "unit": "eV", "seconds": "61", "device": "CPU, 2 cores", **errors}
    folder = tmp_path / "cpu"
    Rows(folder / "demo.csv", demo.COLUMNS, demo.COLUMNS[:1]).add([line])
    Rows(folder / "grid.csv").add(layer(case="grid-8x128"))
    text = report.blocks(tmp_path)["demo"]
    assert text.startswith("CPU, 2 cores:\n\nAfter 61 s:")
    assert text.endswith("| homo, eV | 0.188 | 0.359 | 0.388 |")


def test_readme_says_what_the_rows_say():
    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"<!-- bench:([\w-]+) -->", text)) == set(report.BLOCKS)
    assert report.stale(text) == []


def test_plots_are_drawn_and_shown(tmp_path):
    pytest.importorskip("matplotlib")
    found = full(tmp_path)
    text = report.write(found)
    for name in ("cases", "scaling-n", "scaling-b", "models"):
        assert f"![{name}](plots/{name}.png)" in text
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_plots_of_what_is_there_alone(tmp_path):
    plots = pytest.importorskip("bench.plots", exc_type=ImportError)
    only = device(tmp_path, geot_qm9=[row("ours", 1.0)], models=[row("ours", reason="none")])
    assert plots.write(only) == []
    functions = {*ratios.FUNCTIONS, "something new"}
    looks = {tuple(plots.style(function).values()) for function in functions}
    assert len(looks) == len(functions)


def test_without_matplotlib_there_are_tables(tmp_path, monkeypatch, capsys):
    found = full(tmp_path)
    monkeypatch.delitem(sys.modules, "bench.plots", raising=False)
    monkeypatch.delattr("bench.plots", raising=False)
    for name in ["matplotlib", *(n for n in sys.modules if n.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    assert ".png" not in report.write(found)
    assert "plots are left out" in capsys.readouterr().err
