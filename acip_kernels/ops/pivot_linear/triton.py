"""A layer in pivoted form on a GPU: few tokens in two launches, more in two products; outputs are stored permuted."""

from __future__ import annotations

import torch
from torch import Tensor

from ..fused_linear import prefill
from ..fused_linear.op import CONCATENATE, PIVOTED, PLAIN
from ..triton_products import invert
from . import reference


def forward(x: Tensor, P: Tensor, C: Tensor, inverse: Tensor, bias: Tensor | None) -> Tensor:
    """As the reference; without gradients, which only that one has."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, P, C, bias)):
        return reference.forward(x, P, C, inverse, bias)
    tensors = [P.contiguous(), C.contiguous(), invert(inverse)]
    spec = (PIVOTED, 2 * (bias is not None), PLAIN, P.shape[1], 0, PLAIN, C.shape[1], 0)
    return prefill.forward(x, tensors + ([] if bias is None else [bias]), spec, CONCATENATE)
