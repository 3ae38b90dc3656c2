"""Deployed layers of few tokens by the CUDA C++ kernels: every product of a group in one launch (csrc/cuda/decode.cu).

They are built where nvcc is and `ACIP_CUDA=1` is set at installation. Nothing takes them but who asks for them by name.
"""

from __future__ import annotations

import pathlib

import torch
from torch import Tensor

MOST_TOKENS = 16
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


def forward(
    x: Tensor,
    tensors: list[Tensor],
    spec: list[int],
    mode: int,
    *,
    launch: str = "automatic",
    splits: int = 0,
    slots: int = 0,
) -> Tensor:
    """As the reference, for bfloat16 or float16 `x [..., in]` of up to `MOST_TOKENS` tokens on a GPU.

    launch: "cooperative", one launch whose blocks wait for each other between two products; "dependent", a launch for
    each side of such a barrier, which overlap; "automatic", the first, and the second where CUDA refuses it.
    splits: parts of a first factor's columns. slots: tiles of weights that a warp has on their way. Of both, 0 lets the
    kernels choose.

    Raises `RuntimeError` for what they do not take, and where CUDA refuses.
    """
    launches = ("automatic", "cooperative", "dependent")
    if launch not in launches:
        raise ValueError(f"fused_linear: launch must be one of {', '.join(launches)}, got {launch!r}")
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 or rows.shape[1] <= 1 else rows.contiguous()
    y = operators.fused_linear(rows, tensors, spec, mode, launches.index(launch), splits, slots)
    return y.view(*x.shape[:-1], y.shape[-1])
