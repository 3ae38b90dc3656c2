"""`linear_cross_entropy`: the loss of a frozen output head, without its logits ever being stored."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import common, extension

OPERATOR = "linear_cross_entropy"


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
) -> Tensor:
    """`Σ_tokens -log softmax(x weightᵀ + bias)[label]`, the sum over all tokens, with a gradient for `x` alone.

    The logits are made for `chunk_tokens` at a time, and turned into their gradient and that into `x`'s at once, so
    that memory for `chunk_tokens · classes` numbers is enough, where the ordinary loss keeps three times
    `tokens · classes`. For a vocabulary of 128 k and 4096 tokens in float32 that is 6 GB.

    Args:
        x: `[tokens, in_features]`. weight: `[classes, in_features]`, frozen, in x's dtype. labels: int64 `[tokens]`.
        bias: `[classes]`, frozen, or None. ignore_index: the label that counts nothing.
        chunk_tokens: None for as many as make 2²⁵ logits (128 MB in float32), at least 32: each chunk reads all of
            `weight`, so small ones are slow (`bench.training_parts`).

    Returns:
        A scalar in float32 (float64 for float64 `x`). Logits are rounded to x's dtype, as the ordinary path does, but
        on a CPU without products in that dtype, where they are float32; the softmax is in float32.

    Raises:
        ValueError: a shape or a label that does not fit, or a frozen argument that requires a gradient.
        TypeError: a dtype that does not fit.
    """
    x, weight, bias = common.autocast(x, weight, bias)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{OPERATOR}: x must be [tokens, in_features] and weight [classes, in_features], "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    if labels.shape != x.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"{OPERATOR}: labels must be int64 [{x.shape[0]}], got {labels.dtype} {list(labels.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{OPERATOR}: bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{OPERATOR}: {name} is {tensor.dtype} but x is {x.dtype}; convert one of them")
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{OPERATOR}: {name} requires a gradient, but it is frozen; detach it")
    if chunk_tokens is None:
        chunk_tokens = max(32, 2**25 // weight.shape[0])
    if chunk_tokens < 1:
        raise ValueError(f"{OPERATOR}: chunk_tokens must be at least 1, got {chunk_tokens}")
    need_x = torch.is_grad_enabled() and x.requires_grad
    return torch.ops.acip.linear_cross_entropy(x, weight, labels, bias, ignore_index, chunk_tokens, need_x)[0]


@torch.library.custom_op("acip::linear_cross_entropy", mutates_args=())
def _operator(
    x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore: int, chunk_tokens: int, need_x: bool
) -> tuple[Tensor, Tensor]:
    precise = torch.promote_types(x.dtype, torch.float32)
    widened = x.device.type == "cpu" and not common.multiplies_natively(x.dtype)
    # Rounded to x's dtype only where the product is in it.
    wide = weight.float() if widened else weight
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    losses = []
    for start in range(0, x.shape[0], chunk_tokens):
        part = slice(start, start + chunk_tokens)
        logits = x[part].to(wide.dtype) @ wide.t()
        if bias is not None:
            logits += bias
        loss, gradient = _losses(logits, labels[part], ignore)
        losses.append(loss)
        if need_x:
            dx[part] = gradient.to(wide.dtype) @ wide
    # Over all tokens at once, in a fixed order.
    total = torch.cat(losses).sum() if losses else x.new_zeros((), dtype=precise)
    return total.to(precise), dx


def _losses(logits: Tensor, labels: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """The loss of every row, and the gradient for the logits, which may have their memory."""
    if extension.takes(logits):
        return torch.ops.acip.cross_entropy_(logits, labels.contiguous(), ignore, 1.0), logits
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ignored = labels == ignore
    target = labels.masked_fill(ignored, 0).unsqueeze(1)
    log_sum = precise.logsumexp(1, keepdim=True)
    loss = (log_sum - precise.gather(1, target))[:, 0].masked_fill(ignored, 0)
    gradient = (precise - log_sum).exp_()
    gradient.scatter_add_(1, target, gradient.new_full((1, 1), -1.0).expand(target.shape))
    return loss, gradient.masked_fill_(ignored.unsqueeze(1), 0)


@_operator.register_fake
def _(x, weight, labels, bias, ignore, chunk_tokens, need_x):
    precise = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((), dtype=precise), torch.empty_like(x) if need_x else x.new_empty(0)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(ctx, g, _):
    (dx,) = ctx.saved_tensors
    return (dx * g).to(dx.dtype), None, None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.acip.linear_cross_entropy)
def _flops(x_shape, weight_shape, labels, bias, ignore, chunk_tokens, need_x, *_, out_shape=None, **__) -> int:
    """Of the logits, and of the gradient, which is made in the forward pass."""
    return (2 if need_x else 1) * 2 * x_shape[0] * weight_shape[0] * weight_shape[1]
