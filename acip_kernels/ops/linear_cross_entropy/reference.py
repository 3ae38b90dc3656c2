"""Cross-entropy of a linear layer's output in plain PyTorch: the formula and the test oracle, for any dtype."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int) -> Tensor:
    """`Σ_tokens -log softmax(x weightᵀ + bias)[label]` over `x [tokens, in]`; `ignore_index` counts nothing."""
    logits = F.linear(x, weight, bias)
    precise = logits.float() if logits.element_size() < 4 else logits
    return F.cross_entropy(precise, labels, ignore_index=ignore_index, reduction="sum")
