"""The masked SVD product of an ACIP run on a GPU: torch's matrix products, and Triton's where one has company.

See `ops.triton_products`. `z = x Vhᵀ`, `∂L/∂x = (h ⊙ s) Vh` and the adapter's narrow products are torch's always. For
`y = (z ⊙ s) Uᵀ` and `h = g U`, `plan.product_plan` chooses between our product with its pass fused and torch's beside
that pass; results differ by rounding.
"""

from __future__ import annotations

from torch import Tensor

from ...plan import Product
from .. import triton_products as kernels
from ..common import add_product, product
from .problem import Adapter, Gradients, after_ranks, before_ranks

products = before_ranks


def _expand(
    z: Tensor, U: Tensor, S: Tensor, mask: Tensor, rows: Tensor | None, bias: Tensor | None, r: int = 0, scaling=1.0
) -> Tensor:
    """`(z ⊙ s) Uᵀ + bias`, by either way."""
    # A pass of its own reads z and writes z ⊙ s.
    if kernels.pays([Product(len(z), U.shape[0], z.shape[1], z.element_size())], z, 2 * z.numel() * z.element_size()):
        return kernels.forward_product(z, U, S, mask, bias, r, scaling, rows=rows)
    y = product(kernels.scale(z, S, mask, r, scaling, rows), U.t())
    return y if bias is None else y.add_(bias)


def _reduce(
    g: Tensor,
    U: Tensor,
    z: Tensor,
    S: Tensor,
    mask: Tensor,
    rows: Tensor | None,
    mask_scale: float,
    r: int,
    scaling: float,
    need_hs: bool,
) -> tuple[Tensor | None, Tensor]:
    """`h ⊙ s` and the mask's gradient for `h = g U`, by either way."""
    # A pass of its own reads h and writes it back, scaled; z is read by either way.
    if kernels.pays([Product(len(g), U.shape[1], U.shape[0], g.element_size())], g, 2 * z.numel() * g.element_size()):
        hs, dmask = kernels.backward_product(g, U, z, S, mask, mask_scale, r, scaling, need_hs, rows=rows)
        assert dmask is not None
        return hs, dmask
    return kernels.scale_and_reduce(product(g, U), z, S, mask, mask_scale, r, scaling, need_hs, rows)


def forward(
    z: Tensor,
    U: Tensor,
    S: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    adapter: Adapter | None,
    rows: Tensor | None = None,
) -> Tensor:
    """As the reference; with `rows`, for these of a longer mask."""
    if adapter is None:
        return _expand(z, U, S, mask, rows, bias)
    if adapter.joined:
        return _expand(z, U, S, mask, rows, bias, adapter.rank, adapter.scaling)
    B, U = adapter.outer(U)
    y = _expand(z[:, adapter.rank :], U, S, mask, rows, bias)
    return add_product(y, z[:, : adapter.rank] * adapter.scaling, B.t())


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
    rows: Tensor | None = None,
) -> Gradients:
    """As the reference; with `rows`, of a longer mask, whose gradient is zero elsewhere."""
    ha = None
    if adapter is None:
        hs, dmask = _reduce(g, U, z, S, mask, rows, mask_scale, 0, 1.0, need_x)
    elif adapter.joined:
        hs, dmask = _reduce(g, U, z, S, mask, rows, mask_scale, adapter.rank, adapter.scaling, True)
    else:
        B, U = adapter.outer(U)
        hs, dmask = _reduce(g, U, z[:, adapter.rank :], S, mask, rows, mask_scale, 0, 1.0, need_x)
        ha = product(g, B).mul_(adapter.scaling)
    dx, dA, dB = after_ranks(g, x, z, hs, Vh, adapter, need_x, ha)
    return dx, dmask, dA, dB
