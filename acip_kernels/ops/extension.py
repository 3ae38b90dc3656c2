"""The native extension: whether it is built, and what it takes. Importing it registers its operators with torch."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16)

try:
    from .. import _native as module
except ImportError:  # not built: no compiler, or installed in a build without torch
    module = None


def available() -> bool:
    return module is not None


def takes(x: Tensor) -> bool:
    """Whether the native kernels run on `x`."""
    return module is not None and x.device.type == "cpu" and x.dtype in DTYPES


def instruction_set() -> str | None:
    """The instruction set that the native kernels run with here ("avx512", "avx2", "portable"); None without them."""
    return module.isa() if module is not None else None
