"""One PyTorch thread in every test: twins are compared bit by bit, and two threads add up in another order."""

import torch

torch.set_num_threads(1)
