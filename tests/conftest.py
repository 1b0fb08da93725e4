"""One thread per test process: small tensors run faster so, and results do not vary with cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
