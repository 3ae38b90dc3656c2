"""Deployed layers of few tokens by the CUDA C++ kernels: every product of a group in one launch (csrc/cuda/decode.cu).

They are built where nvcc is and `ACIP_CUDA=1` is set at installation. Who asks for them by name takes them, and a GPU
on which `acip tune` has measured them to be the fastest.
"""

from __future__ import annotations

import pathlib

import torch
from torch import Tensor

from ..common import CUDA_DTYPES

MOST_TOKENS = 16
LAUNCHES = ("automatic", "cooperative", "dependent")
LIBRARY = pathlib.Path(__file__).parent.parent.parent / "_cuda.so"

operators = torch.ops.acip_cuda
# Why there are no CUDA kernels; None where there are. They are loaded on a machine without a GPU too.
missing: str | None = None
if not LIBRARY.exists():
    missing = "not built: install with nvcc, ACIP_CUDA=1 in the environment, and --no-build-isolation"
else:
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:  # built, but for another torch or another machine
        missing = f"built, but not to be loaded ({error}): build them again for torch {torch.__version__}"


def takes(x: Tensor) -> bool:
    """Whether they are there, and for an `x` like this."""
    return missing is None and x.is_cuda and x.dtype in CUDA_DTYPES


def forward(
    x: Tensor,
    tensors: list[Tensor],
    spec: list[int],
    mode: int,
    *,
    launch: str = "automatic",
    splits: int = 0,
    slots: int = 0,
    bulk: bool = True,
) -> Tensor:
    """As the reference, for bfloat16 or float16 `x [..., in]` of up to `MOST_TOKENS` tokens on a GPU.

    launch: "cooperative", one launch whose blocks wait for each other between two products; "dependent", a launch for
    each side of such a barrier, which overlap; "automatic", the first, and the second where CUDA refuses it.
    splits: parts of a first factor's columns. slots: tiles of weights that a warp has on their way. Of both, 0 lets the
    kernels choose. bulk: weights come by bulk copies where a GPU has them (from sm_90 on), else by each thread's of 16
    bytes.

    Raises `RuntimeError` for what they do not take, and where CUDA refuses.
    """
    if launch not in LAUNCHES:
        raise ValueError(f"fused_linear: launch must be one of {', '.join(LAUNCHES)}, got {launch!r}")
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 or rows.shape[1] <= 1 else rows.contiguous()
    y = operators.fused_linear(rows, tensors, spec, mode, LAUNCHES.index(launch), splits, slots, bulk)
    return y.view(*x.shape[:-1], y.shape[-1])
