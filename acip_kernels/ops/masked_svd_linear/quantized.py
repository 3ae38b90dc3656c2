"""The masked SVD product of frozen quantized factors: `quantized_linear` for the first, and an operator for the rest.

`y = (z ⊙ S ⊙ β) Uᵀ + bias` with gradients for z and the mask. On a GPU codes become numbers in registers in all four
products, and the scaling and the mask's gradient stay in the second ones' prologue and epilogue, as for plain factors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...plan import Product
from .. import common
from ..lowrank_linear.reference import scale_ranks
from ..plain_weight import plain_weight
from ..quantize import Quantized
from ..quantized_linear import op as linear
from . import reference

OPERATOR = "masked_svd_linear"
try:
    from .. import triton_products as kernels
    from . import triton
except ImportError:  # a machine without Triton
    kernels = None  # type: ignore[assignment]  # a module, as far as annotations can say
BACKENDS = {"reference": reference} | ({} if kernels is None else {"triton": triton})


def forward(
    x: Tensor,
    Vh: Quantized,
    U: Quantized,
    S: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    mask_scale: float,
    group: int,
    backend: str,
) -> Tensor:
    """As the operator, of which this is the part for quantized factors; raises what it does."""
    linear.check_weight(OPERATOR, "Vh", Vh, x.shape[-1], group)
    rank = len(Vh.qweight)
    linear.check_weight(OPERATOR, "U", U, rank, group)
    precise = torch.promote_types(x.dtype, torch.float32)
    for name, tensor in (("S", S), ("mask", mask)):
        if tensor.shape != (rank,) or tensor.dtype != precise:
            raise ValueError(f"{OPERATOR}: {name} must be {precise} [{rank}], got {tensor.dtype} {list(tensor.shape)}")
    if bias is not None and (bias.shape != (len(U.qweight),) or bias.dtype != x.dtype):
        raise ValueError(f"{OPERATOR}: bias must be {x.dtype} [{len(U.qweight)}], got {bias.dtype} {list(bias.shape)}")
    if not 0 < mask_scale < math.inf:
        raise ValueError(f"{OPERATOR}: mask_scale must be positive and finite, got {mask_scale}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (S, bias)):
        raise ValueError(f"{OPERATOR}: S and bias are frozen; detach what requires a gradient")
    common.choose_backend(OPERATOR, backend, BACKENDS, x)
    backend = "reference" if backend == "auto" else backend
    z = linear.quantized_linear(x, Vh, group=group, backend=backend)
    return torch.ops.acip.masked_quantized_expand(z, *U, S, mask, bias, mask_scale, group, backend)


@torch.library.custom_op("acip::masked_quantized_expand", mutates_args=())
def _operator(
    z: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    S: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    mask_scale: float,
    group: int,
    backend: str,
) -> Tensor:
    weight, rows = Quantized(qweight, scales, zeros), z.reshape(-1, z.shape[-1])
    if backend == "triton" and _is_ours(rows, len(qweight), rows.shape[1], weight, group):
        y = kernels.forward_product(rows, kernels.matrix(weight, rows.shape[1], group), S, mask, bias)
    else:
        y = BACKENDS[backend].forward(rows, _plain(weight, rows, group, backend), S, mask, bias, None)
    return y.reshape(*z.shape[:-1], len(qweight))


@_operator.register_fake
def _(z, qweight, scales, zeros, S, mask, bias, mask_scale, group, backend):
    return z.new_empty((*z.shape[:-1], qweight.shape[0]))


@torch.library.custom_op("acip::masked_quantized_expand_backward", mutates_args=())
def _backward_operator(
    g: Tensor,
    z: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    S: Tensor,
    mask: Tensor,
    mask_scale: float,
    group: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    weight, flat = Quantized(qweight, scales, zeros), z.reshape(-1, z.shape[-1])
    rows = g.reshape(-1, g.shape[-1])
    if backend == "triton" and _is_ours(rows, flat.shape[1], len(qweight), weight, group):
        dz, dmask = kernels.backward_product(
            rows, kernels.matrix(weight, flat.shape[1], group), flat, S, mask, mask_scale
        )
    else:
        h = common.product(rows, _plain(weight, flat, group, backend))
        if backend == "triton":
            dz, dmask = kernels.scale_and_reduce(h, flat, S, mask, mask_scale)
        else:
            dz = reference.keep_live(scale_ranks(h, S), mask)
            sums = (flat.to(S.dtype) * h.to(S.dtype)).sum(0)
            dmask = reference.keep_live(sums * S / mask_scale, mask)
    assert dmask is not None
    return dz.reshape(z.shape), dmask


@_backward_operator.register_fake
def _(g, z, qweight, scales, zeros, S, mask, mask_scale, group, backend):
    return z.new_empty(z.shape), torch.empty_like(mask)


def _is_ours(x: Tensor, columns: int, depth: int, weight: Quantized, group: int) -> bool:
    m = kernels.matrix(weight, x.shape[1], group)
    beside = 2 * len(x) * min(columns, depth) * x.element_size()  # the scaling, as for plain factors
    return kernels.pays([Product(len(x), columns, depth, x.element_size(), m.kind, m.group)], x, beside)


def _plain(weight: Quantized, z: Tensor, group: int, backend: str) -> Tensor:
    if backend == "triton":
        return kernels.dequantize(kernels.matrix(weight, z.shape[1], group), z.dtype)
    return plain_weight(*weight, cols=z.shape[1], group=group, dtype=z.dtype)


def _setup_context(ctx, inputs, output):
    z, qweight, scales, zeros, S, mask, _, *ctx.options = inputs
    ctx.save_for_backward(z, qweight, scales, zeros, S, mask)


def _backward(ctx, g):
    dz, dmask = torch.ops.acip.masked_quantized_expand_backward(g, *ctx.saved_tensors, *ctx.options)
    gradients = [None] * 10
    gradients[0], gradients[5] = (dz if ctx.needs_input_grad[0] else None), (dmask if ctx.needs_input_grad[5] else None)
    return tuple(gradients)


_operator.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.acip.masked_quantized_expand)
def _flops(z_shape, qweight_shape, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(z_shape) * qweight_shape[0]


@register_flop_formula(torch.ops.acip.masked_quantized_expand_backward)
def _backward_flops(g_shape, z_shape, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(z_shape) * g_shape[-1]
