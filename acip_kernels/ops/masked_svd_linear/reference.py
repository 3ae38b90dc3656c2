"""The masked SVD product of an ACIP run in plain PyTorch: the formula and the test oracle, for any dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..lowrank_linear.reference import scale_ranks


def keep_live(values: Tensor, mask: Tensor) -> Tensor:
    """`values ⊙ β` for `values [..., rank]`, with `β_i = 1` where `mask_i > 0` and 0 elsewhere.

    A choice, not a product: a pruned entry that overflowed would be `inf · 0`, a NaN.
    """
    return torch.where(mask > 0, values, torch.zeros_like(values))


def forward(x: Tensor, Vh: Tensor, U: Tensor, S: Tensor, mask: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`y [..., out] = ((x Vhᵀ) ⊙ S ⊙ β) Uᵀ + bias`, and `z = x Vhᵀ [..., rank]`, which the backward pass needs."""
    z = F.linear(x, Vh)
    return F.linear(keep_live(scale_ranks(z, S), mask), U, bias), z


def backward(
    g: Tensor, z: Tensor, Vh: Tensor, U: Tensor, S: Tensor, mask: Tensor, mask_scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients for `x` and `mask` at `g = ∂L/∂y [..., out]` (ACIP.md section 1), with `h = g U`.

    `∂L/∂x = (h ⊙ S ⊙ β) Vh`; `∂L/∂mask_i = 1[mask_i > 0] · (1/mask_scale) · S_i · Σ_tokens z_i h_i`.
    The factors are frozen and have no gradient; a pruned entry's is exactly zero.
    """
    h = g @ U
    dx = keep_live(scale_ranks(h, S), mask) @ Vh
    # Not an einsum: its inner loop would sum in the factors' dtype, and this sum runs over every token of the batch.
    products = z.to(S.dtype) * h.to(S.dtype)
    dmask = products.flatten(0, -2).sum(0) if products.dim() > 1 else products
    return dx, keep_live(dmask * S / mask_scale, mask)
