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


# ---- a block of queries at a time, as `csrc/causal_attention.cpp`


def blocks(length: int, block: int) -> list[tuple[int, int]]:
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def outputs(q: Tensor, k: Tensor, v: Tensor, scale: float, block: int) -> tuple[Tensor, Tensor]:
    """The output, and of each query the logarithm of its sum, `[batch · key_heads, groups · length]`."""
    batch, heads, length, width = q.shape
    key_heads = k.shape[1]
    keys, values = k.reshape(-1, length, width), v.reshape(-1, length, width)
    out = q.new_empty(batch, length, heads, width)
    log_sums = q.new_empty(
        batch * key_heads, heads // key_heads * length, dtype=torch.promote_types(q.dtype, torch.float32)
    )
    for start, stop in blocks(length, block):
        scores = _grouped(q, key_heads, start, stop) @ keys[:, :stop].transpose(1, 2)
        sums = causal_softmax_(scores, stop - start, scale, None)
        log_sums[:, heads // key_heads * start : heads // key_heads * stop] = sums
        _put(out, scores @ values[:, :stop], key_heads, start, stop)
    return out.transpose(1, 2), log_sums


def gradients(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, log_sums: Tensor, scale: float, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Those for q, k and v."""
    batch, heads, length, width = q.shape
    key_heads = k.shape[1]
    groups = heads // key_heads
    keys, values = k.reshape(-1, length, width), v.reshape(-1, length, width)
    dq = q.new_empty(batch, length, heads, width)
    # Sums over blocks, not rounded in between.
    dk = torch.zeros_like(keys, dtype=log_sums.dtype)
    dv = torch.zeros_like(dk)
    for start, stop in blocks(length, block):
        queries, upstream = _grouped(q, key_heads, start, stop), _grouped(g, key_heads, start, stop)
        p = queries @ keys[:, :stop].transpose(1, 2)
        causal_softmax_(p, stop - start, scale, log_sums[:, groups * start : groups * stop].contiguous())
        dv[:, :stop] += p.transpose(1, 2) @ upstream
        ds = upstream @ values[:, :stop].transpose(1, 2)
        softmax_gradient_(ds, p, stop - start, scale)
        _put(dq, ds @ keys[:, :stop], key_heads, start, stop)
        dk[:, :stop] += ds.transpose(1, 2) @ queries
    return dq.transpose(1, 2), dk.to(k.dtype).view(k.shape), dv.to(v.dtype).view(v.shape)


def _grouped(x: Tensor, key_heads: int, start: int, stop: int) -> Tensor:
    """Queries `[start, stop)` of `x [batch, heads, length, width]`, `[batch · key_heads, groups · queries, width]`."""
    batch, heads, _, width = x.shape
    part = x[:, :, start:stop].reshape(batch, key_heads, heads // key_heads, stop - start, width)
    return part.reshape(batch * key_heads, -1, width)


def _put(to: Tensor, part: Tensor, key_heads: int, start: int, stop: int) -> None:
    """The inverse of `_grouped`, into `to [batch, length, heads, width]`."""
    batch, _, heads, width = to.shape
    part = part.view(batch, key_heads, heads // key_heads, stop - start, width)
    target = to[:, start:stop].view(batch, stop - start, key_heads, heads // key_heads, width)
    target.copy_(part.permute(0, 3, 1, 2, 4))
