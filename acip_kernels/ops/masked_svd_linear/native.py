"""The masked SVD product of an ACIP run on a CPU: torch's matrix products, our kernels for what is between them.

Per call, against the reference: one pass over `z` and one over `h` where it takes eight, no pass for the adapter's sum,
and with a joined adapter four products where it takes eight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dropout
from ..common import add_product, product
from .problem import Adapter, Gradients, after_ranks


def _scales(S: Tensor, mask: Tensor, adapter: Adapter | None) -> Tensor:
    """What multiplies each column of `z`: `α/r` for the adapter's, `S ⊙ β` for the rest."""
    s = torch.where(mask > 0, S, 0)
    return s if adapter is None else torch.cat([s.new_full((adapter.rank,), adapter.scaling), s])


def products(x: Tensor, Vh: Tensor, adapter: Adapter | None) -> Tensor:
    """As the reference."""
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


def forward(z: Tensor, U: Tensor, S: Tensor, mask: Tensor, bias: Tensor | None, adapter: Adapter | None) -> Tensor:
    """As the reference."""
    zs = torch.ops.acip.scale_ranks(z, _scales(S, mask, adapter))
    if adapter is None or adapter.joined:
        y = product(zs, U.t())
    else:
        B, U = adapter.outer(U)
        y = product(zs[:, adapter.rank :], U.t())
        add_product(y, zs[:, : adapter.rank], B.t())
    return y if bias is None else y.add_(bias)


def backward(
    g: Tensor,
    x: Tensor,
    z: Tensor,
    Vh: Tensor,
    U: Tensor,
    S: Tensor,
    mask: Tensor,
    mask_scale: float,
    adapter: Adapter | None,
    need_x: bool = True,
) -> Gradients:
    """As the reference."""
    r = 0 if adapter is None else adapter.rank
    if adapter is None or adapter.joined:
        h = product(g, U)
    else:
        B, U = adapter.outer(U)
        h = torch.empty_like(z)
        product(g, U, out=h[:, r:])
        product(g, B, out=h[:, :r])
    sums = torch.ops.acip.mask_gradient_(z, h, _scales(S, mask, adapter))
    apart = adapter is not None and not adapter.joined
    dx, dA, dB = after_ranks(g, x, z, h[:, r:] if apart else h, Vh, adapter, need_x, h[:, :r])
    # The kernel's sum is zero where the scale is; a live singular value of zero has no gradient either.
    return dx, sums[r:].mul(S).div_(mask_scale).masked_fill_(mask <= 0, 0), dA, dB
