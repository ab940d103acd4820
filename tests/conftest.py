"""One thread: on tensors of a few hundred numbers a second one costs more than it brings."""

import torch

torch.set_num_threads(1)
