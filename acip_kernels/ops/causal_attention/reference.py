"""Causal attention in plain PyTorch: the formula and the test oracle, for any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`softmax(scale · q kᵀ, a query seeing keys up to its own place) v`; shapes as `causal_attention`."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = scale * (q @ k.transpose(-1, -2))
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def causal_softmax_(scores: Tensor, block: int, scale: float, log_sums: Tensor | None) -> Tensor:
    """`scores [batch, rows, keys]` become probabilities; returns the logarithms of the sums `[batch, rows]`.

    A batch's rows are blocks of `block` queries, each of which ends at the last key.
    """
    keys = scores.shape[2]
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    last = keys - block + torch.arange(scores.shape[1], device=scores.device) % block
    wide = wide.masked_fill(torch.arange(keys, device=scores.device) > last[:, None], -torch.inf)
    log_sums = wide.logsumexp(-1) if log_sums is None else log_sums
    scores.copy_((wide - log_sums.unsqueeze(-1)).clamp_max(0).exp_())
    return log_sums


def softmax_gradient_(dp: Tensor, p: Tensor, block: int, scale: float) -> None:
    """`dp` becomes `scale · p ⊙ (dp - Σ_keys p ⊙ dp)`."""
    precise = torch.promote_types(dp.dtype, torch.float32)
    wide, p = dp.to(precise), p.to(precise)
    dp.copy_(scale * p * (wide - (wide * p).sum(-1, keepdim=True)))
