"""The README's code runs, in order, as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.filterwarnings("ignore:geot_kernels. no fused kernel")
def test_every_python_block_runs_and_gives_the_shapes_it_names(capsys):
    torch.manual_seed(0)
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
        for name, shape in re.findall(r"^(\w+)(?:, _)? = .*# \[([\d, ]+)\]", block, re.MULTILINE):
            assert list(names[name].shape) == [int(n) for n in shape.split(",")], name
    assert "knots" in capsys.readouterr().out
    assert all(p.grad is not None for p in names["layer"].parameters())


def test_every_file_that_the_readme_links_is_there():
    text = (ROOT / "README.md").read_text()
    linked = re.findall(r"\]\((?!https?:|#)([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    named = re.findall(r"`((?:geot_kernels|tests|docs)/[\w./]+)`", text)
    assert linked
    assert [path for path in linked + named if not (ROOT / path).exists()] == []
