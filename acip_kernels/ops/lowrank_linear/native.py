"""The low-rank product on a CPU: both products in one call, for many tokens by torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..fused_linear.op import CONCATENATE, FACTORS, PLAIN
from . import reference


def forward(x: Tensor, Vh: Tensor, U: Tensor, s: Tensor | None, bias: Tensor | None) -> Tensor:
    """As the reference."""
    # Rows that are not contiguous are nobody's deployed weights; torch's products know what to do with them.
    if not _has_rows(Vh) or not _has_rows(U):
        return reference.forward(x, Vh, U, s, bias)
    tensors = [Vh, U]
    if s is not None:
        tensors.append(s.float().contiguous())
    if bias is not None:
        tensors.append(bias.contiguous())
    rank, in_features = Vh.shape
    flags = (s is not None) + 2 * (bias is not None)
    spec = (FACTORS, flags, PLAIN, in_features, 0, PLAIN, rank, 0)
    return torch.ops.acip.fused_linear(x, tensors, spec, CONCATENATE)


def _has_rows(weight: Tensor) -> bool:
    return weight.shape[1] <= 1 or (weight.stride(1) == 1 and weight.stride(0) >= weight.shape[1])
