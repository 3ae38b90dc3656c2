"""The native extension: whether it is there, and what it takes. Importing it registers its operators with torch."""

from __future__ import annotations

import importlib
import logging

import torch
from torch import Tensor

log = logging.getLogger("acip_kernels")

DTYPES = (torch.float32, torch.float64, torch.bfloat16)

# Why there are no native kernels; None where there are.
missing: str | None = None
try:
    # Not `from .. import`, by which what is not there and what cannot be loaded are the same error.
    module = importlib.import_module(".._native", __package__)
except ModuleNotFoundError:
    module = None
    missing = "not built: install with a C++ compiler and --no-build-isolation"
except ImportError as error:  # built, but for another torch or another machine
    module = None
    missing = f"built, but not to be loaded ({error}): build it again for torch {torch.__version__}"
    # Who installed them expects them, and would not look why everything is slow.
    log.warning("acip_kernels: plain PyTorch runs instead of the native kernels, which are %s", missing)


def available() -> bool:
    return module is not None


def takes(x: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> bool:
    """Whether the native kernels run on `x`, given their `dtypes`: of the training step's, unless told."""
    return module is not None and x.device.type == "cpu" and x.dtype in dtypes


def instruction_set() -> str | None:
    """What the native kernels run with here: "avx512_bf16", "avx512", "avx2" or "portable"; None without them."""
    return module.isa() if module is not None else None
