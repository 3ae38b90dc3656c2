"""`quantized_linear`: the operator of a linear layer whose weight is quantized and frozen, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import common, extension
from ..fused_linear.op import DTYPES
from ..quantize import GROUPS, Quantized, shapes
from . import native, reference

OPERATOR = "quantized_linear"
BACKENDS = {"reference": reference} | ({"native": native} if extension.available() else {})
try:
    from . import triton
except ImportError:  # a machine without Triton
    pass
else:
    BACKENDS["triton"] = triton


def quantized_linear(
    x: Tensor, weight: Quantized, bias: Tensor | None = None, *, group: int = 64, backend: str = "auto"
) -> Tensor:
    """`x Wᵀ + bias` for a frozen weight in one of the formats of `ops.quantize`, with the gradient of x and of bias.

    Nothing but the weight is kept for the backward pass: `∂L/∂x = g W`, of the codes once more.

    Args:
        x: `[..., in_features]`, any number of leading dimensions.
        weight: of `[out_features, in_features]`, as `ops.quantize.quantize` makes it.
        bias: `[out_features]` or None, in x's dtype.
        group: of int4, columns to a scale.
        backend: "auto" takes the native kernels on a CPU without gradients (int8 and int4), else the reference, which
            makes a plain weight first; a name runs that one or raises. "triton" has both passes.

    Returns:
        `[..., out_features]` in x's dtype.

    Raises:
        ValueError: a shape, group or backend name that does not fit.
        TypeError: a dtype that does not fit.
        RuntimeError: a backend that is not available here, or does not know the format.
    """
    x, bias = common.autocast(x, bias)
    check_weight(OPERATOR, "weight", weight, x.shape[-1], group)
    if not x.is_floating_point():
        raise TypeError(f"{OPERATOR}: x must be floating point, got {x.dtype}")
    rows = len(weight.qweight)
    if bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype):
        raise ValueError(f"{OPERATOR}: bias must be {x.dtype} [{rows}], got {bias.dtype} {list(bias.shape)}")
    if backend == "auto":
        codes = weight.qweight.dtype != torch.float8_e4m3fn
        wanted = torch.is_grad_enabled() and x.requires_grad
        backend = (
            "native" if codes and not wanted and "native" in BACKENDS and extension.takes(x, DTYPES) else "reference"
        )
    common.choose_backend(OPERATOR, backend, BACKENDS, x, DTYPES)
    return torch.ops.acip.quantized_linear(x, *weight, bias, group, backend)


def check_weight(operator: str, name: str, weight: Quantized, cols: int, group: int) -> None:
    """Raises `TypeError` or `ValueError` unless `weight` is one of `cols` columns in some format."""
    if not isinstance(weight, Quantized):
        raise TypeError(f"{operator}: {name} must be what ops.quantize.quantize makes, got {type(weight).__name__}")
    kinds = {torch.int8: "int8", torch.uint8: "int4", torch.float8_e4m3fn: "fp8"}
    kind = kinds.get(weight.qweight.dtype)
    if kind is None:
        raise TypeError(f"{operator}: {name} must hold int8, uint8 or float8_e4m3fn, got {weight.qweight.dtype}")
    if kind == "int4" and group not in GROUPS:
        raise ValueError(f"{operator}: group must be one of {', '.join(map(str, GROUPS))}, got {group!r}")
    wanted = shapes(len(weight.qweight), cols, kind, group, weight.zeros is None)
    for key, tensor in weight._asdict().items():
        if key in wanted and (tensor is None or (tuple(tensor.shape), tensor.dtype) != wanted[key]):
            found = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            shape, dtype = wanted[key]
            raise ValueError(
                f"{operator}: {name}'s {key} must be {dtype} {list(shape)} for {cols} columns, got {found}"
            )


@torch.library.custom_op("acip::quantized_linear", mutates_args=())
def _operator(
    x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group: int, backend: str
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    y = BACKENDS[backend].forward(rows, Quantized(qweight, scales, zeros), bias, group)
    return y.reshape(*x.shape[:-1], len(qweight))


@_operator.register_fake
def _(x, qweight, scales, zeros, bias, group, backend):
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


@torch.library.custom_op("acip::quantized_linear_backward", mutates_args=())
def _backward_operator(
    g: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, cols: int, group: int, backend: str
) -> Tensor:
    rows = g.reshape(-1, g.shape[-1])
    dx = BACKENDS[backend].backward(rows, Quantized(qweight, scales, zeros), cols, group)
    return dx.reshape(*g.shape[:-1], cols)


@_backward_operator.register_fake
def _(g, qweight, scales, zeros, cols, group, backend):
    return g.new_empty((*g.shape[:-1], cols))


def _setup_context(ctx, inputs, output):
    x, qweight, scales, zeros, _, ctx.group, ctx.backend = inputs
    ctx.cols = x.shape[-1]
    ctx.save_for_backward(qweight, scales, zeros)


def _backward(ctx, g):
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.acip.quantized_linear_backward(g, *ctx.saved_tensors, ctx.cols, ctx.group, ctx.backend)
    if ctx.needs_input_grad[4]:
        dbias = g.reshape(-1, g.shape[-1]).sum(0)
    return dx, None, None, None, dbias, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.acip.quantized_linear)
def _flops(x_shape, qweight_shape, *_, out_shape=None, **__) -> int:
    tokens = 1
    for size in x_shape[:-1]:
        tokens *= size
    return 2 * tokens * x_shape[-1] * qweight_shape[0]


@register_flop_formula(torch.ops.acip.quantized_linear_backward)
def _backward_flops(g_shape, qweight_shape, scales, zeros, cols, *_, out_shape=None, **__) -> int:
    return _flops((*g_shape[:-1], cols), qweight_shape)
