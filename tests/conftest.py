"""One thread a process: the tests run in parallel, and teams of threads that wait for each other are far slower."""

import os

import torch

torch.set_num_threads(1)

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
