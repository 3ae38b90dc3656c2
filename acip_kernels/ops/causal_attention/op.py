"""`causal_attention`: the attention of a training step on a CPU, a block of queries at a time.

What torch's fused attention does there is far from the rate of a matrix product, its backward pass above all
(`bench.training_parts`). Here the products are torch's batched ones, of all the query heads that share a key head at
once, and what is between them is one pass over scores that lie in the cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import extension
from . import reference

OPERATOR = "causal_attention"


def queries_at_a_time(q: Tensor) -> int:
    """A power of two, 64 to 256. Fewer leave out more of what is hidden from them, more make fewer calls.

    What is computed in vain grows with the block and the heads, what calls cost with the number of blocks: so the best
    block is `√(calls / heads)`, `calls` being what they cost, in products of a head; as `bench.training_parts` has it.
    """
    calls = 9e5 if q.element_size() == 2 else 1.3e5
    return 2 ** min(8, max(6, round(math.log2(calls / max(1, q.shape[0] * q.shape[1])) / 2)))


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, block: int | None = None
) -> Tensor:
    """`softmax(scale · q kᵀ) v` over the keys up to each query's own place.

    Args:
        q: `[batch, heads, length, width]`. k, v: `[batch, key_heads, length, width]`, in q's dtype; `heads` is a
            multiple of `key_heads`, and query head `i` uses key head `i // (heads / key_heads)`.
        scale: None for `1 / √width`. block: queries that are computed at a time, None for `queries_at_a_time`.

    Returns:
        `[batch, heads, length, width]` in q's dtype, the memory of `[batch, length, heads, width]`. Differentiable in
        q, k and v. Scores are rounded to q's dtype, the softmax is taken in float32 (float64), and probabilities are
        rounded, as in transformers' "eager" attention; no more than a block's scores are held, and the backward pass
        makes them again.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit.
    """
    shape = (q.shape[0], k.shape[1], *q.shape[2:]) if q.dim() == 4 and k.dim() == 4 else None
    if shape is None or k.shape != shape or v.shape != shape or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{OPERATOR}: q must be [batch, heads, length, width] and k and v [batch, key_heads, length, width], "
            f"heads a multiple of key_heads, got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(
            f"{OPERATOR}: q, k and v must be of one dtype and device, got {q.dtype}, {k.dtype} and {v.dtype} "
            f"on {q.device}, {k.device} and {v.device}"
        )
    block = queries_at_a_time(q) if block is None else block
    if block < 1:
        raise ValueError(f"{OPERATOR}: block must be at least 1, got {block}")
    return torch.ops.acip.causal_attention(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, block)[0]


def _kernels(x: Tensor):
    native = extension.takes(x)
    return (
        torch.ops.acip.causal_softmax_ if native else reference.causal_softmax_,
        torch.ops.acip.softmax_gradient_ if native else reference.softmax_gradient_,
    )


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


def _blocks(length: int, block: int) -> list[tuple[int, int]]:
    return [(start, min(start + block, length)) for start in range(0, length, block)]


@torch.library.custom_op("acip::causal_attention", mutates_args=())
def _operator(q: Tensor, k: Tensor, v: Tensor, scale: float, block: int) -> tuple[Tensor, Tensor]:
    softmax_, _ = _kernels(q)
    batch, heads, length, width = q.shape
    key_heads = k.shape[1]
    keys, values = k.reshape(-1, length, width), v.reshape(-1, length, width)
    out = q.new_empty(batch, length, heads, width)
    log_sums = q.new_empty(
        batch * key_heads, heads // key_heads * length, dtype=torch.promote_types(q.dtype, torch.float32)
    )
    for start, stop in _blocks(length, block):
        scores = _grouped(q, key_heads, start, stop) @ keys[:, :stop].transpose(1, 2)
        sums = softmax_(scores, stop - start, scale, None)
        log_sums[:, heads // key_heads * start : heads // key_heads * stop] = sums
        _put(out, scores @ values[:, :stop], key_heads, start, stop)
    return out.transpose(1, 2), log_sums


@_operator.register_fake
def _(q, k, v, scale, block):
    batch, heads, length, width = q.shape
    precise = torch.promote_types(q.dtype, torch.float32)
    log_sums = q.new_empty(batch * k.shape[1], heads // k.shape[1] * length, dtype=precise)
    return q.new_empty(batch, length, heads, width).transpose(1, 2), log_sums


@torch.library.custom_op("acip::causal_attention_backward", mutates_args=())
def _backward_operator(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, log_sums: Tensor, scale: float, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    softmax_, gradient_ = _kernels(q)
    batch, heads, length, width = q.shape
    key_heads = k.shape[1]
    groups = heads // key_heads
    keys, values = k.reshape(-1, length, width), v.reshape(-1, length, width)
    dq = q.new_empty(batch, length, heads, width)
    # Sums over blocks, not rounded in between.
    dk = torch.zeros_like(keys, dtype=log_sums.dtype)
    dv = torch.zeros_like(dk)
    for start, stop in _blocks(length, block):
        queries, upstream = _grouped(q, key_heads, start, stop), _grouped(g, key_heads, start, stop)
        p = queries @ keys[:, :stop].transpose(1, 2)
        softmax_(p, stop - start, scale, log_sums[:, groups * start : groups * stop].contiguous())
        dv[:, :stop] += p.transpose(1, 2) @ upstream
        ds = upstream @ values[:, :stop].transpose(1, 2)
        gradient_(ds, p, stop - start, scale)
        _put(dq, ds @ keys[:, :stop], key_heads, start, stop)
        dk[:, :stop] += ds.transpose(1, 2) @ queries
    return dq.transpose(1, 2), dk.to(k.dtype).view(k.shape), dv.to(v.dtype).view(v.shape)


@_backward_operator.register_fake
def _(g, q, k, v, log_sums, scale, block):
    batch, heads, length, width = q.shape
    dq = q.new_empty(batch, length, heads, width).transpose(1, 2)
    return dq, k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.scale, ctx.block = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, output[1])


def _backward(ctx, g, _):
    q, k, v, log_sums = ctx.saved_tensors
    return *torch.ops.acip.causal_attention_backward(g, q, k, v, log_sums, ctx.scale, ctx.block), None, None


_operator.register_autograd(_backward, setup_context=_setup_context)


def _pairs(shape, block: int) -> int:
    """Scores that are computed."""
    batch, heads, length, _ = shape
    return batch * heads * sum((stop - start) * stop for start, stop in _blocks(length, block))


@register_flop_formula(torch.ops.acip.causal_attention)
def _flops(q_shape, k_shape, v_shape, scale, block, *_, out_shape=None, **__) -> int:
    return 4 * _pairs(q_shape, block) * q_shape[-1]


@register_flop_formula(torch.ops.acip.causal_attention_backward)
def _backward_flops(g_shape, q_shape, k_shape, v_shape, sums_shape, scale, block, *_, out_shape=None, **__) -> int:
    return 10 * _pairs(q_shape, block) * q_shape[-1]
