"""One PyTorch thread in every test: twins are compared bit by bit, and sums of two threads are other bits than sums of one."""

import torch

torch.set_num_threads(1)
