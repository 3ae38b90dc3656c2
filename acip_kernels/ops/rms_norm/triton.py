"""The RMS norm of a training step on a GPU: one pass over memory forward and one backward, which keeps `x` alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import triton_products


@triton.jit
def rms_norm_forward_kernel(x, weight, y, columns, eps, BLOCK: tl.constexpr):
    """y `[rows, columns]` = weight ⊙ x / √(mean x² + eps), a row for each program."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < columns
    values = tl.load(x + row * columns + column, mask=inside, other=0.0)
    wide = values.to(tl.float32)
    root = tl.rsqrt(tl.sum(wide * wide) / columns + eps)
    scale = tl.load(weight + column, mask=inside, other=0.0)
    normalised = (wide * root).to(values.dtype).to(tl.float32)
    tl.store(y + row * columns + column, (normalised * scale.to(tl.float32)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward_kernel(g, x, weight, dx, columns, eps, BLOCK: tl.constexpr):
    """dx = r (h - x r² mean(h x)) for h = g ⊙ weight and r = 1 / √(mean x² + eps), a row for each program."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < columns
    wide = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(g + row * columns + column, mask=inside, other=0.0).to(tl.float32) * scale
    root = tl.rsqrt(tl.sum(wide * wide) / columns + eps)
    mean = tl.sum(h * wide) / columns
    tl.store(
        dx + row * columns + column, (root * (h - wide * (root * root * mean))).to(dx.dtype.element_ty), mask=inside
    )


def launch(kernel, x: Tensor, *arguments) -> None:
    """A program for each row of x `[..., columns]`."""
    columns = x.shape[-1]
    if not x.numel():
        return
    block = triton.next_power_of_2(columns)
    # Sixteen numbers a thread, as far as a program has threads; eight where a warp has 64 of them.
    warps = min(16, max(1, block // 512))
    triton_products.launch(
        kernel, (x.numel() // columns,), x, *arguments, BLOCK=block, num_warps=warps,
    )  # fmt: skip


class RmsNorm(torch.autograd.Function):
    """`apply(x, weight, eps)`, with a gradient for x alone."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y = torch.empty_like(x)
        launch(rms_norm_forward_kernel, x, x, weight, y, x.shape[-1], eps)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, weight = ctx.saved_tensors
        dx = torch.empty_like(x)
        launch(rms_norm_backward_kernel, x, g.contiguous(), x, weight, dx, x.shape[-1], ctx.eps)
        return dx, None, None
