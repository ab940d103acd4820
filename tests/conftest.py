"""What all tests start from."""

import pytest
import torch

# On tensors of a few hundred numbers a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
