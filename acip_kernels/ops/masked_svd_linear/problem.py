"""The adapter beside a masked SVD product, and what all backends do with it alike."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import dropout
from ..common import add_product, product

# For x, mask, A and B; None where there is none.
Gradients = tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """`(α/r) (x̃ Aᵀ) Bᵀ`, `A [r, in]` and `B [out, r]`.

    joined: the first `r` rows of `Vh` and columns of `U` are `A` and `B` already, in the factors' dtype, so that one
    product makes both parts. dropout: on the adapter's input, by `seed` (int64 `[1]`).
    """

    A: Tensor
    B: Tensor
    scaling: float
    joined: bool = False
    dropout: float = 0.0
    seed: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @staticmethod
    def arguments(adapter: Adapter | None) -> tuple:
        """`(A, B, seed, scaling, joined, dropout)`, as operators take them, who take no objects."""
        if adapter is None:
            return None, None, None, 0.0, False, 0.0
        return adapter.A, adapter.B, adapter.seed, adapter.scaling, adapter.joined, adapter.dropout

    def inner(self, Vh: Tensor) -> tuple[Tensor, Tensor]:
        """`(A, Vh)`, both `[..., in]` in the factors' dtype, however they are stored."""
        return (Vh[: self.rank], Vh[self.rank :]) if self.joined else (self.A.to(Vh.dtype), Vh)

    def outer(self, U: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, U)`, both `[out, ...]` in the factors' dtype, however they are stored."""
        return (U[:, : self.rank], U[:, self.rank :]) if self.joined else (self.B.to(U.dtype), U)


def before_ranks(x: Tensor, Vh: Tensor, adapter: Adapter | None) -> Tensor:
    """`z [tokens, r + rank]`, as the reference's `products`: what the Triton backend leaves to torch's products."""
    if adapter is None or (adapter.joined and not adapter.dropout):
        return product(x, Vh.t())
    A, Vh = adapter.inner(Vh)
    z = x.new_empty(x.shape[0], adapter.rank + Vh.shape[0])
    product(x, Vh.t(), out=z[:, adapter.rank :])
    if adapter.dropout:
        dropout.dropped_product(x, A, adapter.dropout, adapter.seed, out=z[:, : adapter.rank])
    else:
        product(x, A.t(), out=z[:, : adapter.rank])
    return z


def after_ranks(
    g: Tensor,
    x: Tensor | None,
    z: Tensor,
    hs: Tensor | None,
    Vh: Tensor,
    adapter: Adapter | None,
    need_x: bool,
    ha=None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`(∂x, ∂A, ∂B)`, once `h ⊙ s` is known, and as much left to them.

    `hs` is of the columns of `Vh`, a joined adapter's among them; `ha [tokens, r]` of the adapter's, where it is apart.
    """
    if adapter is None:
        return (product(hs, Vh) if need_x else None), None, None
    r = adapter.rank
    if adapter.joined:
        ha = hs[:, :r]
    dA = dropout.dropped_gradient(ha, x, adapter.dropout, adapter.seed) if adapter.dropout else product(ha.t(), x)
    dB = product(g.t(), z[:, :r])
    # In one pass what the adapter's float32 gradient is anyway.
    dB = torch.mul(dB, adapter.scaling, out=torch.empty_like(dB, dtype=adapter.B.dtype))
    if not need_x:
        return None, dA, dB
    if adapter.joined and not adapter.dropout:
        return product(hs, Vh), dA, dB
    A, Vh = adapter.inner(Vh)
    dx = product(hs[:, r:] if adapter.joined else hs, Vh)
    if adapter.dropout:
        dropout.add_dropped_product(dx, ha, A, adapter.dropout, adapter.seed)
    else:
        add_product(dx, ha, A)
    return dx, dA, dB
