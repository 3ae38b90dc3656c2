"""`gated_silu`: the activation of a gated MLP in a training step, one pass forward and one backward.

On a CPU the operator is `csrc/bindings.cpp`'s, autograd included, as `rms_norm`'s; on a GPU it is two Triton kernels.
It keeps `gate` and `up` alone.
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

OPERATOR = "gated_silu"


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) ⊙ up` with `silu(v) = v / (1 + e⁻ᵛ)` (SwiGLU's activation: Shazeer, arXiv 2002.05202).

    Args:
        gate, up: of one shape, any, and one dtype.

    Returns:
        As gate, contiguous; computed in float32 (float64 for float64) and rounded once. Differentiable in both, once;
        with float16 on a CPU, under `torch.compile` and without the native extension or Triton it is the reference,
        and differentiable as often as wanted.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit.
        RuntimeError: in the backward pass of the kernels, with `create_graph=True`.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            f"{OPERATOR}: gate and up must be of one shape, dtype and device, got {list(gate.shape)}, {gate.dtype} "
            f"on {gate.device} and {list(up.shape)}, {up.dtype} on {up.device}"
        )
    if torch.compiler.is_compiling() or not takes(gate):
        return reference.forward(gate, up)
    return torch.ops.acip.gated_silu(gate, up) if gate.device.type == "cpu" else triton.GatedSilu.apply(gate, up)


def takes(x: Tensor) -> bool:
    """Whether there is a kernel for such numbers."""
    return extension.takes(x) or (triton is not None and common.on_gpu(x))
