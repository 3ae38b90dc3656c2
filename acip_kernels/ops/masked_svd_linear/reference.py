"""The masked SVD product of an ACIP run in plain PyTorch: the formula and the test oracle, for any dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dropout
from ..lowrank_linear.reference import scale_ranks
from .problem import Adapter, Gradients


def keep_live(values: Tensor, mask: Tensor) -> Tensor:
    """`values ⊙ β` for `values [..., rank]`, with `β_i = 1` where `mask_i > 0` and 0 elsewhere.

    A choice, not a product: a pruned entry that overflowed would be `inf · 0`, a NaN.
    """
    return torch.where(mask > 0, values, torch.zeros_like(values))


def products(x: Tensor, Vh: Tensor, adapter: Adapter | None) -> Tensor:
    """`z [tokens, r + rank]`: `x̃ Aᵀ`, with `x̃` the input after dropout, and then `x Vhᵀ`."""
    if adapter is None:
        return F.linear(x, Vh)
    A, Vh = adapter.inner(Vh)
    dropped = dropout.drop(x, adapter.dropout, adapter.seed) if adapter.dropout else x
    return torch.cat([F.linear(dropped, A), F.linear(x, Vh)], 1)


def forward(z: Tensor, U: Tensor, S: Tensor, mask: Tensor, bias: Tensor | None, adapter: Adapter | None) -> Tensor:
    """`y [tokens, out] = (z ⊙ S ⊙ β) Uᵀ + bias`, and the adapter's part, for `z` of `products`."""
    if adapter is None:
        return F.linear(keep_live(scale_ranks(z, S), mask), U, bias)
    B, U = adapter.outer(U)
    a, z = z[:, : adapter.rank], z[:, adapter.rank :]
    return F.linear(keep_live(scale_ranks(z, S), mask), U, bias) + F.linear(a * adapter.scaling, B)


def backward(
    g: Tensor,
    x: Tensor,
    z: Tensor,
    Vh: Tensor,
    U: Tensor,
    S: Tensor,
    mask: Tensor,
    mask_scale: float,
    adapter: Adapter | None,
    need_x: bool = True,
) -> Gradients:
    """Gradients for `x`, `mask`, `A` and `B` at `g = ∂L/∂y [tokens, out]` (ACIP.md section 1), with `h = g U`.

    `∂L/∂x = (h ⊙ S ⊙ β) Vh`; `∂L/∂mask_i = 1[mask_i > 0] · (1/mask_scale) · S_i · Σ_tokens z_i h_i`.
    The factors are frozen and have no gradient; a pruned entry's is exactly zero. The adapter's: with
    `h_A = (α/r) g B`, `∂L/∂A = h_Aᵀ x̃` and `∂L/∂B = (α/r) gᵀ (x̃ Aᵀ)`; its part of `∂L/∂x` is dropped as `x` was.
    """
    dx = dA = dB = None
    if adapter is not None:
        (A, Vh), (B, U) = adapter.inner(Vh), adapter.outer(U)
        a, z = z[:, : adapter.rank], z[:, adapter.rank :]
        ha = (g @ B) * adapter.scaling
        dropped = dropout.drop(x, adapter.dropout, adapter.seed) if adapter.dropout else x
        dA, dB = ha.t() @ dropped, (g.t() @ a) * adapter.scaling
    h = g @ U
    if need_x:
        dx = keep_live(scale_ranks(h, S), mask) @ Vh
        if adapter is not None:
            part = ha @ A
            dx = dx + (dropout.drop(part, adapter.dropout, adapter.seed) if adapter.dropout else part)
    # Not an einsum: its inner loop would sum in the factors' dtype, and this sum runs over every token of the batch.
    dmask = (z.to(S.dtype) * h.to(S.dtype)).sum(0)
    return dx, keep_live(dmask * S / mask_scale, mask), dA, dB
