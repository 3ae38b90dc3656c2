"""The product of a frozen quantized weight on a CPU, by the fused operator, which knows int8 and int4."""

from __future__ import annotations

import torch
from torch import Tensor

from ..fused_linear.op import CONCATENATE, DENSE, INT4, INT4_ZEROS, INT8
from ..quantize import Quantized
from . import reference

backward = reference.backward


def forward(x: Tensor, weight: Quantized, bias: Tensor | None, group: int) -> Tensor:
    """As the reference."""
    if weight.qweight.dtype == torch.float8_e4m3fn:
        raise RuntimeError(
            "quantized_linear: the native kernels take int8 and int4, and this weight is fp8; "
            "backend='auto' makes plain numbers of it"
        )
    kind = INT8 if weight.qweight.dtype == torch.int8 else INT4 if weight.zeros is None else INT4_ZEROS
    tensors = [t for t in (*weight, None if bias is None else bias.contiguous()) if t is not None]
    spec = (DENSE, 2 * (bias is not None), kind, x.shape[1], 0 if kind == INT8 else group)
    return torch.ops.acip.fused_linear(x, tensors, spec, CONCATENATE)
