"""The masked SVD product of an ACIP run in plain PyTorch: the formula and the test oracle, for any dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..lowrank_linear.reference import scale_ranks


def live_singular_values(S: Tensor, mask: Tensor) -> Tensor:
    """`S ⊙ β`, with `β_i = 1` where `mask_i > 0` and 0 elsewhere."""
    return torch.where(mask > 0, S, torch.zeros_like(S))


def forward(
    x: Tensor, Vh: Tensor, U: Tensor, S: Tensor, mask: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`y [..., out] = ((x Vhᵀ) ⊙ S ⊙ β) Uᵀ + bias`, and `z = x Vhᵀ [..., rank]`, which the backward pass needs."""
    z = F.linear(x, Vh)
    return F.linear(scale_ranks(z, live_singular_values(S, mask)), U, bias), z


def backward(
    g: Tensor, z: Tensor, Vh: Tensor, U: Tensor, S: Tensor, mask: Tensor, mask_scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients for `x` and `mask` at `g = ∂L/∂y [..., out]` (ACIP.md section 1), with `h = g U`.

    `∂L/∂x = (h ⊙ S ⊙ β) Vh`; `∂L/∂mask_i = 1[mask_i > 0] · (1/mask_scale) · S_i · Σ_tokens z_i h_i`.
    The factors are frozen and have no gradient; a pruned entry's is exactly zero.
    """
    s = live_singular_values(S, mask)
    h = g @ U
    dx = scale_ranks(h, s) @ Vh
    # Not an einsum: its inner loop would sum in the factors' dtype, and this sum runs over every token of the batch.
    products = z.to(s.dtype) * h.to(s.dtype)
    dmask = products.flatten(0, -2).sum(0) if products.dim() > 1 else products
    return dx, dmask * s / mask_scale
