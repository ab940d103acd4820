"""What all tests start from."""

import host_cuda
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


@pytest.fixture
def nan_in_new_memory():
    """Fills with NaN what PyTorch allocates and does not initialize."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def emulated():
    """Lets backend="cuda" run on the CPU; skips where there is no compiler."""
    with host_cuda.emulated():
        yield


@pytest.fixture(params=[pytest.param("triton", marks=pytest.mark.interpreted), "cuda"])
def backend(request):
    """Triton's kernels, interpreted, in a process of their own; CUDA's, emulated, in this one."""
    if request.param == "cuda":
        request.getfixturevalue("emulated")
    return request.param


def pytest_terminal_summary(terminalreporter):
    """Shows the tables that tests marked `shown` have printed."""
    passed = terminalreporter.stats.get("passed", [])
    for report in sorted(passed, key=lambda report: report.nodeid):
        if report.when == "call" and "shown" in report.keywords and report.capstdout:
            terminalreporter.section(report.nodeid)
            terminalreporter.write(report.capstdout)
