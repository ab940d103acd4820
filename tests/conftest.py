"""One thread: on tensors of a few hundred numbers a second one only costs, most on busy machines."""

import torch

torch.set_num_threads(1)
