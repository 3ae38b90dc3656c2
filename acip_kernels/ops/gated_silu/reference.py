"""The activation of a gated MLP in plain PyTorch: the formula and the test oracle, for any dtype."""

from __future__ import annotations

from torch import Tensor, nn


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) ⊙ up`; shapes as `gated_silu`."""
    return nn.functional.silu(gate) * up
