"""`rms_norm`: the norm of a training step on a CPU with a frozen weight, one pass forward and one backward.

The operator is `csrc/bindings.cpp`'s, autograd included: at a model's width a norm takes a fraction of a millisecond,
of which a Python autograd function would be a good part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension
from . import reference

OPERATOR = "rms_norm"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight ⊙ x / √(mean x² + eps)`, the mean over the last dimension (Zhang & Sennrich, arXiv 1910.07467).

    Args:
        x: `[..., width]`. weight: `[width]`, in x's dtype.

    Returns:
        As x, contiguous. The mean and the root are taken in float32 (float64 for float64); the normalised x is rounded
        to x's dtype before it is multiplied, as transformers' llama does it. Differentiable in x, once; where weight
        wants a gradient, with float16, on a GPU, under `torch.compile` and without the native extension it is the
        reference, and differentiable in all respects.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit.
        RuntimeError: in the backward pass of the native operator, with `create_graph=True`.
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
    if learns or torch.compiler.is_compiling() or not extension.takes(x):
        return reference.forward(x, weight, eps)
    return torch.ops.acip.rms_norm(x, weight, eps)
