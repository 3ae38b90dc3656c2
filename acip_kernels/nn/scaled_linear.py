"""`ScaledLinear`: a quantized layer while its scales are trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import quantize as q
from .quantized_linear import QuantizedLinear


class ScaledLinear(nn.Module):
    """What `quantized` computes, `y = x Wᵀ + bias`, with scales that learn: `W = codes · (scales · (1 + change))`.

    Only scales learn (as in PEQA, arXiv 2305.14152, and the second phase of EfficientQAT, arXiv 2407.11062): codes and
    zeros stay, and so do all bytes. Changes are relative, so that one learning rate does for scales of any size. The
    forward pass takes the scales as they would be stored, rounded; the gradient is of them before that, as if rounding
    were not there (straight through, arXiv 1308.3432).

    Parameter: `change`, float32, of the shape of the scales; it starts at zero. The dense weight is made anew in either
    pass, and never kept.
    """

    def __init__(self, quantized: QuantizedLinear):
        super().__init__()
        self.in_features, self.out_features = quantized.in_features, quantized.out_features
        self._quantized = (quantized,)  # whose place this layer takes: no child of it
        scales = quantized.scales
        self._stored_dtype, self._group = scales.dtype, quantized.group or max(quantized.in_features, 1)
        self.register_buffer(
            "codes", q.without_scales(quantized.qweight, quantized.zeros, cols=self.in_features, group=self._group)
        )
        self.register_buffer("scales", (scales if scales.dim() == 2 else scales[:, None]).float())
        self.register_buffer("weight", quantized.weight)  # empty, of the layer's dtype
        self.bias = quantized.bias
        self.change = nn.Parameter(torch.zeros_like(self.scales))

    codes: Tensor
    scales: Tensor
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        changed = self.scales * (1 + self.change)
        y = _ScaledProduct.apply(x, self.codes, changed, self._stored_dtype, self._group)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def quantized(self) -> QuantizedLinear:
        """The layer that this one stands for, its scales those that were learnt."""
        layer = self._quantized[0]
        learnt = (self.scales * (1 + self.change)).reshape(layer.scales.shape)
        layer.scales = learnt.to(layer.scales.dtype)
        return layer


def _weight(codes: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """`[out, in]`, the product rounded once: where codes and scales are exact in `dtype`, made in it."""
    precise = torch.promote_types(dtype, scales.dtype)
    return (codes.to(precise) * q.per_column(scales.to(precise), codes.shape[1], group)).to(dtype)


class _ScaledProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, codes, scales, stored_dtype, group):
        stored = scales.to(stored_dtype)
        ctx.save_for_backward(x, codes, stored)
        ctx.group, ctx.dtype = group, scales.dtype
        return F.linear(x, _weight(codes, stored, group, x.dtype))

    @staticmethod
    def backward(ctx, g):
        x, codes, stored = ctx.saved_tensors
        dx = dscales = None
        if ctx.needs_input_grad[0]:
            dx = g @ _weight(codes, stored, ctx.group, x.dtype)
        if ctx.needs_input_grad[2]:
            dweight = g.flatten(0, -2).t() @ x.flatten(0, -2)
            rows, cols = codes.shape
            precise = torch.promote_types(x.dtype, torch.float32)
            products = dweight.to(precise) * codes.to(precise)
            groups = stored.shape[1]
            filled = F.pad(products, (0, groups * ctx.group - cols))
            dscales = filled.view(rows, groups, ctx.group).sum(2).to(ctx.dtype)
        return dx, None, dscales, None, None
