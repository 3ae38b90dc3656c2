"""The rotary position embedding of a training step on a GPU: one pass over memory each way; nothing of `x` is kept."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import triton_products


@triton.jit
def rotary_kernel(
    x, cos, sin, y, heads, tokens, half, x_batch, x_head, x_token, cos_batch, sin_batch,
    BACKWARD: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y `[batch, tokens, heads, 2 half]` of x `[batch, heads, tokens, 2 half]` with strides; a token for each program.

    cos and sin `[batch or 1, tokens, 2 half]`, contiguous but for the stride of a batch, which may be 0. BACKWARD: the
    transposed rotation, which is the gradient's way back.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    column = tl.arange(0, BLOCK)
    inside = column < half
    at = token * 2 * half + column
    cos_first = tl.load(cos + batch * cos_batch + at, mask=inside, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + batch * cos_batch + at + half, mask=inside, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + batch * sin_batch + at, mask=inside, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + batch * sin_batch + at + half, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        sin_first, sin_second = -sin_second, -sin_first
    for start in range(0, heads, BLOCK_HEADS):
        head = start + tl.arange(0, BLOCK_HEADS)
        mask = (head < heads)[:, None] & inside[None, :]
        from_ = x + batch * x_batch + token * x_token + head.to(tl.int64)[:, None] * x_head + column[None, :]
        first = tl.load(from_, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(from_ + half, mask=mask, other=0.0).to(tl.float32)
        to = y + (row * heads + head[:, None]) * 2 * half + column[None, :]
        tl.store(to, (first * cos_first - second * sin_first).to(y.dtype.element_ty), mask=mask)
        tl.store(to + half, (second * cos_second + first * sin_second).to(y.dtype.element_ty), mask=mask)


def run(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> Tensor:
    """What the kernel makes of x `[batch, heads, tokens, width]`, whose numbers of a head are neighbours in memory."""
    batch, heads, tokens, width = x.shape
    y = x.new_empty(batch, tokens, heads, width)
    if y.numel():
        block = triton.next_power_of_2(width // 2)
        # Sixteen pairs a thread at a time; eight where a warp has 64 of them.
        block_heads = min(triton.next_power_of_2(heads), max(1, 1024 // block))
        triton_products.launch(
            rotary_kernel, (batch * tokens,), x,
            x, cos, sin, y, heads, tokens, width // 2, *x.stride()[:3], *(_batch_stride(t) for t in (cos, sin)),
            BACKWARD=backward, BLOCK_HEADS=block_heads, BLOCK=block, num_warps=2,
        )  # fmt: skip
    return y.transpose(1, 2)


def _batch_stride(t: Tensor) -> int:
    """Of the contiguous cos or sin: 0 if there is one for all."""
    return t.stride(0) if t.shape[0] > 1 else 0


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class Rotary(torch.autograd.Function):
    """`apply(x, cos, sin)`, with a gradient for x alone."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return run(_rows(x), cos, sin, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        return run(_rows(g), *ctx.saved_tensors, backward=True), None, None
