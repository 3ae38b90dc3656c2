"""The low-rank product in plain PyTorch: the formula and the test oracle, for any dtype."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def scale_ranks(z: Tensor, s: Tensor) -> Tensor:
    """`z ⊙ s` for `z [..., rank]`, multiplied in `s`'s precision and rounded once to `z`'s dtype."""
    return (z.to(s.dtype) * s).to(z.dtype)


def forward(x: Tensor, Vh: Tensor, U: Tensor, s: Tensor | None, bias: Tensor | None) -> Tensor:
    """`y [..., out] = ((x Vhᵀ) ⊙ s) Uᵀ + bias`."""
    z = F.linear(x, Vh)
    if s is not None:
        z = scale_ranks(z, s)
    return F.linear(z, U, bias)


def backward(
    g: Tensor, x: Tensor, Vh: Tensor, U: Tensor, s: Tensor | None, needed: tuple[bool, bool, bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Gradients for `(x, Vh, U, s, bias)` at `g = ∂L/∂y [..., out]`; `None` where not `needed`.

    With `z = x Vhᵀ` and `h = g U`, both `[..., rank]`:
    `∂L/∂x = (h ⊙ s) Vh`, `∂L/∂Vh = (h ⊙ s)ᵀ x`, `∂L/∂U = gᵀ (z ⊙ s)`, `∂L/∂s = Σ_tokens z ⊙ h`,
    `∂L/∂bias = Σ_tokens g`.
    """
    need_x, need_Vh, need_U, need_s, need_bias = needed
    tokens = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    g_tokens = g.flatten(0, -2) if g.dim() > 1 else g.unsqueeze(0)
    dx = dVh = dU = ds = None

    z = F.linear(tokens, Vh) if need_U or need_s else None
    if need_x or need_Vh or need_s:
        h = g_tokens @ U
        hs = h if s is None else scale_ranks(h, s)
        if need_x:
            dx = (hs @ Vh).view(x.shape)
        if need_Vh:
            dVh = hs.t() @ tokens
        if need_s:
            ds = (z.to(s.dtype) * h.to(s.dtype)).sum(0)
    if need_U:
        dU = g_tokens.t() @ (z if s is None else scale_ranks(z, s))
    dbias = g_tokens.sum(0) if need_bias else None
    return dx, dVh, dU, ds, dbias
