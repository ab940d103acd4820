"""What all tests start from."""

import pytest
import torch

# On tensors of a few hundred numbers a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets the number of threads; restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def instruction_set():
    """Chooses the kernels' instruction set, 0 the oldest; skips where it cannot run."""
    best = torch.ops.geot_cpu.set_isa(-1)

    def choose(isa: int) -> None:
        if torch.ops.geot_cpu.set_isa(isa) != isa:
            pytest.skip("this processor has no such instructions")

    yield choose
    torch.ops.geot_cpu.set_isa(best)
