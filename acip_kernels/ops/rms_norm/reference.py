"""The RMS norm in plain PyTorch: the formula and the test oracle, for any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight ⊙ x / √(mean x² + eps)`; shapes and roundings as `rms_norm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * rstd).to(x.dtype)
