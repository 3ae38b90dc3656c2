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
    a = adapter
    options = (None, None, None, 0.0, False, 0.0) if a is None else (a.A, a.B, a.seed, a.scaling, a.joined, a.dropout)
    return torch.ops.acip.masked_svd(x, Vh, U, S, mask, bias, rows, *options, mask_scale, save_z)


def products(x: Tensor, Vh: Tensor, adapter: Adapter | None) -> Tensor:
    """As the reference."""
    a = adapter
    options = (None, None, None, 0.0, False, 0.0) if a is None else (a.A, a.B, a.seed, a.scaling, a.joined, a.dropout)
    return torch.ops.acip.masked_svd_products(x, Vh, *options)


def forward(z: Tensor, U: Tensor, S: Tensor, mask: Tensor, bias: Tensor | None, adapter: Adapter | None) -> Tensor:
    """As the reference."""
    a = adapter
    options = (None, None, 0.0, False) if a is None else (a.A, a.B, a.scaling, a.joined)
    return torch.ops.acip.masked_svd_outputs(z, U, S, mask, bias, *options)


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
    a = adapter
    options = (None, None, None, 0.0, False, 0.0) if a is None else (a.A, a.B, a.seed, a.scaling, a.joined, a.dropout)
    dx, dmask, dA, dB = torch.ops.acip.masked_svd_gradients(
        g, x, z, Vh, U, S, mask, *options, mask_scale, need_x
    )  # fmt: skip
    return (dx if need_x else None), dmask, (dA if a else None), (dB if a else None)
