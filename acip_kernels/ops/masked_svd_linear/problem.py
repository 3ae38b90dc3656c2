"""The adapter beside a masked SVD product."""

from __future__ import annotations

import dataclasses

from torch import Tensor

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

    def inner(self, Vh: Tensor) -> tuple[Tensor, Tensor]:
        """`(A, Vh)`, both `[..., in]` in the factors' dtype, however they are stored."""
        return (Vh[: self.rank], Vh[self.rank :]) if self.joined else (self.A.to(Vh.dtype), Vh)

    def outer(self, U: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, U)`, both `[out, ...]` in the factors' dtype, however they are stored."""
        return (U[:, : self.rank], U[:, self.rank :]) if self.joined else (self.B.to(U.dtype), U)
