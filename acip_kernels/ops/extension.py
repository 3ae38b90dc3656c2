"""The native extension: whether it is there, and what it takes. Importing it registers its operators with torch."""

from __future__ import annotations

import importlib.util
import logging
import pathlib
import re
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("acip_kernels")

DTYPES = (torch.float32, torch.float64, torch.bfloat16)

# Why there are no native kernels; None where there are.
missing: str | None = None
module: Any = None


def _load() -> Any:
    """The extension, or None if it is not there. Raises `ImportError` if it is of another torch or another machine."""
    spec = importlib.util.find_spec(".._native", __package__)
    if spec is None or spec.origin is None:
        return None
    # torch's C++ interface changes between minor versions: what still loads might not do what it did.
    built = re.search(rb"acip_kernels for torch (\d+\.\d+)", pathlib.Path(spec.origin).read_bytes())
    if built and not torch.__version__.startswith(f"{built[1].decode()}."):
        raise ImportError(f"it is of torch {built[1].decode()}")
    return importlib.import_module(".._native", __package__)


try:
    module = _load()
    if module is None:
        missing = "not built: install with a C++ compiler and --no-build-isolation"
except ImportError as error:
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
