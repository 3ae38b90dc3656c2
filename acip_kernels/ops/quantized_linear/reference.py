"""The product of a frozen quantized weight in plain PyTorch: the formula and the test oracle, for any dtype."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..plain_weight import plain_weight
from ..quantize import Quantized


def forward(x: Tensor, weight: Quantized, bias: Tensor | None, group: int) -> Tensor:
    """`x Wᵀ + bias` for `x [tokens, cols]`, `W` rounded to x's dtype."""
    return F.linear(x, plain_weight(*weight, cols=x.shape[1], group=group, dtype=x.dtype), bias)


def backward(g: Tensor, weight: Quantized, cols: int, group: int) -> Tensor:
    """`∂L/∂x = g W`, `[tokens, cols]`, for `g = ∂L/∂y [tokens, rows]`."""
    return g @ plain_weight(*weight, cols=cols, group=group, dtype=g.dtype)
