"""A quantized weight as a plain one, for torch's products: on a GPU in one pass over memory, elsewhere in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import common
from .quantize import Quantized, dequantize

try:
    from . import triton_products
except ImportError:  # a machine without Triton
    triton_products = None  # type: ignore[assignment]


def plain_weight(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None = None, *, cols: int, group: int = 64, dtype: torch.dtype
) -> Tensor:
    """`ops.quantize.dequantize`, to the bit; arguments as there.

    In plain PyTorch that is a pass for the conversion, for the scales, for the rounding, and of int4 some more: five
    and more times as much memory as the codes and the numbers. Torch's compiler fuses them by itself.
    """
    if not _in_one_pass(qweight, scales, zeros, dtype):
        return dequantize(qweight, scales, zeros, cols=cols, group=group, dtype=dtype)
    return triton_products.dequantize(triton_products.matrix(Quantized(qweight, scales, zeros), cols, group), dtype)


def _is_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _in_one_pass(qweight: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> bool:
    if triton_products is None or not _is_gpu(qweight) or dtype not in common.TRITON_DTYPES:
        return False
    # A subclass may have no memory to read, as a fake tensor has none.
    plain = all(tensor is None or type(tensor) is Tensor for tensor in (qweight, scales, zeros))
    return plain and not torch.compiler.is_compiling()
