"""`causal_attention`: the attention of a training step on a CPU, a block of queries at a time.

What torch's fused attention does there is far from the rate of a matrix product, its backward pass above all
(`bench.training_parts`). Here the products are torch's batched ones, of all the query heads that share a key head at
once, and what is between them is one pass over scores that lie in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import extension
from . import reference

OPERATOR = "causal_attention"


# Fewer queries at a time leave out more of what is hidden from them, more make fewer and larger products. By
# `bench.training_parts`: products in two bytes are faster, so calls weigh more.
QUERIES_AT_A_TIME, QUERIES_AT_A_TIME_OF_TWO_BYTES = 64, 128


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, block: int | None = None
) -> Tensor:
    """`softmax(scale · q kᵀ) v` over the keys up to each query's own place.

    Args:
        q: `[batch, heads, length, width]`. k, v: `[batch, key_heads, length, width]`, in q's dtype; `heads` is a
            multiple of `key_heads`, and query head `i` uses key head `i // (heads / key_heads)`.
        scale: None for `1 / √width`. block: queries that are computed at a time, None for what was measured
            to be best, 128 in two bytes and 64 in more.

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
    if block is None:
        block = QUERIES_AT_A_TIME_OF_TWO_BYTES if q.dtype.itemsize == 2 else QUERIES_AT_A_TIME
    if block < 1:
        raise ValueError(f"{OPERATOR}: block must be at least 1, got {block}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if extension.takes(q) and not torch.compiler.is_compiling() and type(q) in (Tensor, torch.nn.Parameter):
        # The same without an operator of Python's.
        return torch.ops.acip.causal_attention_differentiable(q, k, v, scale, block)
    return torch.ops.acip.causal_attention(q, k, v, scale, block)[0]


@torch.library.custom_op("acip::causal_attention", mutates_args=())
def _operator(q: Tensor, k: Tensor, v: Tensor, scale: float, block: int) -> tuple[Tensor, Tensor]:
    outputs = torch.ops.acip.causal_attention_outputs if extension.takes(q) else reference.outputs
    return outputs(q, k, v, scale, block)


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
    gradients = torch.ops.acip.causal_attention_gradients if extension.takes(q) else reference.gradients
    return gradients(g, q, k, v, log_sums, scale, block)


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
    return batch * heads * sum((stop - start) * stop for start, stop in reference.blocks(length, block))


@register_flop_formula(torch.ops.acip.causal_attention)
def _flops(q_shape, k_shape, v_shape, scale, block, *_, out_shape=None, **__) -> int:
    return 4 * _pairs(q_shape, block) * q_shape[-1]


@register_flop_formula(torch.ops.acip.causal_attention_backward)
def _backward_flops(g_shape, q_shape, k_shape, v_shape, sums_shape, scale, block, *_, out_shape=None, **__) -> int:
    return 10 * _pairs(q_shape, block) * q_shape[-1]
