"""The product of a weight in pivoted form, in plain PyTorch: the formula and the test oracle, for any dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, P: Tensor, C: Tensor, inverse: Tensor, bias: Tensor | None) -> Tensor:
    """`y [..., out]`: `y[pivots] = P x`, `y[others] = C (P x)`, and `bias`.

    `inverse` int64 `[out]`: where each output is in the list of the pivots followed by the others.
    """
    z = F.linear(x, P)
    return place(z, F.linear(z, C), inverse, bias)


def place(z: Tensor, others: Tensor, inverse: Tensor, bias: Tensor | None) -> Tensor:
    """The outputs of the pivots, `z [..., ρ]`, and `others [..., out - ρ]`, in their order, and the bias."""
    y = torch.cat([z, others], dim=-1).index_select(-1, inverse)
    return y if bias is None else y + bias
