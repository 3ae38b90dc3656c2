"""`rms_norm`: the norm of a training step with a frozen weight, one pass forward and one backward.

On a CPU the operator is `csrc/bindings.cpp`'s, autograd included: at a model's width a norm takes a fraction of a
millisecond, of which a Python autograd function would be a good part. On a GPU it is two Triton kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import common, extension
from . import reference

try:
    from . import triton
except ImportError:  # a machine without Triton
    triton = None  # type: ignore[assignment]

OPERATOR = "rms_norm"
# A row is in a program's registers: at most 64 numbers a thread.
WIDEST = 1 << 15


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight ⊙ x / √(mean x² + eps)`, the mean over the last dimension (Zhang & Sennrich, arXiv 1910.07467).

    Args:
        x: `[..., width]`. weight: `[width]`, in x's dtype.

    Returns:
        As x, contiguous. The mean and the root are taken in float32 (float64 for float64); the normalised x is rounded
        to x's dtype before it is multiplied, as transformers' llama does it. Differentiable in x, once; where weight
        wants a gradient, with float16 on a CPU, under `torch.compile` and without the native extension or Triton it is
        the reference, and differentiable in all respects.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit.
        RuntimeError: in the backward pass of the kernels, with `create_graph=True`.
    """
    if weight.dim() != 1 or x.dim() == 0 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"{OPERATOR}: x must be [..., width] and weight [width], got {list(x.shape)} and {list(weight.shape)}"
        )
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(
            f"{OPERATOR}: x and weight must be of one dtype and device, got {x.dtype} on {x.device} "
            f"and {weight.dtype} on {weight.device}"
        )
    learns = weight.requires_grad and torch.is_grad_enabled()
    if learns or torch.compiler.is_compiling() or not takes(x):
        return reference.forward(x, weight, eps)
    return torch.ops.acip.rms_norm(x, weight, eps) if x.device.type == "cpu" else triton.RmsNorm.apply(x, weight, eps)


def takes(x: Tensor) -> bool:
    """Whether there is a kernel for such an x."""
    return extension.takes(x) or (triton is not None and common.on_gpu(x) and x.shape[-1] <= WIDEST)
