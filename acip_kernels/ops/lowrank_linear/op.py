"""`lowrank_linear`: the operator of a deployed low-rank layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import common, extension
from ..fused_linear.cuda import missing
from ..fused_linear.op import DTYPES
from . import cuda, native, reference

OPERATOR = "lowrank_linear"
BACKENDS = {"reference": reference.forward}
if extension.available():
    BACKENDS["native"] = native.forward
try:
    from . import triton
except ImportError:  # a machine without Triton
    pass
else:
    BACKENDS["triton"] = triton.forward
if missing is None:
    BACKENDS["cuda"] = cuda.forward


def lowrank_linear(
    x: Tensor,
    Vh: Tensor,
    U: Tensor,
    s: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """`((x Vhᵀ) ⊙ s) Uᵀ + bias`: a linear layer whose weight is kept as two factors.

    Args:
        x: `[..., in_features]`, any number of leading dimensions, tokens may be zero.
        Vh: `[rank, in_features]`, in x's dtype.
        U: `[out_features, rank]`, in x's dtype.
        s: `[rank]` or None for ones; float32 (float64 for float64 `x`) or x's dtype.
        bias: `[out_features]` or None, in x's dtype.
        backend: "auto" chooses; a name runs that one or raises.

    Returns:
        `[..., out_features]` in x's dtype. Products accumulate in float32 or better; z is rounded to x's dtype.
        Differentiable in every tensor. Under autocast `x`, `Vh`, `U` and `bias` are cast as for `F.linear`.

    Raises:
        ValueError: a shape, device or backend name that does not fit; rank 0.
        TypeError: a dtype that does not fit.
        RuntimeError: a backend that is not available here.
    """
    x, Vh, U, bias = common.autocast(x, Vh, U, bias)
    common.choose_backend(OPERATOR, backend, BACKENDS, x if isinstance(x, Tensor) else None, DTYPES)
    per_rank = {} if s is None else {"s": s}
    common.check_factors(OPERATOR, x, Vh, U, bias, **per_rank)
    return torch.ops.acip.lowrank_linear(x, Vh, U, s, bias, backend)


@torch.library.custom_op("acip::lowrank_linear", mutates_args=())
def _operator(x: Tensor, Vh: Tensor, U: Tensor, s: Tensor | None, bias: Tensor | None, backend: str) -> Tensor:
    return common.choose_backend(OPERATOR, backend, BACKENDS, x, DTYPES)(x, Vh, U, s, bias)


@_operator.register_fake
def _(x, Vh, U, s, bias, backend):
    return x.new_empty((*x.shape[:-1], U.shape[0]))


def _setup_context(ctx, inputs, output):
    x, Vh, U, s, _, _ = inputs
    ctx.save_for_backward(x, Vh, U, s)


def _backward(ctx, g):
    x, Vh, U, s = ctx.saved_tensors
    return *reference.backward(g, x, Vh, U, s, ctx.needs_input_grad[:5]), None


_operator.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.acip.lowrank_linear)
def _flops(x_shape, Vh_shape, U_shape, *_, out_shape=None, **__) -> int:
    """Multiplications and additions of the two products."""
    tokens = 1
    for size in x_shape[:-1]:
        tokens *= size
    rank, in_features = Vh_shape
    return 2 * tokens * rank * (in_features + U_shape[0])
