"""`masked_svd_linear`: the operator of a layer while ACIP prunes it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import common
from . import reference

OPERATOR = "masked_svd_linear"
BACKENDS = {"reference": (reference.forward, reference.backward)}


def masked_svd_linear(
    x: Tensor,
    Vh: Tensor,
    U: Tensor,
    S: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    *,
    mask_scale: float = 0.02,
    backend: str = "auto",
) -> Tensor:
    """`((x Vhᵀ) ⊙ S ⊙ β) Uᵀ + bias` with `β_i = 1` where `mask_i > 0`, and ACIP's straight-through gradient for `mask`.

    Args:
        x: `[..., in_features]`, any number of leading dimensions.
        Vh: `[rank, in_features]`, in x's dtype; frozen.
        U: `[out_features, rank]`, in x's dtype; frozen.
        S: `[rank]` singular values, float32 (float64 for float64 `x`); frozen.
        mask: `[rank]` mask parameters, dtype as `S`.
        bias: `[out_features]` or None, in x's dtype; frozen.
        mask_scale: `c`, the value that mask parameters start at; their gradient is `1/c` times that of `β`.
        backend: "auto" chooses; a name runs that one or raises.

    Returns:
        `[..., out_features]` in x's dtype. Gradients exist for `x` and `mask` alone; asking for one of a frozen
        argument raises.

    Raises:
        ValueError: a shape, device, `mask_scale` or backend name that does not fit; rank 0; a frozen argument that
            requires a gradient.
        TypeError: a dtype that does not fit.
        RuntimeError: a backend that is not available here.

    Source: "Choose Your Model Size" (arXiv 2502.01717), straight-through estimator of its section on score maps.
    """
    common.choose_backend(OPERATOR, backend, BACKENDS)
    x, Vh, U, bias = common.autocast(x, Vh, U, bias)
    common.check_factors(OPERATOR, x, Vh, U, bias, S=S, mask=mask)
    precise = torch.promote_types(x.dtype, torch.float32)
    for name, tensor in (("S", S), ("mask", mask)):
        # In bfloat16 the mask's steps would be lost without a word.
        if tensor.dtype != precise:
            raise TypeError(f"{OPERATOR}: {name} must be {precise} as x is {x.dtype}, got {tensor.dtype}")
    if not mask_scale > 0:
        raise ValueError(f"{OPERATOR}: mask_scale must be positive, got {mask_scale}")
    if torch.is_grad_enabled():
        for name, tensor in (("Vh", Vh), ("U", U), ("S", S), ("bias", bias)):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"{OPERATOR}: {name} requires a gradient, but it is frozen; detach it")
    return torch.ops.acip.masked_svd_linear(x, Vh, U, S, mask, bias, mask_scale, backend)[0]


@torch.library.custom_op("acip::masked_svd_linear", mutates_args=())
def _operator(
    x: Tensor, Vh: Tensor, U: Tensor, S: Tensor, mask: Tensor, bias: Tensor | None, mask_scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    forward, _ = common.choose_backend(OPERATOR, backend, BACKENDS)
    return forward(x, Vh, U, S, mask, bias)


@_operator.register_fake
def _(x, Vh, U, S, mask, bias, mask_scale, backend):
    leading = x.shape[:-1]
    return x.new_empty((*leading, U.shape[0])), x.new_empty((*leading, Vh.shape[0]))


@torch.library.custom_op("acip::masked_svd_linear_backward", mutates_args=())
def _backward_operator(
    g: Tensor, z: Tensor, Vh: Tensor, U: Tensor, S: Tensor, mask: Tensor, mask_scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    _, backward = common.choose_backend(OPERATOR, backend, BACKENDS)
    return backward(g, z, Vh, U, S, mask, mask_scale)


@_backward_operator.register_fake
def _(g, z, Vh, U, S, mask, mask_scale, backend):
    return g.new_empty((*g.shape[:-1], Vh.shape[1])), torch.empty_like(mask)


def _setup_context(ctx, inputs, output):
    _, Vh, U, S, mask, _, ctx.mask_scale, ctx.backend = inputs
    z = output[1]
    ctx.mark_non_differentiable(z)
    ctx.save_for_backward(z, Vh, U, S, mask)


def _backward(ctx, g, _):
    dx, dmask = torch.ops.acip.masked_svd_linear_backward(g, *ctx.saved_tensors, ctx.mask_scale, ctx.backend)
    return dx, None, None, None, dmask, None, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)


def _product_flops(tokens_shape, Vh_shape, U_shape) -> int:
    tokens = 1
    for size in tokens_shape[:-1]:
        tokens *= size
    return 2 * tokens * Vh_shape[0] * (Vh_shape[1] + U_shape[0])


@register_flop_formula(torch.ops.acip.masked_svd_linear)
def _flops(x_shape, Vh_shape, U_shape, *_, out_shape=None, **__) -> int:
    return _product_flops(x_shape, Vh_shape, U_shape)


@register_flop_formula(torch.ops.acip.masked_svd_linear_backward)
def _backward_flops(g_shape, z_shape, Vh_shape, U_shape, *_, out_shape=None, **__) -> int:
    return _product_flops(g_shape, Vh_shape, U_shape)
