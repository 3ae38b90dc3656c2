"""A gated MLP's activation in a training step on a GPU: one pass over memory forward and one backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import triton_products

BLOCK = 2048


@triton.jit
def gated_silu_forward_kernel(gate, up, y, elements, BLOCK: tl.constexpr):
    """y `[elements]` = silu(gate) ⊙ up."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = number < elements
    a = tl.load(gate + number, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + number, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + number, (a * tl.sigmoid(a) * b).to(y.dtype.element_ty), mask=inside)


@triton.jit
def gated_silu_backward_kernel(g, gate, up, dgate, dup, elements, BLOCK: tl.constexpr):
    """dgate = g ⊙ up ⊙ silu'(gate) and dup = g ⊙ silu(gate), all `[elements]`."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = number < elements
    d = tl.load(g + number, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(gate + number, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + number, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    tl.store(dgate + number, (d * b * s * (1 + a * (1 - s))).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + number, (d * a * s).to(dup.dtype.element_ty), mask=inside)


def launch(kernel, x: Tensor, *arguments) -> None:
    """Over all elements of x."""
    if x.numel():
        grid = (triton.cdiv(x.numel(), BLOCK),)
        triton_products.launch(kernel, grid, x, *arguments, x.numel(), BLOCK=BLOCK, num_warps=4)


class GatedSilu(torch.autograd.Function):
    """`apply(gate, up)`."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        launch(gated_silu_forward_kernel, gate, gate, up, y)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        launch(gated_silu_backward_kernel, gate, g.contiguous(), gate, up, dgate, dup)
        return dgate, dup
