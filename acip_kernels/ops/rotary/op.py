"""`rotary`: the rotary position embedding of a training step, one pass forward and one backward.

torch's chain for it (halves negated and put together, two products, a sum) makes five of either. On a CPU the operator
is `csrc/bindings.cpp`'s, autograd included; on a GPU it is a Triton kernel.
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

OPERATOR = "rotary"


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x ⊙ cos + (-x₂, x₁) ⊙ sin` for the halves `x = (x₁, x₂)` of a head (Su et al., arXiv 2104.09864).

    Args:
        x: `[batch, heads, tokens, width]`, width even. cos, sin: `[batch or 1, tokens, width]`, in x's dtype.

    Returns:
        As x, in memory by tokens, as a projection makes it (`[batch, tokens, heads, width]`). Products and sum are
        taken in float32 (float64 for float64) and rounded once. Differentiable in x, once; where cos or sin wants a
        gradient, with float16 on a CPU, under `torch.compile` and without the native extension or Triton it is the
        reference, and differentiable in all respects.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit.
        RuntimeError: in the backward pass of the kernels, with `create_graph=True`.
    """
    fits = x.dim() == 4 and x.shape[-1] % 2 == 0
    for one in (cos, sin):
        fits = fits and one.dim() == 3 and one.shape[1:] == x.shape[2:] and one.shape[0] in (1, x.shape[0])
    if not fits:
        raise ValueError(
            f"{OPERATOR}: x must be [batch, heads, tokens, width] with an even width, cos and sin [batch or 1, tokens, "
            f"width], got {list(x.shape)}, {list(cos.shape)} and {list(sin.shape)}"
        )
    if not (x.dtype == cos.dtype == sin.dtype and x.device == cos.device == sin.device):
        raise ValueError(
            f"{OPERATOR}: x, cos and sin must be of one dtype and device, got {x.dtype} on {x.device}, "
            f"{cos.dtype} on {cos.device} and {sin.dtype} on {sin.device}"
        )
    learn = (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled()
    if learn or torch.compiler.is_compiling() or not takes(x):
        return reference.forward(x, cos, sin)
    return torch.ops.acip.rotary(x, cos, sin) if x.device.type == "cpu" else triton.Rotary.apply(x, cos, sin)


def takes(x: Tensor) -> bool:
    """Whether there is a kernel for such an x."""
    return extension.takes(x) or (triton is not None and common.on_gpu(x))
