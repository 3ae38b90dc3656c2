"""Forwards for `kernels.kernelize`, which puts them on the low-rank layers of a model: see `hub_kernel`.

As that asks, they have no state and no methods: `self` is a layer of the installed package, or anybody's with these
children. On a GPU they run the Triton kernels, which whoever loads them has asked for.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops import common
from ..ops.lowrank_linear import op as lowrank
from ..ops.pivot_linear import op as pivot
from . import fused


def _backend(x: Tensor, available: dict) -> str:
    return "triton" if x.is_cuda and x.dtype in common.TRITON_DTYPES and "triton" in available else "auto"


class LowRankLinear(nn.Module):
    """`U(Vh(x))` by one operator, where both are plain `nn.Linear`s (see `nn.fused`)."""

    can_torch_compile = True

    Vh: nn.Linear
    U: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        if _has_any_global_hook() or not self.U.in_features or not fused.add_factors(self.Vh, self.U, x, []):
            return self.U(self.Vh(x))
        backend = _backend(x, lowrank.BACKENDS)
        return lowrank.lowrank_linear(x, self.Vh.weight, self.U.weight, None, self.U.bias, backend=backend)


class PivotLinear(nn.Module):
    """`P(x)` and `C(P(x))`, each at the place of its outputs, by one operator."""

    P: nn.Linear
    C: nn.Linear
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        inverse = self.orders()[0]
        if _has_any_global_hook() or not all(fused.add_matrix(child, x, []) for child in (self.P, self.C)):
            z = self.P(x)
            return pivot.reference.place(z, self.C(z), inverse, self.bias)
        backend = _backend(x, pivot.BACKENDS)
        return pivot.pivot_linear(x, self.P.weight, self.C.weight, inverse, self.bias, backend=backend)
