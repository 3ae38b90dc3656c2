"""One thread a process: the tests run in parallel, and teams of threads that wait for each other are far slower."""

import torch

torch.set_num_threads(1)
