"""The masked SVD product of an ACIP run on a CPU: torch's matrix products, our kernels for what is between them.

Per call, against the reference: one pass over `z` and one over `h` where it takes eight, no pass for the adapter's sum,
and with a joined adapter four products where it takes eight. `csrc/masked_svd.cpp` has it, a pass by a call: what is
here are its parts, for what `torch.compile` traces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Adapter, Gradients


def linear(
    x: Tensor,
    Vh: Tensor,
    U: Tensor,
    S: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    adapter: Adapter | None,
    mask_scale: float,
    save_z: bool,
) -> Tensor:
    """The whole operator, differentiable, without an operator of Python around it."""
    arguments = Adapter.arguments(adapter)
    return torch.ops.acip.masked_svd(x, Vh, U, S, mask, bias, rows, *arguments, mask_scale, save_z)


def products(x: Tensor, Vh: Tensor, adapter: Adapter | None) -> Tensor:
    """As the reference."""
    return torch.ops.acip.masked_svd_products(x, Vh, *Adapter.arguments(adapter))


def forward(z: Tensor, U: Tensor, S: Tensor, mask: Tensor, bias: Tensor | None, adapter: Adapter | None) -> Tensor:
    """As the reference."""
    A, B, _, scaling, joined, _ = Adapter.arguments(adapter)
    return torch.ops.acip.masked_svd_outputs(z, U, S, mask, bias, A, B, scaling, joined)


def backward(
    g: Tensor,
    x: Tensor | None,
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
    dx, dmask, dA, dB = torch.ops.acip.masked_svd_gradients(
        g, x, z, Vh, U, S, mask, *Adapter.arguments(adapter), mask_scale, need_x
    )
    return (dx if need_x else None), dmask, (dA if adapter else None), (dB if adapter else None)
