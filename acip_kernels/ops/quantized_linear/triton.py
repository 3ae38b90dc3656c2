"""The product of a frozen quantized weight on a GPU, both ways.

Codes become numbers in registers where `plan.product_plan` expects that to be faster, else a plain weight in one pass.
"""

from __future__ import annotations

from torch import Tensor

from ...plan import Product
from ..fused_linear import prefill
from ..fused_linear.op import CONCATENATE, DENSE
from ..quantize import Quantized
from ..triton_products import backward_product, dequantize, matrix, pays


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
    return g @ dequantize(m, g.dtype)
