"""The product of a frozen quantized weight on a GPU, both ways: codes become numbers in registers."""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan import Product
from ..fused_linear import prefill
from ..fused_linear.op import CONCATENATE, DENSE, FP8, INT4, INT4_ZEROS, INT8
from ..quantize import Quantized
from ..triton_products import Matrix, backward_product, pays
from . import reference


def matrix(weight: Quantized, cols: int, group: int) -> Matrix:
    """`weight [rows, cols]` as the kernels take it."""
    kinds = {torch.int8: INT8, torch.float8_e4m3fn: FP8, torch.uint8: INT4 if weight.zeros is None else INT4_ZEROS}
    kind = kinds[weight.qweight.dtype]
    return Matrix(kind, cols, group if kind in (INT4, INT4_ZEROS) else 0, *(t for t in weight))


def forward(x: Tensor, weight: Quantized, bias: Tensor | None, group: int) -> Tensor:
    """As the reference."""
    m = matrix(weight, x.shape[1], group)
    tensors = [t for t in (*weight, bias) if t is not None]
    return prefill.forward(x, tensors, (DENSE, 2 * (bias is not None), m.kind, m.cols, m.group), CONCATENATE)


def backward(g: Tensor, weight: Quantized, cols: int, group: int) -> Tensor:
    """As the reference."""
    m = matrix(weight, cols, group)
    if pays([Product(len(g), m.cols, m.rows, g.element_size(), m.kind, m.group)], g, 0):
        h, _ = backward_product(g, m)
        assert h is not None
        return h
    return reference.backward(g, weight, cols, group)
