"""One thread: on tensors of a few hundred numbers a second one only costs, on busy machines most."""

import torch

torch.set_num_threads(1)
