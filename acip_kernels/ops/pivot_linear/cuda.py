"""A layer in pivoted form by the CUDA C++ kernels: few tokens in one launch, torch's products for more."""

from __future__ import annotations

import torch
from torch import Tensor

from ..fused_linear import cuda
from ..fused_linear.op import CONCATENATE, PIVOTED, PLAIN
from . import reference


def forward(x: Tensor, P: Tensor, C: Tensor, inverse: Tensor, bias: Tensor | None) -> Tensor:
    """As the reference; without gradients, which only that one has."""
    wanted = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, P, C, bias))
    if wanted or x.numel() > cuda.MOST_TOKENS * x.shape[-1]:
        return reference.forward(x, P, C, inverse, bias)
    tensors = [P.contiguous(), C.contiguous(), inverse.argsort().to(torch.int32)]
    tensors += [] if bias is None else [bias.contiguous()]
    spec = [PIVOTED, 2 * (bias is not None), PLAIN, P.shape[1], 0, PLAIN, C.shape[1], 0]
    return cuda.forward(x, tensors, spec, CONCATENATE)
