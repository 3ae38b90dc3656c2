"""Layers of few tokens in plain PyTorch, from the same arguments as the native operator: the test oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantize import dequantize_int4, dequantize_rows
from .op import CONCATENATE, DENSE, FP8, GATED_MLP, INT4, INT4_ZEROS, INT8, PIVOTED, PLAIN


def forward(x: Tensor, tensors: list[Tensor], spec: list[int], mode: int) -> Tensor:
    """As `fused_linear`, in x's dtype; float64 `x` takes every weight in float64."""
    layers, numbers, rest = [], list(spec), list(tensors)
    while numbers:
        layers.append(_Layer(numbers, rest, x.dtype))
    if mode == CONCATENATE:
        return torch.cat([layer(x) for layer in layers], -1)
    product = F.silu(layers[0](x)) * layers[1](x)
    return layers[2](product) if mode == GATED_MLP else product


class _Layer:
    """Takes what is its own from the front of `numbers` and `tensors`."""

    def __init__(self, numbers: list[int], tensors: list[Tensor], dtype: torch.dtype):
        self.form, flags = numbers.pop(0), numbers.pop(0)
        self.weights = [_weight(numbers, tensors, dtype) for _ in range(1 if self.form == DENSE else 2)]
        self.place = tensors.pop(0).long() if self.form == PIVOTED else None
        self.s = tensors.pop(0).to(torch.promote_types(dtype, torch.float32)) if flags & 1 else None
        self.bias = tensors.pop(0).to(dtype) if flags & 2 else None

    def __call__(self, x: Tensor) -> Tensor:
        if self.form == DENSE:
            return F.linear(x, self.weights[0], self.bias)
        z = F.linear(x, self.weights[0])
        if self.s is not None:
            z = (z.to(self.s.dtype) * self.s).to(z.dtype)
        if self.form != PIVOTED:
            return F.linear(z, self.weights[1], self.bias)
        y = x.new_empty(*x.shape[:-1], len(self.place))
        y[..., self.place] = torch.cat([z, F.linear(z, self.weights[1])], -1)
        return y if self.bias is None else y + self.bias


def _weight(numbers: list[int], tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    kind, cols, group = (numbers.pop(0) for _ in range(3))
    if kind == PLAIN:
        return tensors.pop(0).to(dtype)
    if kind in (INT8, FP8):
        return dequantize_rows(tensors.pop(0), tensors.pop(0), dtype)
    assert kind in (INT4, INT4_ZEROS)
    codes, scales = tensors.pop(0), tensors.pop(0)
    zeros = tensors.pop(0) if kind == INT4_ZEROS else None
    return dequantize_int4(codes, scales, zeros, cols, group, dtype)
