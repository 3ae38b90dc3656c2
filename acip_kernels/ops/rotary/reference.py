"""Rotary position embedding in plain PyTorch: the formula and the test oracle, for any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x ⊙ cos + (-x₂, x₁) ⊙ sin` for the halves `x = (x₁, x₂)`; shapes as `rotary`."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]
